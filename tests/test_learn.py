"""What a layer learns from rows: scales that help or none, codes in range, a scale and a bias that are optimal."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.algorithms.bias_correction import correction, own_correction
from dmq_ao.algorithms.holdout import fitted, held_out
from dmq_ao.algorithms.moments import Moments
from dmq_ao.algorithms.rounding import refit_scale, round_by_feedback, round_by_learning
from dmq_ao.algorithms.sampled_rows import SampledRows, held_out_error, product
from dmq_ao.algorithms.scaling import ScaledInput, ScaleOutcome, learn_scales, scaled_error
from dmq_ao.config import (
    ChannelScaling,
    Granularity,
    Init,
    Reduce,
    Rounding,
    RoundingMethod,
    StepWeights,
    TensorConfig,
    Weighting,
)
from dmq_ao.numerics import choose_qparams, code_range, fake_quantize
from dmq_ao.observers import MSE, MinMax, quantize_weight
from dmq_ao.observers.error_feedback import damp

SEEDS = st.integers(0, 2**31)
SAMPLES, POSITIONS, STEPS = 32, 4, 4
W4 = TensorConfig(4, Granularity.PER_CHANNEL)
A6 = TensorConfig(6)
SCALING = ChannelScaling(steps=40, positions=POSITIONS, batch_size=8, lr=5e-2)
BOTH = pytest.mark.parametrize("groups", [1, 2])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(x: Tensor, weight: Tensor, groups: int = 1) -> SampledRows:
    """SampledRows of a layer whose inputs ``x`` are [N, positions, K]; every eighth sample is held out."""
    grouped = x.unflatten(-1, (groups, -1))
    held = torch.arange(len(x)) % 8 == 7
    return SampledRows(grouped, product(grouped, weight), torch.arange(len(x)) % STEPS, held)


def uneven(channels: int = 8, out: int = 6, groups: int = 1, even: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs with a few large channels, weights that are small there."""
    torch.manual_seed(0)
    sizes = torch.ones(channels) if even else torch.tensor([20.0, 1.0, 1.0, 5.0] * (channels // 4))
    x = torch.randn(SAMPLES, POSITIONS, channels) * sizes
    weight = torch.randn(groups * out, channels // groups)
    return x, weight / sizes.reshape(groups, -1).repeat_interleave(out, 0)


def scaled_input(
    x: Tensor, weight: Tensor, groups: int = 1, output: int = 0, activation: TensorConfig = A6
) -> ScaledInput:
    return ScaledInput(x.amin(1), x.amax(1), activation, [(output, weight, W4, rows_of(x, weight, groups))])


def error_of(x: Tensor, weight: Tensor, scale: Tensor, groups: int = 1) -> list[float]:
    """The error of each sample, layer by layer and group by group in float64."""
    found, per = [], weight.shape[1]
    for sample in x.double():
        divided = sample / scale.double()
        qparams = choose_qparams(divided.amin().float(), divided.amax().float(), A6.bits, False)
        divided = fake_quantize(divided, *qparams, *code_range(A6.bits, False)).double()
        wanted, given_back = [], []
        for group, part in enumerate(weight.double().chunk(groups)):
            where = slice(group * per, (group + 1) * per)
            scaled = part * scale.double()[where]
            low, high = scaled.amin(1, keepdim=True).float(), scaled.amax(1, keepdim=True).float()
            values = fake_quantize(scaled, *choose_qparams(low, high, 4, False), 0, 15).double()
            given_back.append(divided[:, where] @ values.T)
            wanted.append(sample[:, where] @ part.T)
        found.append(float((torch.cat(given_back, 1) - torch.cat(wanted, 1)).square().sum(1).mean()))
    return found


# --- rows --------------------------------------------------------------------


@BOTH
def test_a_product_of_rows(groups: int) -> None:
    x, weight = torch.randn(3, 2, groups, 5, dtype=torch.float64), torch.randn(4 * groups, 5, dtype=torch.float64)
    parts = [x[:, :, g] @ part.T for g, part in enumerate(weight.chunk(groups))]
    assert torch.allclose(product(x, weight), torch.cat(parts, -1))
    assert torch.allclose(product(x[0], weight.reshape(-1, 5, 1, 1)), torch.cat(parts, -1)[0])


@given(st.integers(1, 200), SEEDS)
def test_one_in_eight_is_held_out(count: int, seed: int) -> None:
    mask = held_out(count, generator(seed))
    assert (mask.shape, mask.dtype) == ((count,), torch.bool)
    assert int(mask.sum()) == max(1, count // 8)
    assert torch.equal(mask, held_out(count, generator(seed)))
    fit = fitted(mask)
    assert len(fit) == (count - int(mask.sum()) if count > 1 else 1)
    assert count == 1 or not bool(mask[fit].any())


# --- channel scales ----------------------------------------------------------


@BOTH
def test_the_error_of_scaled_inputs_in_float64(groups: int) -> None:
    x, weight = uneven(groups=groups)
    scale = torch.rand(8) + 0.5
    found = scaled_error([scaled_input(x, weight, groups)], [scale], torch.arange(SAMPLES))
    assert found.tolist() == pytest.approx(error_of(x, weight, scale, groups), rel=2e-3)


@pytest.mark.parametrize("init", list(Init))
@BOTH
def test_scales_help_where_channels_are_uneven(groups: int, init: Init) -> None:
    x, weight = uneven(groups=groups)
    given_input = scaled_input(x, weight, groups)
    outcome = learn_scales([given_input], replace(SCALING, init=init), STEPS, generator())
    (scale,) = outcome.scales
    assert scale is not None
    assert scale.shape == (8,)
    assert bool((scale > 0).all())
    assert float(scale.max()) <= SCALING.limit * (1 + 1e-5)
    assert not scale.requires_grad
    held = torch.arange(7, SAMPLES, 8)
    now, before = (torch.tensor(error_of(x[held], weight, one, groups)) for one in (scale, torch.ones(8)))
    assert outcome.after < 0.6 * outcome.before
    assert outcome.after / outcome.before == pytest.approx(float((now / before).mean()), rel=5e-3)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(list(Init)), st.booleans(), st.booleans(), st.sampled_from([0, 5, 20, 21]))
def test_what_is_kept_is_never_worse_on_held_out_samples(
    seed: int, init: Init, even: bool, logarithm: bool, steps: int
) -> None:
    x, weight = uneven(even=even)
    x = x + torch.randn(x.shape, generator=generator(seed))
    config = replace(SCALING, init=init, steps=steps, lr=0.3, logarithm=logarithm, batch_ranges=not logarithm)
    given_input = scaled_input(x, weight)
    outcome = learn_scales([given_input], config, STEPS, generator(seed))
    assert outcome.after <= outcome.before
    assert outcome.steps <= steps
    if outcome.scales == [None]:
        assert outcome.after == outcome.before
        return
    held = torch.arange(7, SAMPLES, 8)
    kept, none = (scaled_error([given_input], [one], held) for one in (outcome.scales[0], torch.ones(8)))
    assert float((kept / none).mean()) == pytest.approx(outcome.after / outcome.before, rel=1e-4)
    assert outcome.after < outcome.before


@pytest.mark.parametrize("steps", [0, 40])
def test_no_scale_where_nothing_helps(steps: int) -> None:
    x = torch.randint(0, 64, (SAMPLES, POSITIONS, 4)).float()
    x[:, 0], x[:, 1] = 0, 63
    weight = torch.randint(0, 16, (6, 4)).float()
    weight[:, 0], weight[:, 1] = 0, 15
    outcome = learn_scales([scaled_input(x, weight)], replace(SCALING, steps=steps), STEPS, generator())
    assert (outcome.scales, outcome.before, outcome.after) == ([None], 1.0, 1.0)
    assert isinstance(outcome, ScaleOutcome)


def test_the_gradient_is_the_scales_alone() -> None:
    x, weight = uneven()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    given_input = scaled_input(x.detach(), weight.detach())
    scale = torch.ones(8, requires_grad=True)
    rows = given_input.members[0][3]
    scaled_error([given_input], [scale], torch.arange(8)).sum().backward()
    assert scale.grad is not None
    assert bool((scale.grad != 0).all())
    assert not rows.y.requires_grad
    with torch.enable_grad():
        learn_scales([given_input], replace(SCALING, steps=2), STEPS, generator())
    assert x.grad is weight.grad is rows.x.grad is rows.y.grad is given_input.low.grad is None


def test_parts_of_a_split_layer_add_to_one_output() -> None:
    x, weight = uneven(16)
    halves = [scaled_input(x[..., part], weight[:, part]) for part in (slice(0, 8), slice(8, 16))]
    ones, chosen = torch.ones(8), torch.arange(SAMPLES)
    together = scaled_error(halves, [ones, ones], chosen)
    wanted, found = torch.zeros(2, SAMPLES, POSITIONS, 6)
    for part in (slice(0, 8), slice(8, 16)):
        wanted += x[..., part] @ weight[:, part].T
        low, high = (end(x[..., part].flatten(1), 1, keepdim=True).unsqueeze(-1) for end in (torch.amin, torch.amax))
        values = fake_quantize(x[..., part], *choose_qparams(low, high, 6, False), 0, 63)
        low, high = (end(weight[:, part], 1, keepdim=True) for end in (torch.amin, torch.amax))
        found += values @ fake_quantize(weight[:, part], *choose_qparams(low, high, 4, False), 0, 15).T
    assert together.tolist() == pytest.approx((found - wanted).square().sum(-1).mean(-1).tolist(), rel=1e-3)
    apart = replace_output(halves[1], 1)
    alone = sum(scaled_error([half], [ones], chosen) for half in halves)
    assert torch.allclose(scaled_error([halves[0], apart], [ones, ones], chosen), alone)
    assert not torch.allclose(together, alone, rtol=0.01)


def replace_output(given_input: ScaledInput, output: int) -> ScaledInput:
    return replace(given_input, members=[(output, *member[1:]) for member in given_input.members])


def test_siblings_learn_one_scale() -> None:
    x, weight = uneven()
    other = torch.randn(3, 8)
    together = ScaledInput(
        x.amin(1),
        x.amax(1),
        A6,
        [(0, weight, W4, rows_of(x, weight)), (1, other, W4, rows_of(x, other))],
    )
    outcome = learn_scales([together], SCALING, STEPS, generator())
    (scale,) = outcome.scales
    assert scale is not None
    held = torch.arange(7, SAMPLES, 8)
    sums = [
        [a + b for a, b in zip(error_of(x[held], weight, one), error_of(x[held], other, one), strict=True)]
        for one in (scale, torch.ones(8))
    ]
    ratio = sum(a / b for a, b in zip(*sums, strict=True)) / len(held)
    assert outcome.after / outcome.before == pytest.approx(ratio, rel=5e-3)


def test_the_same_seed_learns_the_same_scales() -> None:
    x, weight = uneven()
    found = [learn_scales([scaled_input(x, weight)], SCALING, STEPS, generator(seed)).scales[0] for seed in (3, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("reduce", list(Reduce))
def test_some_output_channels_are_enough(reduce: Reduce) -> None:
    x, weight = uneven(out=20)
    config = replace(SCALING, outputs=5, step_weights=StepWeights(gamma=2.0, reduce=reduce))
    (scale,) = learn_scales([scaled_input(x, weight)], config, STEPS, generator()).scales
    assert scale is not None
    assert sum(error_of(x, weight, scale)) < 0.8 * sum(error_of(x, weight, torch.ones(8)))


# --- rounding ----------------------------------------------------------------


def moments_of(x: Tensor, lost: Tensor, groups: int = 1) -> list[Moments]:
    """Of rows [n, groups, K] and residuals [n, out]."""
    found = []
    for group, part in enumerate(lost.chunk(groups, 1)):
        one = Moments(x.shape[2], part.shape[1])
        one.update(x[:, group], part, torch.ones(len(x)))
        found.append(one)
    return found


def layer(groups: int = 1, out: int = 4, inputs: int = 12) -> tuple[Tensor, Tensor]:
    """Correlated rows [n, groups, K], not around zero, and a weight."""
    torch.manual_seed(1)
    mixed = torch.randn(groups, inputs, inputs)
    x = torch.einsum("ngk,gkj->ngj", torch.randn(400, groups, inputs), mixed + 2 * mixed[:, :1]) + 0.5
    return x, torch.randn(groups * out, inputs)


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        W4,
        TensorConfig(2, Granularity.PER_CHANNEL, symmetric=True),
        TensorConfig(3, Granularity.PER_GROUP, 4),
        TensorConfig(4, Granularity.PER_TENSOR),
        TensorConfig(8, Granularity.PER_CHANNEL, symmetric=True),
    ],
    ids=lambda config: f"{config.bits} {config.granularity.value}",
)


@CONFIGS
@BOTH
@pytest.mark.parametrize("compensate", [False, True])
def test_codes_by_feedback(config: TensorConfig, groups: int, compensate: bool) -> None:
    x, weight = layer(groups)
    lost = 0.1 * torch.randn(len(x), len(weight))
    record = round_by_feedback(weight, config, MSE, moments_of(x, lost, groups), Rounding(compensate=compensate))
    low, high = code_range(config.bits, config.symmetric)
    assert record.codes.shape == weight.shape
    assert record.codes.dtype is (torch.int8 if config.symmetric else torch.uint8)
    assert low <= int(record.codes.min())
    assert int(record.codes.max()) <= high
    assert (record.scale.dtype, record.zero_point.dtype) == (torch.float32, torch.int32)
    assert bool((record.scale > 0).all())
    centred = x - x.mean(0)
    nearest = quantize_weight(weight, config, MSE)
    noise = [(product(centred, one.dequantize() - weight)).square().mean() for one in (record, nearest)]
    assert noise[0] < noise[1]


def test_a_compensated_weight_makes_up_for_what_was_lost() -> None:
    x, weight = layer()
    missing = 0.3 * torch.randn(weight.shape)
    moments = moments_of(x, x[:, 0] @ missing.T)
    wide = TensorConfig(8, Granularity.PER_CHANNEL)
    record = round_by_feedback(weight, wide, MinMax, moments, Rounding(compensate=True, damping=1e-6))
    assert torch.allclose(record.dequantize(), weight + missing, atol=0.1)
    plain = round_by_feedback(weight, wide, MinMax, moments, Rounding(damping=1e-6))
    wanted = x[:, 0] @ (weight + missing).T
    noise = [(x[:, 0] @ one.dequantize().T - wanted).square().mean() for one in (record, plain)]
    assert noise[0] < 0.01 * noise[1]


@CONFIGS
@pytest.mark.parametrize("weighting", [Weighting.UNIFORM, Weighting.FOCAL])
def test_codes_by_learning(config: TensorConfig, weighting: Weighting) -> None:
    x, weight = layer()
    grouped = x.reshape(SAMPLES // 2, 25, 1, -1)
    held = torch.arange(len(grouped)) % 8 == 7
    data = SampledRows(grouped, product(grouped, weight), torch.arange(len(grouped)) % STEPS, held)
    rounding = Rounding(
        RoundingMethod.ADAROUND, steps=60, lr=5e-2, batch_size=4, step_weights=StepWeights(weighting, gamma=2.0)
    )
    record = round_by_learning(weight, config, MinMax, data, rounding, STEPS, generator())
    nearest = quantize_weight(weight, config, MinMax)
    low, high = code_range(config.bits, config.symmetric)
    assert low <= int(record.codes.min())
    assert int(record.codes.max()) <= high
    assert record.codes.dtype is nearest.codes.dtype
    assert int((record.codes.int() - nearest.codes.int()).abs().max()) <= 1
    assert torch.equal(record.scale, nearest.scale)
    assert torch.equal(record.zero_point, nearest.zero_point)
    again = round_by_learning(weight, config, MinMax, data, rounding, STEPS, generator())
    assert torch.equal(record.codes, again.codes)


def test_learned_codes_are_closer_than_the_nearest() -> None:
    x, weight = layer()
    grouped = x.reshape(SAMPLES // 2, 25, 1, -1)
    data = SampledRows(
        grouped, product(grouped, weight), torch.arange(16) % STEPS, torch.arange(len(grouped)) % 8 == 7
    )
    rounding = Rounding(RoundingMethod.ADAROUND, steps=300, lr=3e-2, batch_size=16, regularizer=0.05)
    config = TensorConfig(3, Granularity.PER_CHANNEL)
    record = round_by_learning(weight, config, MinMax, data, rounding, STEPS, generator())
    nearest = quantize_weight(weight, config, MinMax)
    errors = [held_out_error(data, one.dequantize(), None) for one in (record, nearest)]
    assert errors[0] < errors[1]


def test_rounding_leaves_weight_and_rows_alone() -> None:
    x, weight = layer()
    grouped = x.reshape(16, 25, 1, -1)
    data = SampledRows(grouped, product(grouped, weight), torch.arange(16) % STEPS, torch.arange(16) % 8 == 7)
    kept = [one.clone() for one in (weight, data.x, data.y)]
    round_by_learning(weight, W4, MinMax, data, Rounding(RoundingMethod.ADAROUND, steps=3), STEPS, generator())
    round_by_feedback(weight, W4, MinMax, moments_of(x, torch.zeros(len(x), 4)), Rounding(compensate=True))
    for before, now in zip(kept, (weight, data.x, data.y), strict=True):
        assert torch.equal(before, now)
        assert now.grad is None


@settings(max_examples=25)
@given(SEEDS)
def test_a_refitted_scale_is_the_least_squares_optimum(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(40, 6) @ torch.randn(6, 6)
    covariance = damp(x.T @ x / 40, 0.01)
    weight = torch.randn(5, 6)
    nearest = quantize_weight(weight, W4, MinMax)
    centred = nearest.codes - nearest.zero_point
    scale = refit_scale(weight, centred, nearest.scale, covariance)

    def noise(o: int, step: float) -> Fraction:
        row = [Fraction(float(w)) - Fraction(step) * int(q) for w, q in zip(weight[o], centred[o], strict=True)]
        return sum(row[i] * row[j] * Fraction(float(covariance[i, j])) for i in range(6) for j in range(6))  # type: ignore[return-value]

    assert (scale.shape, scale.dtype) == ((5, 1), torch.float32)
    for o in range(5):
        here, start = float(scale[o, 0]), float(nearest.scale[o, 0])
        if here != start:
            assert 0.75 < here / start < 1.25
            assert noise(o, here) <= noise(o, start) * Fraction(1.00001)
            assert noise(o, here) <= noise(o, here * 1.01)
            assert noise(o, here) <= noise(o, here * 0.99)


def test_a_scale_that_would_move_far_stays() -> None:
    weight, scale = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.5], [0.95], [1.0]])
    centred = torch.tensor([[1, 2], [1, 2], [0, 0]])
    assert refit_scale(weight, centred, scale, torch.eye(2)).flatten().tolist() == [0.5, 1.0, 1.0]


# --- bias --------------------------------------------------------------------


@BOTH
def test_a_correction_makes_the_mean_output_the_teachers(groups: int) -> None:
    x, weight = layer(groups)
    teacher = product(x + 0.2 * torch.randn(x.shape) + 0.1, weight)
    moments = moments_of(x, teacher - product(x, weight), groups)
    record = quantize_weight(weight, TensorConfig(3, Granularity.PER_CHANNEL), MinMax)
    output = product(x, record.dequantize())
    shift = correction(weight, record, moments)
    assert not torch.allclose(output.mean(0), teacher.mean(0), atol=0.05)
    assert torch.allclose((output + shift).mean(0), teacher.mean(0), atol=1e-4)
    own = own_correction(weight, record, moments)
    assert torch.allclose((output + own).mean(0), product(x, weight).mean(0), atol=1e-4)


def test_a_correction_is_weighted_as_the_moments_are() -> None:
    x, weight = layer()
    teacher, weights = x[:, 0] @ weight.T + torch.randn(len(x), 4), torch.rand(len(x))
    moments = Moments(12, 4)
    moments.update(x[:, 0], teacher - x[:, 0] @ weight.T, weights)
    record = quantize_weight(weight, W4, MinMax)
    left = teacher - x[:, 0] @ record.dequantize().T - correction(weight, record, [moments])
    assert (weights @ left / weights.sum()).tolist() == pytest.approx([0] * 4, abs=1e-4)


@BOTH
@pytest.mark.parametrize("shift", [None, 0.3])
def test_the_held_out_error_in_float64(groups: int, shift: float | None) -> None:
    x, weight = uneven(groups=groups)
    data = rows_of(x, weight, groups)
    other = weight + 0.1 * torch.randn(weight.shape)
    found = held_out_error(data, other, None if shift is None else torch.full((len(weight),), shift))
    ratios = []
    for i in range(7, SAMPLES, 8):
        wanted = data.y[i].double()
        got = product(data.x[i].double(), other.double()) + (shift or 0)
        ratios.append(float((got - wanted).square().sum() / wanted.square().sum()))
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert held_out_error(data, weight, None) == pytest.approx(0, abs=1e-9)


def test_a_teacher_of_zeros_has_a_finite_error() -> None:
    x = torch.zeros(8, 2, 1, 3)
    data = SampledRows(x, torch.zeros(8, 2, 4), torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool))
    assert math.isfinite(held_out_error(data, torch.randn(4, 3), torch.ones(4)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_the_published_steps_is_enough(seed: int) -> None:
    draw = generator(seed)
    spread = torch.exp(1.2 * torch.randn(64, generator=draw))
    x = torch.randn(160, 32, 64, generator=draw) * spread
    weight = torch.randn(96, 64, generator=draw) / spread.sqrt() / 8
    given_input = replace(scaled_input(x, weight), activation=A6)
    published = ChannelScaling(
        steps=6000, lr=1e-3, batch_size=32, init=Init.ONES, patience=6000, step_weights=StepWeights(Weighting.UNIFORM)
    )
    ours = ChannelScaling(step_weights=StepWeights(Weighting.UNIFORM))
    fast = learn_scales([given_input], ours, STEPS, generator())
    slow = learn_scales([given_input], published, STEPS, generator())
    assert fast.steps <= published.steps / 10
    assert fast.after <= slow.after * 1.01
