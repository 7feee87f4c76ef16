"""A layer as rows: inputs of sampled output positions, and what the teacher makes of them.

Every layer, convolution or linear, is a product of rows: the inputs of one output position and the flattened weight.
Learning on some positions of each sample costs a fraction of whole feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmq_ao.objectives import output_error


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Sampled positions of a layer's input and what the teacher makes of them.

    Attributes:
        x: [N, positions, groups, K / groups] inputs.
        y: [N, positions, out] outputs wanted, bias excluded.
        step: [N] place of each sample on the sampler's list of steps.
        holdout: [N] bool, samples that nothing is fitted to.
    """

    x: Tensor
    y: Tensor
    step: Tensor
    holdout: Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """SampledRows ``x`` [..., groups, K / groups] times ``weight`` [out, ...], giving [..., out]."""
    groups = x.shape[-2]
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    result: Tensor = torch.einsum("...gk,gok->...go", x, rows).flatten(-2)
    return result


def held_out_error(rows: SampledRows, weight: Tensor, bias: Tensor | None) -> float:
    """Error of a ``weight`` [out, ...] and ``bias`` [out] on held-out samples, relative to each sample's output."""
    holdout = torch.nonzero(rows.holdout)[:, 0]
    y = product(rows.x[holdout], weight)
    targets = rows.y[holdout]
    error = output_error(y if bias is None else y + bias, targets, -1)
    return float((error / output_error(targets, torch.zeros_like(targets), -1).clamp_min(1e-20)).mean())
