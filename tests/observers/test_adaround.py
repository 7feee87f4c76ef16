"""Learned rounding: where it starts, what it may become."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.numerics import code_range, quantize_affine
from dmq_ao.observers import MinMax, quantize_weight
from dmq_ao.observers.adaround import hard_codes, initial_logits, soft_codes, soft_round

SEEDS = st.integers(0, 2**31)
KIND = pytest.mark.parametrize(("bits", "symmetric"), [(1, False), (2, True), (4, False), (4, True), (8, True)])


def grid(seed: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, narrower than its range so that no code is clamped, its scale and zero point."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    record = quantize_weight(weight, TensorConfig(bits, Granularity.PER_CHANNEL, symmetric=symmetric), MinMax)
    return 0.9 * weight, record.scale, record.zero_point


@given(SEEDS)
def test_the_start_is_the_fraction(seed: int) -> None:
    weight = 10 * torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for value, soft in zip(weight.tolist(), soft_round(initial_logits(weight, torch.tensor(0.37))), strict=True):
        ratio = value / float(torch.tensor(0.37))
        assert float(soft) == pytest.approx(ratio - math.floor(ratio), abs=1e-9)


@KIND
@given(SEEDS)
def test_the_start_changes_nothing(bits: int, symmetric: bool, seed: int) -> None:
    weight, scale, zero_point = grid(seed, bits, symmetric)
    low, high = code_range(bits, symmetric)
    soft = soft_codes(weight, initial_logits(weight, scale), scale, zero_point, bits, symmetric)
    assert torch.allclose(soft, (weight / scale + zero_point).clamp(low, high), atol=1e-4)


@KIND
@given(SEEDS)
def test_hardened_at_once_it_is_rounding_to_nearest(bits: int, symmetric: bool, seed: int) -> None:
    weight, scale, zero_point = grid(seed, bits, symmetric)
    hard = hard_codes(weight, initial_logits(weight, scale), scale, zero_point, bits, symmetric)
    nearest = quantize_affine(weight, scale, zero_point, *code_range(bits, symmetric))
    ties = (weight / scale - torch.floor(weight / scale) - 0.5).abs() < 1e-4
    assert bool((ties | (hard == nearest)).all())
    assert bool(((hard - nearest).abs() <= 1).all())


def test_ties_go_up() -> None:
    weight, scale, zero = torch.tensor([[0.5, 1.5, -0.5, -1.5]]), torch.ones(1, 1), torch.full((1, 1), 8)
    hard = hard_codes(weight, initial_logits(weight, scale), scale, zero, 4, False)
    assert hard.tolist() == [[9, 10, 8, 7]]


@given(st.lists(st.floats(-1e4, 1e4), min_size=1))
def test_soft_roundings_are_shares(logits: list[float]) -> None:
    soft = soft_round(torch.tensor(logits))
    assert bool(((soft >= 0) & (soft <= 1)).all())
    assert soft_round(torch.tensor([-9.0, 9.0, 0.0])).tolist() == pytest.approx([0, 1, 0.5])


@KIND
@given(SEEDS)
def test_codes_stay_codes_whatever_is_learned(bits: int, symmetric: bool, seed: int) -> None:
    weight, scale, zero_point = grid(seed, bits, symmetric)
    logits = 20 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    low, high = code_range(bits, symmetric)
    hard = hard_codes(3 * weight, logits, scale, zero_point, bits, symmetric)
    soft = soft_codes(3 * weight, logits, scale, zero_point, bits, symmetric)
    assert torch.equal(hard, hard.round())
    for codes in (hard, soft):
        assert bool(((codes >= low) & (codes <= high)).all())
    assert bool(((hard - soft).abs() <= 1).all())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True)])
def test_logits_have_a_gradient(bits: int, symmetric: bool) -> None:
    weight, scale, zero_point = grid(0, bits, symmetric)
    logits = initial_logits(weight, scale).requires_grad_()
    soft_codes(weight, logits, scale, zero_point, bits, symmetric).sum().backward()
    assert logits.grad is not None
    fraction = weight / scale - torch.floor(weight / scale)
    inside = (fraction > 0.01) & (fraction < 0.99)
    assert bool((logits.grad[inside] > 0).all())


def test_a_weight_on_the_grid_has_finite_logits() -> None:
    logits = initial_logits(torch.tensor([[-2.0, 0.0, 3.0]]), torch.ones(1, 1))
    assert bool(torch.isfinite(logits).all())
    assert soft_round(logits).tolist() == [pytest.approx([0, 0, 0], abs=1e-6)]
