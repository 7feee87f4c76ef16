"""Rounding with feedback, against Optimal Brain Quantization written out: an inverse, updated column by column."""

import pytest
import torch
from torch import Tensor

from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.numerics import code_range, dequantize_affine, quantize_affine
from dmq_ao.observers import MinMax, quantize_weight
from dmq_ao.observers.error_feedback import BLOCK, damp, round_with_feedback

KIND = pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (3, True), (4, True)])


def correlated(seed: int, inputs: int) -> Tensor:
    """Second moments [K, K] float64 of inputs that know of each other, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64) @ (mixed + 2 * mixed[:1])
    return damp(x.T @ x / len(x), 0.01)


def grid(
    seed: int, inputs: int, bits: int, symmetric: bool, group: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(seed + 1))
    kind = Granularity.PER_GROUP if group else Granularity.PER_CHANNEL
    record = quantize_weight(weight, TensorConfig(bits, kind, group, symmetric), MinMax)
    return weight, record.scale, record.zero_point


def brain_surgeon(
    weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> Tensor:
    low, high = code_range(bits, symmetric)
    size = weight.shape[1] // scale.shape[1]
    left, inverse = weight.double().clone(), torch.linalg.inv(moments)
    codes = torch.zeros(weight.shape, dtype=torch.int32)
    for i in sorted(range(weight.shape[1]), key=lambda k: (float(moments[k, k]), k), reverse=True):
        step, zero = scale[:, i // size].double(), zero_point[:, i // size]
        code = ((left[:, i] / step).round() + zero).clamp(low, high)
        codes[:, i] = code.to(torch.int32)
        error = (left[:, i] - (code - zero) * step) / inverse[i, i]
        left -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def output_noise(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, moments: Tensor) -> float:
    size = weight.shape[1] // scale.shape[1]
    steps, zeros = scale.repeat_interleave(size, 1), zero_point.repeat_interleave(size, 1)
    error = (weight - dequantize_affine(codes, steps, zeros)).double()
    return float(((error @ moments) * error).sum())


@KIND
@pytest.mark.parametrize(("inputs", "group"), [(1, None), (8, None), (24, None), (24, 6), (24, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_the_brain_surgeon(
    seed: int, inputs: int, group: int | None, bits: int, symmetric: bool
) -> None:
    moments, given = correlated(seed, inputs), grid(seed, inputs, bits, symmetric, group)
    codes = round_with_feedback(given[0], moments, *given[1:], bits, symmetric)
    assert codes.dtype is torch.int32
    assert torch.equal(codes, brain_surgeon(given[0], moments, *given[1:], bits, symmetric))


@pytest.mark.parametrize("inputs", [BLOCK, BLOCK + 1, 2 * BLOCK + 44])
def test_blocks_change_nothing(inputs: int) -> None:
    moments, given = correlated(0, inputs), grid(0, inputs, 4, False, 4 if inputs % 4 == 0 else None)
    codes = round_with_feedback(given[0], moments, *given[1:], 4, False)
    assert torch.equal(codes, brain_surgeon(given[0], moments, *given[1:], 4, False))


@KIND
def test_the_output_is_closer_than_with_nearest_codes(bits: int, symmetric: bool) -> None:
    ratios = []
    for seed in range(20):
        moments, (weight, *qparams) = correlated(seed, 16), grid(seed, 16, bits, symmetric)
        nearest = quantize_affine(weight, *qparams, *code_range(bits, symmetric))
        codes = round_with_feedback(weight, moments, *qparams, bits, symmetric)
        before, after = (output_noise(weight, one, *qparams, moments) for one in (nearest, codes))
        ratios.append(after / before)
    assert sum(ratios) / len(ratios) < 0.8
    assert sum(ratio <= 1 for ratio in ratios) >= 18


@KIND
@pytest.mark.parametrize("group", [None, 5])
def test_inputs_that_know_nothing_of_each_other_give_the_nearest_codes(
    group: int | None, bits: int, symmetric: bool
) -> None:
    weight, scale, zero_point = grid(0, 20, bits, symmetric, group)
    moments = torch.diag(torch.rand(20, dtype=torch.float64) + 0.1)
    codes = round_with_feedback(weight, moments, scale, zero_point, bits, symmetric)
    size = 20 // scale.shape[1]
    steps, zeros = scale.repeat_interleave(size, 1), zero_point.repeat_interleave(size, 1)
    assert torch.equal(codes, quantize_affine(weight, steps, zeros, *code_range(bits, symmetric)).int())


@KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_codes_however_much_is_fed_back(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight, scale, zero_point = grid(0, 12, bits, symmetric)
    moments = (torch.ones(12, 12, dtype=torch.float64) + 1e-3 * torch.eye(12, dtype=torch.float64)).to(dtype)
    codes = round_with_feedback(8 * weight, moments, scale, zero_point, bits, symmetric)
    low, high = code_range(bits, symmetric)
    assert bool(((codes >= low) & (codes <= high)).all())


def test_the_weight_is_not_changed() -> None:
    weight, scale, zero_point = grid(0, 8, 4, False)
    before, moments = weight.clone(), correlated(0, 8)
    kept = moments.clone()
    round_with_feedback(weight, moments, scale, zero_point, 4, False)
    assert torch.equal(weight, before)
    assert torch.equal(moments, kept)


def test_damping_adds_a_share_of_the_mean_in_place() -> None:
    moments = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert damp(moments, 0.1) is moments
    assert torch.allclose(moments, torch.tensor([[2.3, 1.0], [1.0, 4.3]]))


def test_inputs_never_seen_are_rounded_to_nearest() -> None:
    weight, scale, zero_point = grid(0, 8, 4, False)
    codes = round_with_feedback(weight, damp(torch.zeros(8, 8), 0.01), scale, zero_point, 4, False)
    assert torch.equal(codes, quantize_affine(weight, scale, zero_point, 0, 15).int())
