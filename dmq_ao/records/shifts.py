"""Power-of-two exponents of the input as shifts of the weight's codes (DMQ, arXiv 2507.12933, eq. 13 and 28 to 29)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.records.record import WeightRecord


def channel_shifts(exponents: Tensor, groups: int = 1) -> Tensor:
    """How far codes of each input channel are shifted left to have the finest step: [groups, channels / groups]."""
    return (exponents.max() - exponents).to(torch.int32).reshape(groups, -1)


def shifted_codes(weight: WeightRecord, exponents: Tensor | None, groups: int = 1) -> tuple[Tensor, int]:
    """Weight codes less their zero point, shifted left so that every input channel has the layer's finest step.

    Args:
        weight: one scale per output channel.
        exponents: [channels] of the layer's input, or None.
        groups: of a grouped convolution, whose weight is [out, channels / groups, ...].

    Returns:
        Codes of the weight's shape, int8 where all fit and else int16, and the largest exponent D; a channel of
        exponent e is shifted by ``D - e``.
    """
    codes = weight.codes
    largest = 0 if exponents is None else int(exponents.max())
    dtype = torch.int8 if shift_fits_int8(weight.bits, weight.symmetric, largest) else torch.int16
    values = codes.to(dtype, copy=True)  # the one copy: weights are the most of a model's memory
    if not weight.symmetric:
        values.sub_(numerics.along(weight.zero_point[:, 0], 0, codes.dim()).to(dtype))
    if exponents is None:
        return values, 0
    shifts = channel_shifts(exponents, groups).to(dtype).repeat_interleave(codes.shape[0] // groups, 0)
    return values.bitwise_left_shift_(shifts.reshape(*codes.shape[:2], *[1] * (codes.dim() - 2))), largest


def shift_fits_int8(bits: int, symmetric: bool, largest_exponent: int) -> bool:
    """Whether every shifted code of this width is an int8 (composition of methods, width table)."""
    return bits + largest_exponent <= (8 if symmetric else 7)
