"""What one layer learns from sampled positions of its inputs: channel scales, codes, bias.

Every layer, convolution or linear, is a product of rows: the inputs of one output position and the flattened weight.
Learning on some positions of each sample costs a fraction of whole feature maps. A part of the samples is held out:
it stops the learning and decides whether what was learned is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.algorithms.moments import Moments
from dmq_ao.config import ChannelScaling, Init, Rounding, TensorConfig
from dmq_ao.objectives import StepWeighting, output_error, rounding_regularizer, temperature
from dmq_ao.observers import RangeEstimator, quantize_weight
from dmq_ao.observers.adaround import hard_codes, initial_logits, soft_codes, soft_round
from dmq_ao.observers.channel_scale import closed_form, fake_quantize_ste, spread
from dmq_ao.observers.error_feedback import damp, factor, round_with_feedback
from dmq_ao.records import WeightRecord

CHECK_EVERY = 20
HELD_OUT_SHARE = 8
# Of the mean square of a layer's inputs: what varies by less than about 3e-5 of itself is the noise of float32.
_SMALLEST_VARIANCE = 1e-9


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Sampled positions of a layer's input and what the teacher makes of them.

    Attributes:
        x: [N, positions, groups, K / groups] inputs.
        y: [N, positions, out] outputs wanted, bias excluded.
        step: [N] place of each sample on the sampler's list of steps.
        held: [N] bool, samples that nothing is fitted to.
    """

    x: Tensor
    y: Tensor
    step: Tensor
    held: Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """SampledRows ``x`` [..., groups, K / groups] times ``weight`` [out, ...], giving [..., out]."""
    groups = x.shape[-2]
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    result: Tensor = torch.einsum("...gk,gok->...go", x, rows).flatten(-2)
    return result


def held_out(count: int, generator: torch.Generator) -> Tensor:
    """[count] bool: one sample in eight, at least one; a single sample is both fitted and held out."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: max(1, count // HELD_OUT_SHARE)]] = True
    return mask


def fitted(held: Tensor) -> Tensor:
    """Indices of the samples that may be fitted to."""
    return torch.nonzero(~held)[:, 0] if len(held) > 1 else torch.arange(1)


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
    chosen: Tensor,
    channels: dict[int, Tensor] | None = None,
    *,
    batch_ranges: bool = False,
) -> Tensor:
    """Error [len(chosen)] of a unit's outputs when inputs and weights are quantized after scaling.

    Ranges are those of each whole sample (or of all chosen ones), min to max, and the weights' min to max per output
    channel; both follow the scale, and the gradient goes through them (DMQ, LES). Parts of one split layer add to one
    output. ``channels`` names the output channels to look at, by output; all where it does not.
    """
    results: dict[int, Tensor] = {}
    wanted: dict[int, Tensor] = {}
    for given, scale in zip(inputs, scales, strict=True):
        low, high = (given.low[chosen] / scale).amin(1), (given.high[chosen] / scale).amax(1)
        if batch_ranges:
            low, high = low.amin().expand(len(chosen)), high.amax().expand(len(chosen))
        for output, weight, config, rows in given.members:
            x, target = rows.x[chosen], rows.y[chosen]
            if channels is not None and output in channels:
                weight, target = weight[channels[output]], target[..., channels[output]]
            groups, taps = x.shape[2], weight[0, 0].numel()
            divisor = scale.reshape(groups, -1).repeat_interleave(taps, 1)
            ends = (numerics.along(low, 0, 4), numerics.along(high, 0, 4))
            x = fake_quantize_ste(x / divisor, *ends, given.activation.bits, False)
            scaled = weight.flatten(1) * spread(scale, len(weight), taps, groups)
            ends = (scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True))
            y = product(x, fake_quantize_ste(scaled, *ends, config.bits, config.symmetric))
            results[output] = results[output] + y if output in results else y
            wanted[output] = wanted[output] + target if output in wanted else target
    errors = [output_error(results[output], wanted[output], -1) for output in results]
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
    held, fit = torch.nonzero(rows.held)[:, 0], fitted(rows.held)
    weighting = StepWeighting(config.step_weights, steps)
    starts = _starts(inputs, config)
    learned = [(start.log() if config.logarithm else start).requires_grad_() for start in starts]
    bound = math.log(config.limit)
    seen = _some_channels(inputs, config.outputs, generator)

    def scales() -> list[Tensor]:
        return [one.exp() if config.logarithm else one for one in learned]

    def check() -> float:
        # Relative to no scale, sample by sample: every held-out timestep counts alike.
        return float((scaled_error(inputs, scales(), held, seen) / reference).mean())

    with torch.no_grad():
        reference = scaled_error(inputs, [torch.ones_like(start) for start in starts], held, seen).clamp_min(1e-20)
        best, kept = check(), [scale.detach().clone() for scale in scales()]
    optimizer = torch.optim.Adam(learned, lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(config.steps, 1))
    patience, taken = config.patience, 0
    for taken in range(1, config.steps + 1):
        chosen = fit[torch.randperm(len(fit), generator=generator)[: config.batch_size]]
        channels = _some_channels(inputs, config.outputs, generator)
        error = scaled_error(inputs, scales(), chosen, channels, batch_ranges=config.batch_ranges)
        loss = (weighting(error, rows.step[chosen]) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for one in learned:
                one.clamp_(*((-bound, bound) if config.logarithm else (1 / config.limit, config.limit)))
            if taken % CHECK_EVERY == 0 or taken == config.steps:
                now = check()
                patience = config.patience if now < best else patience - 1
                if now < best:
                    best, kept = now, [scale.detach().clone() for scale in scales()]
                if patience == 0:
                    break
    if not best < 1:
        return ScaleOutcome([None] * len(inputs), 1.0, 1.0, taken)
    return ScaleOutcome(list(kept), 1.0, best, taken)


def _some_channels(inputs: Sequence[ScaledInput], count: int, generator: torch.Generator) -> dict[int, Tensor]:
    """Output channels drawn for each output that has more than ``count``; grouped layers keep all."""
    drawn: dict[int, Tensor] = {}
    for given in inputs:
        for output, weight, _, rows in given.members:
            if output not in drawn and len(weight) > count and rows.x.shape[2] == 1:
                drawn[output] = torch.randperm(len(weight), generator=generator)[:count]
    return drawn


def _starts(inputs: Sequence[ScaledInput], config: ChannelScaling) -> list[Tensor]:
    starts = []
    for given in inputs:
        peak = torch.maximum(given.high.amax(0), -given.low.amin(0))
        if config.init is Init.ONES:
            starts.append(torch.ones_like(peak))
            continue
        weights = torch.stack([numerics.input_peak(weight, rows.x.shape[2]) for _, weight, _, rows in given.members])
        starts.append(closed_form(peak, weights.amax(0), config.migration, config.limit))
    return starts


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
    moved, covariances = [], []
    for part, one in zip(parts, moments, strict=True):
        covariance = damp(one.covariance(), rounding.damping, _SMALLEST_VARIANCE * one.mean_square())
        if rounding.compensate:
            shift = torch.cholesky_solve(one.centred_rx().T, factor(covariance))
            part = part + shift.T.to(part.dtype)
        moved.append(part)
        covariances.append(covariance)
    target = torch.cat(moved)
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
            for part, covariance, where in zip(moved, covariances, rows, strict=True)
        ]
    )
    scale = grid.scale
    if scale.shape[1] == 1:
        scale = torch.cat(
            [
                refit_scale(part, codes[where] - grid.zero_point[where], scale[where], covariance)
                for part, covariance, where in zip(moved, covariances, rows, strict=True)
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
    wanted = (product_q * weight).sum(1, keepdim=True) / (product_q * centred).sum(1, keepdim=True).clamp_min(1e-12)
    sane = (wanted > 0.75 * scale) & (wanted < 1.25 * scale)
    return torch.where(sane, wanted, scale).float()


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
    fit = fitted(rows.held)
    arguments = (scale, zero_point, config.bits, config.symmetric)
    for step in range(1, rounding.steps + 1):
        chosen = fit[torch.randperm(len(fit), generator=generator)[: rounding.batch_size]]
        values = numerics.dequantize_affine(soft_codes(flat, logits, *arguments), scale, zero_point)
        error = output_error(product(rows.x[chosen], values), rows.y[chosen], -1)
        loss = (weighting(error, rows.step[chosen]) * error).mean()
        if step > rounding.warmup * rounding.steps:
            beta = temperature(step, rounding.steps, rounding.warmup)
            loss = loss + rounding.regularizer * rounding_regularizer(soft_round(logits), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = hard_codes(flat, logits.detach(), *arguments)
    return replace(grid, codes=codes.reshape(out, *weight.shape[1:]).to(grid.codes.dtype))


def own_correction(weight: Tensor, record: WeightRecord, moments: Sequence[Moments]) -> Tensor:
    """What takes the mean error of the codes themselves out of the output: [out]."""
    difference = (record.dequantize() - weight).flatten(1).chunk(len(moments))
    return -torch.cat([part @ one.mean_x().to(part.dtype) for part, one in zip(difference, moments, strict=True)])


def correction(weight: Tensor, record: WeightRecord, moments: Sequence[Moments]) -> Tensor:
    """What to add to the bias so that the mean output is the teacher's: [out], weighted as the moments are."""
    return torch.cat([one.mean_r() for one in moments]).float() + own_correction(weight, record, moments)


def held_out_error(rows: SampledRows, weight: Tensor, bias: Tensor | None) -> float:
    """Error of a weight on held-out samples, relative to the teacher's output of each sample."""
    held = torch.nonzero(rows.held)[:, 0]
    y = product(rows.x[held], weight)
    wanted = rows.y[held]
    error = output_error(y if bias is None else y + bias, wanted, -1)
    return float((error / output_error(wanted, torch.zeros_like(wanted), -1).clamp_min(1e-20)).mean())
