"""Learned equivalent scaling: ``(x / scale) @ (weight * scale)`` is the same layer, only easier to quantize.

While the scale is learned both sides are quantized with steps computed from the live tensors, and the gradient flows
through the step as well as through the straight-through rounding (DMQ, arXiv 2507.12933, learned equivalent scaling;
folded into codes as in eq. 10 to 11 and 22 to 24).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmq_ao import numerics


def round_ste(x: Tensor) -> Tensor:
    """Round ``x`` [...]; the gradient passes as if nothing had happened (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def fake_quantize_ste(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Fake quantization of ``x`` [...] on the range ``[low, high]``, which broadcasts; differentiable in all three.

    The step is a function of the range; zero points are integers, hence constants; values beyond the range pass no
    gradient of their own. Zero is in the range, as everywhere (``numerics.choose_qparams``).
    """
    quant_min, quant_max = numerics.code_range(bits, symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / quant_max).clamp_min(numerics.EPS)
        zero_point = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(numerics.EPS)
        zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max).detach()
    values: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
    return values


class _FakeQuantize(torch.autograd.Function):
    """``(clamp(round_ste(x / scale) + zero_point) - zero_point) * scale`` in few passes over memory; keeps ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.limits = quant_min, quant_max
        codes = (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        place = x / scale
        codes = torch.round(place).add_(zero_point)
        inside = (codes >= ctx.limits[0]) & (codes <= ctx.limits[1])
        for_x = gradients[0] * inside
        for_scale = codes.clamp_(*ctx.limits).sub_(zero_point).mul_(gradients[0]).addcmul_(for_x, place, value=-1)
        return for_x, for_scale.sum_to_size(scale.shape), None, None, None


def spread(channel_scale: Tensor, out: int, taps: int, groups: int = 1) -> Tensor:
    """A scale per input channel [C] as factors of a weight's rows [out, C / groups * taps]."""
    per_group = channel_scale.reshape(groups, -1).repeat_interleave(taps, 1)
    return per_group.repeat_interleave(out // groups, 0)


def closed_form(input_peak: Tensor, weight_peak: Tensor, migration: float, limit: float) -> Tensor:
    """``input_peak**migration / weight_peak**(1 - migration)`` per channel, of geometric mean 1 (SmoothQuant, eq. 4).

    Args:
        input_peak: [C] largest absolute input of each channel.
        weight_peak: [C] largest absolute weight of each channel.
        migration: how much of the inputs' spread moves to the weights.
        limit: results stay in ``[1 / limit, limit]``; a channel without input or weight gets 1.
    """
    alive = (input_peak > 0) & (weight_peak > 0)
    ratio = input_peak.clamp_min(numerics.EPS).log() * migration
    ratio = ratio - weight_peak.clamp_min(numerics.EPS).log() * (1 - migration)
    centre = ratio[alive].mean() if bool(alive.any()) else ratio.new_zeros(())
    log_limit = torch.log(torch.tensor(limit))
    return torch.where(alive, (ratio - centre).clamp(-log_limit, log_limit).exp(), 1.0)
