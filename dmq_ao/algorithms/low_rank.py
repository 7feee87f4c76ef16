"""Codes of a weight that move by a low-rank update (MPQ-DM, arXiv 2412.11549; EfficientDM, arXiv 2310.03270).

The update is added to the float weight and both are rounded together, so what is learned is other codes: no branch is
left at run time. It counts in steps of the weight's grid, as it stood when the update was zero.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.records import WeightRecord

# The float weight starts no closer to the border of its code's cell than this, in steps.
_MARGIN = 0.01


class LowRankCodes:
    """One weight on the grid that was decided, whose codes move by the product of two factors."""

    def __init__(self, weight: Tensor, record: WeightRecord) -> None:
        """Every element moves to the nearest point at which it has the code that was decided for it.

        Args:
            weight: [out, ...] float, channel scale multiplied in.
            record: its codes.
        """
        self.record = record
        self._zero_point = record.zero_point.unsqueeze(-1)
        centred = self._grouped(record.codes).float() - self._zero_point
        place = self._grouped(weight).float() / record.scale.unsqueeze(-1)
        self._start = centred + (place - centred).clamp(_MARGIN - 0.5, 0.5 - _MARGIN)
        self._limits = numerics.RowLimits.of(record.row_bits, record.symmetric, place)
        if self._limits.one_bit is not None:  # the codes are signs, and a cell has one end
            signs = centred.sign() * (place * centred.sign()).clamp_min(_MARGIN)
            self._start = torch.where(self._limits.one_bit, signs, self._start)
        ends = torch.tensor([-1e6, 1e6], device=weight.device).expand(*record.scale.shape, 2)
        self._low, self._high = (self._codes(ends) - self._zero_point).split(1, -1)

    def factors(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors to begin with, float32: zeros [out, rank], by which no code moves, and a draw [rank, K].

        K are the inputs of an output channel, convolution taps among them. The draw is uniform within ``1 / sqrt(K)``
        (Kaiming, as published). A ``rank`` above that of the weight is of no use, and is lowered to it.
        """
        rows, inputs = self.record.codes.flatten(1).shape
        rank, bound = min(rank, rows, inputs), 1 / math.sqrt(inputs)
        up = self._start.new_zeros(rows, rank)
        return up, torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator).to(up.device)

    def _grouped(self, x: Tensor) -> Tensor:
        """[out, groups, n], elements that share a scale together."""
        return x.reshape(*self.record.scale.shape, -1)

    def _codes(self, place: Tensor) -> Tensor:
        """Codes as float32 of values counted in steps, [out, groups, n]."""
        return numerics.quantize_rows(place, torch.ones((), device=place.device), self._zero_point, self._limits)

    def _place(self, up: Tensor, down: Tensor) -> Tensor:
        return self._start + self._grouped(up @ down)

    def values(self, scale: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The float32 weight [out, ...] that the moved codes stand for.

        ``scale`` [out, groups] has the gradient it has for fixed codes; the factors have that of the weight as if it
        were not rounded, none where it is beyond the last code.
        """
        place = self._place(up, down)
        codes = self._codes(place.detach())
        inside = (place >= self._low - 0.5) & (place <= self._high + 0.5)
        codes = codes.to(self.record.codes.dtype)
        values: Tensor = _Moved.apply(scale, place, codes, self._zero_point, inside)  # type: ignore[no-untyped-call]
        return values.reshape(self.record.codes.shape)

    def merged(self, up: Tensor, down: Tensor) -> WeightRecord:
        """The record with the codes as the factors ``up`` [out, rank] and ``down`` [rank, K] move them."""
        codes = self._codes(self._place(up, down)).to(self.record.codes.dtype)
        return replace(self.record, codes=codes.reshape(self.record.codes.shape))


class _Moved(torch.autograd.Function):
    """Values of codes, with a gradient for ``scale`` and for the ``place`` that was rounded; keeps no floats of it."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, place: Tensor, codes: Tensor, zero_point: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(scale, codes, zero_point, inside)
        return numerics.dequantize_affine(codes, scale.unsqueeze(-1), zero_point)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        scale, codes, zero_point, inside = ctx.saved_tensors
        for_scale = (gradients[0] * (codes.float() - zero_point)).sum(-1)
        return for_scale, gradients[0] * scale.unsqueeze(-1) * inside, None, None, None
