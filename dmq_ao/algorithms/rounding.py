"""Codes of one layer's weight: by error feedback on the moments of its inputs, or learned from sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.algorithms.holdout import fitted
from dmq_ao.algorithms.moments import Moments
from dmq_ao.algorithms.sampled_rows import SampledRows, product
from dmq_ao.config import Rounding, TensorConfig
from dmq_ao.objectives import StepWeighting, output_error, rounding_regularizer, temperature
from dmq_ao.observers import RangeEstimator, quantize_weight
from dmq_ao.observers.adaround import hard_codes, initial_logits, soft_codes, soft_round
from dmq_ao.observers.error_feedback import damp, factor, round_with_feedback
from dmq_ao.records import WeightRecord

# Of the mean square of a layer's inputs: what varies by less than about 3e-5 of itself is the noise of float32.
_SMALLEST_VARIANCE = 1e-9


def round_by_feedback(
    weight: Tensor,
    config: TensorConfig,
    estimator: type[RangeEstimator],
    moments: Sequence[Moments],
    rounding: Rounding,
    channel_bits: Tensor | None = None,
) -> WeightRecord:
    """Codes of ``weight`` [out, ...] by error feedback, on a grid fitted to them.

    With ``compensate`` the weight first moves to the ridge solution that undoes the network's error so far:
    ``weight + R X (X X + damping)^-1`` for residuals R, the part of the output that quantized inputs lose. Along
    directions in which the inputs never varied nothing moves, and nothing is fed back.

    Args:
        weight: channel scale multiplied in.
        config: width and granularity.
        estimator: of the weight's range.
        moments: of the inputs, one a group.
        rounding: damping and the like.
        channel_bits: [out], a width for each output channel; None for ``config.bits``.
    """
    parts = weight.flatten(1).chunk(len(moments))
    targets, covariances = [], []
    for part, one in zip(parts, moments, strict=True):
        covariance = damp(one.covariance(), rounding.damping, _SMALLEST_VARIANCE * one.mean_square())
        if rounding.compensate:
            shift = torch.cholesky_solve(one.centred_rx().T, factor(covariance))
            part = part + shift.T.to(part.dtype)
        targets.append(part)
        covariances.append(covariance)
    target = torch.cat(targets)
    grid = quantize_weight(target.reshape(weight.shape), config, estimator, channel_bits)
    rows = [slice(i * len(parts[0]), (i + 1) * len(parts[0])) for i in range(len(parts))]
    codes = torch.cat(
        [
            round_with_feedback(
                part,
                covariance,
                grid.scale[where],
                grid.zero_point[where],
                config.bits if channel_bits is None else channel_bits[where],
                config.symmetric,
            )
            for part, covariance, where in zip(targets, covariances, rows, strict=True)
        ]
    )
    scale = grid.scale
    if scale.shape[1] == 1:
        scale = torch.cat(
            [
                refit_scale(part, codes[where] - grid.zero_point[where], scale[where], covariance)
                for part, covariance, where in zip(targets, covariances, rows, strict=True)
            ]
        )
    return replace(grid, codes=codes.reshape(weight.shape).to(grid.codes.dtype), scale=scale)


def refit_scale(weight: Tensor, centred: Tensor, scale: Tensor, covariance: Tensor) -> Tensor:
    """The scale [out, 1] at which given codes come closest to ``weight`` [out, K] on inputs of this ``covariance``.

    Least squares per output channel, ``(w H q) / (q H q)``; a channel that would move by more than a quarter keeps its
    scale.
    """
    centred = centred.to(weight.dtype)
    product_q = centred @ covariance.to(weight.dtype)
    optimum = (product_q * weight).sum(1, keepdim=True) / (product_q * centred).sum(1, keepdim=True).clamp_min(1e-12)
    sane = (optimum > 0.75 * scale) & (optimum < 1.25 * scale)
    return torch.where(sane, optimum, scale).float()


def round_by_learning(
    weight: Tensor,
    config: TensorConfig,
    estimator: type[RangeEstimator],
    rows: SampledRows,
    rounding: Rounding,
    steps: int,
    generator: torch.Generator,
) -> WeightRecord:
    """Codes of ``weight`` [out, ...] by AdaRound on sampled positions: output error plus regulariser."""
    grid = quantize_weight(weight, config, estimator)
    out = len(weight)
    scale, zero_point = (
        t.repeat_interleave(weight[0].numel() // t.shape[1], 1).float() for t in (grid.scale, grid.zero_point)
    )
    flat = weight.flatten(1)
    logits = initial_logits(flat, scale).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rounding.lr)
    weighting = StepWeighting(rounding.step_weights, steps)
    fit = fitted(rows.holdout)
    arguments = (scale, zero_point, config.bits, config.symmetric)
    for step in range(1, rounding.steps + 1):
        batch = fit[torch.randperm(len(fit), generator=generator)[: rounding.batch_size]]
        values = numerics.dequantize_affine(soft_codes(flat, logits, *arguments), scale, zero_point)
        error = output_error(product(rows.x[batch], values), rows.y[batch], -1)
        loss = (weighting(error, rows.step[batch]) * error).mean()
        if step > rounding.warmup * rounding.steps:
            beta = temperature(step, rounding.steps, rounding.warmup)
            loss = loss + rounding.regularizer * rounding_regularizer(soft_round(logits), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = hard_codes(flat, logits.detach(), *arguments)
    return replace(grid, codes=codes.reshape(out, *weight.shape[1:]).to(grid.codes.dtype))
