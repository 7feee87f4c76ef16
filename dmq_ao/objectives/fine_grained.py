"""How far a block is from its teacher's, outside and inside (EDA-DM, arXiv 2401.04585, fine-grained reconstruction).

The error of a block's output alone lets the layers inside trade their errors against each other, which fits a small
calibration set and little else; a share of their own errors holds them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmq_ao.objectives.output import output_error


@dataclass(frozen=True, eq=False)
class Compared:
    """A tensor of the student beside the teacher's.

    Attributes:
        student: [B, ...], gradients flow.
        teacher: the same shape; no gradient.
        ch_axis: channel axis: 1 for maps, the last for tokens.
    """

    student: Tensor
    teacher: Tensor
    ch_axis: int


def fine_grained_error(outputs: Sequence[Compared], inner: Sequence[Compared], layer_weight: float) -> Tensor:
    """``sum of d(outputs) + layer_weight * sum of d(inner)`` for each sample.

    ``d`` is ``output_error``: squared, summed over channels, averaged over all other axes.

    Args:
        outputs: of the block, one or more.
        inner: of the layers inside, without those that are the block's output.
        layer_weight: the paper's gamma; 0 is plain block reconstruction.

    Returns:
        [B], in the dtype of the first output.

    Raises:
        ValueError: for shapes that differ, or no outputs.
    """
    if not outputs:
        raise ValueError("a block needs an output to compare, got none")
    error = torch.stack([output_error(one.student, one.teacher, one.ch_axis) for one in outputs]).sum(0)
    if not inner or layer_weight == 0:
        return error
    inside = torch.stack([output_error(one.student, one.teacher, one.ch_axis) for one in inner]).sum(0)
    total: Tensor = error + layer_weight * inside
    return total
