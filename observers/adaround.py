"""Learned rounding: each weight chooses between the codes below and above it (AdaRound, arXiv 2004.10568).

DMQ (arXiv 2507.12933) and EDA-DM (arXiv 2401.04585) round their weights so.
"""

import torch
from torch import Tensor

from dmq_ao import numerics

# The sigmoid is stretched beyond [0, 1] and clipped, so that 0 and 1 are reached (section 3.2 of the paper).
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1


def soft_round(logits: Tensor) -> Tensor:
    """``h = clip(1.2 * sigmoid(logits) - 0.1, 0, 1)`` of logits [out, ...], elementwise."""
    return torch.clamp(torch.sigmoid(logits) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


def initial_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """Logits [out, ...] at which ``soft_round`` is the fractional part of ``weight / scale``: nothing changes yet."""
    ratio = weight / scale
    fraction = ratio - torch.floor(ratio)
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (fraction - STRETCH_LOW) - 1)


def soft_codes(
    weight: Tensor, logits: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> Tensor:
    """``clamp(floor(weight / scale) + soft_round(logits) + zero_point)``, differentiable in ``logits``.

    Args:
        weight: [out, ...] float.
        logits: of the same shape.
        scale: broadcasts against ``weight``, and so does ``zero_point``.
        zero_point: integer codes.
        bits: width of a code.
        symmetric: signed codes.

    Returns:
        [out, ...] float codes.
    """
    codes = torch.floor(weight / scale) + soft_round(logits) + zero_point
    return torch.clamp(codes, *numerics.code_range(bits, symmetric))


def hard_codes(
    weight: Tensor, logits: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> Tensor:
    """``soft_codes`` [out, ...] with each rounding decided: up where the logit is 0 or more."""
    codes = torch.floor(weight / scale) + (logits >= 0) + zero_point
    return torch.clamp(codes, *numerics.code_range(bits, symmetric))
