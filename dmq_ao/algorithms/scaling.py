"""Learned equivalent scaling of one unit: scales of input channels, from sampled rows (DMQ, LES).

A part of the samples is held out: it stops the learning and decides whether the scales are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.algorithms.holdout import CHECK_EVERY, fitted
from dmq_ao.algorithms.sampled_rows import SampledRows, product
from dmq_ao.config import ChannelScaling, Init, TensorConfig
from dmq_ao.objectives import StepWeighting, output_error
from dmq_ao.observers.channel_scale import closed_form, fake_quantize_ste, spread


@dataclass(frozen=True, eq=False)
class ScaledInput:
    """One input tensor of a unit, whose channels get scales.

    Attributes:
        low: [N, C] smallest value of each channel in each sample.
        high: [N, C] likewise.
        activation: how it is quantized.
        members: the layers that read it: index of the output they add to, weight [out, C / groups, ...], how it is
            quantized, its rows.
    """

    low: Tensor
    high: Tensor
    activation: TensorConfig
    members: Sequence[tuple[int, Tensor, TensorConfig, SampledRows]]


@dataclass(frozen=True, eq=False)
class ScaleOutcome:
    """Learned scales, one per input of the unit; None where one is better.

    Attributes:
        scales: [C] each, or None.
        before: held-out error with all scales at one.
        after: with the scales that were kept.
        steps: gradient steps taken.
    """

    scales: list[Tensor | None]
    before: float
    after: float
    steps: int


def scaled_error(
    inputs: Sequence[ScaledInput],
    scales: Sequence[Tensor],
    batch: Tensor,
    channels: dict[int, Tensor] | None = None,
    *,
    batch_ranges: bool = False,
) -> Tensor:
    """Error [B] of a unit's outputs when inputs and weights are quantized after scaling.

    ``batch`` [B] are numbers of samples. Ranges are those of each whole sample (with ``batch_ranges``, of the batch),
    min to max, and the weights' min to max per output channel; both follow the scale, and the gradient goes through
    them (DMQ, LES). Parts of one split layer add to one output. ``channels`` names the output channels to look at, by
    output; all where it does not.
    """
    results: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}
    for source, scale in zip(inputs, scales, strict=True):
        low, high = (source.low[batch] / scale).amin(1), (source.high[batch] / scale).amax(1)
        if batch_ranges:
            low, high = low.amin().expand(len(batch)), high.amax().expand(len(batch))
        for output, weight, config, rows in source.members:
            x, target = rows.x[batch], rows.y[batch]
            if channels is not None and output in channels:
                weight, target = weight[channels[output]], target[..., channels[output]]
            groups, taps = x.shape[2], weight[0, 0].numel()
            divisor = scale.reshape(groups, -1).repeat_interleave(taps, 1)
            ends = (numerics.along(low, 0, 4), numerics.along(high, 0, 4))
            x = fake_quantize_ste(x / divisor, *ends, source.activation.bits, False)
            scaled = weight.flatten(1) * spread(scale, len(weight), taps, groups)
            ends = (scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True))
            y = product(x, fake_quantize_ste(scaled, *ends, config.bits, config.symmetric))
            results[output] = results[output] + y if output in results else y
            targets[output] = targets[output] + target if output in targets else target
    errors = [output_error(results[output], targets[output], -1) for output in results]
    return torch.stack(errors).sum(0)


def learn_scales(
    inputs: Sequence[ScaledInput], config: ChannelScaling, steps: int, generator: torch.Generator
) -> ScaleOutcome:
    """Learn the channel scales of a unit: layers that share an input, or the parts of a split layer.

    Args:
        inputs: of the unit.
        config: of the learning.
        steps: length of the sampler's list of steps.
        generator: draws the batches.

    Returns:
        What was best on held-out samples: no scale, the closed form, or a stage of the learning.
    """
    rows = inputs[0].members[0][3]
    holdout, fit = torch.nonzero(rows.holdout)[:, 0], fitted(rows.holdout)
    weighting = StepWeighting(config.step_weights, steps)
    starts = _starts(inputs, config)
    parameters = [(start.log() if config.logarithm else start).requires_grad_() for start in starts]
    bound = math.log(config.limit)
    check_channels = _some_channels(inputs, config.outputs, generator)

    def scales() -> list[Tensor]:
        return [one.exp() if config.logarithm else one for one in parameters]

    def check() -> float:
        # Relative to no scale, sample by sample: every held-out timestep counts alike.
        return float((scaled_error(inputs, scales(), holdout, check_channels) / reference).mean())

    with torch.no_grad():
        reference = scaled_error(
            inputs, [torch.ones_like(start) for start in starts], holdout, check_channels
        ).clamp_min(1e-20)
        best, best_scales = check(), [scale.detach().clone() for scale in scales()]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(config.steps, 1))
    patience, step = config.patience, 0
    for step in range(1, config.steps + 1):
        batch = fit[torch.randperm(len(fit), generator=generator)[: config.batch_size]]
        channels = _some_channels(inputs, config.outputs, generator)
        error = scaled_error(inputs, scales(), batch, channels, batch_ranges=config.batch_ranges)
        loss = (weighting(error, rows.step[batch]) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for one in parameters:
                one.clamp_(*((-bound, bound) if config.logarithm else (1 / config.limit, config.limit)))
            if step % CHECK_EVERY == 0 or step == config.steps:
                now = check()
                patience = config.patience if now < best else patience - 1
                if now < best:
                    best, best_scales = now, [scale.detach().clone() for scale in scales()]
                if patience == 0:
                    break
    if not best < 1:
        return ScaleOutcome([None] * len(inputs), 1.0, 1.0, step)
    return ScaleOutcome(list(best_scales), 1.0, best, step)


def _some_channels(inputs: Sequence[ScaledInput], count: int, generator: torch.Generator) -> dict[int, Tensor]:
    """Output channels drawn for each output that has more than ``count``; grouped layers keep all."""
    channels: dict[int, Tensor] = {}
    for source in inputs:
        for output, weight, _, rows in source.members:
            if output not in channels and len(weight) > count and rows.x.shape[2] == 1:
                channels[output] = torch.randperm(len(weight), generator=generator)[:count]
    return channels


def _starts(inputs: Sequence[ScaledInput], config: ChannelScaling) -> list[Tensor]:
    starts = []
    for source in inputs:
        peak = torch.maximum(source.high.amax(0), -source.low.amin(0))
        if config.init is Init.ONES:
            starts.append(torch.ones_like(peak))
            continue
        weights = torch.stack([numerics.input_peak(weight, rows.x.shape[2]) for _, weight, _, rows in source.members])
        starts.append(closed_form(peak, weights.amax(0), config.migration, config.limit))
    return starts
