"""Codes that move: at first those decided, then those of the rounded sum; gradients as if nothing was rounded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.algorithms.low_rank import LowRankCodes
from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.observers import ALL_OBSERVERS, quantize_weight
from dmq_ao.records import WeightRecord

fast = settings(max_examples=60, deadline=None, derandomize=True)
WEIGHTS = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([1, 2, 3, 4, 8]),
        "symmetric": st.booleans(),
        "group_size": st.sampled_from([None, 6]),
        "mixed": st.booleans(),
        "seed": st.integers(0, 20),
    }
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decided(
    bits: int = 3, symmetric: bool = False, group_size: int | None = None, mixed: bool = False, seed: int = 0
) -> tuple[Tensor, WeightRecord]:
    """A convolution's weight, and codes on its grid that are not its nearest ones everywhere."""
    weight = torch.randn(6, 4, 3, 2, generator=seeded(seed))
    granularity = Granularity.PER_CHANNEL if group_size is None else Granularity.PER_GROUP
    config = TensorConfig(bits, granularity, group_size, symmetric)
    widths = torch.tensor([1, 2, 3, 4, 2, 1], dtype=torch.uint8) if mixed else None
    record = quantize_weight(weight, config, ALL_OBSERVERS["minmax"], widths)
    other = quantize_weight(
        weight + 0.2 * torch.randn(weight.shape, generator=seeded(seed + 1)), config, ALL_OBSERVERS["minmax"], widths
    )
    same = record.zero_point[:, :1, None, None] == other.zero_point[:, :1, None, None]
    codes = torch.where(same & (group_size is None), other.codes, record.codes)
    return weight, dataclasses.replace(record, codes=codes)


def update(size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors whose product is about ``size`` steps."""
    up = torch.randn(6, 2, generator=seeded(seed))
    return size * up, torch.randn(2, 24, generator=seeded(seed + 1))


@fast
@given(given=WEIGHTS)
def test_no_update_is_the_decided_codes_bit_for_bit(given: dict[str, Any]) -> None:
    weight, record = decided(**given)
    moved = LowRankCodes(weight, record)
    up, down = moved.factors(2, seeded())
    assert not bool(up.any())
    merged = moved.merged(up, down)
    assert merged.codes.dtype is record.codes.dtype
    assert torch.equal(merged.codes, record.codes)
    assert torch.equal(moved.values(record.scale, up, down), record.dequantize())


@fast
@given(given=WEIGHTS, size=st.floats(0.1, 3))
def test_the_codes_are_those_of_the_sum(given: dict[str, Any], size: float) -> None:
    weight, record = decided(**given)
    moved = LowRankCodes(weight, record)
    up, down = update(size)
    steps = (up @ down).double().flatten().tolist()
    found = moved.merged(up, down).codes.flatten().tolist()
    each, per = weight[0].numel(), weight[0].numel() // record.scale.shape[1]
    for at, (step, code) in enumerate(zip(steps, found, strict=True)):
        row, group = at // each, at % each // per
        zero = int(record.zero_point[row, group])
        width = given["bits"] if record.channel_bits is None else int(record.channel_bits[row])
        start = int(record.codes.flatten()[at]) - zero
        place = float(weight.flatten()[at]) / float(record.scale[row, group])
        if width == 1:
            place = start * max(start * place, 0.01) + step
            assert code - zero == (1 if place >= 0 else -1) or abs(place) < 1e-5
        else:
            low = -(2 ** (width - 1)) if given["symmetric"] else -zero
            place = min(max(place, start - 0.49), start + 0.49) + step
            assert abs(code - zero - min(max(place, low), low + 2**width - 1)) <= 0.5 + 1e-5


@fast
@given(given=WEIGHTS, size=st.floats(0, 3))
def test_what_is_merged_is_what_was_learned(given: dict[str, Any], size: float) -> None:
    weight, record = decided(**given)
    moved = LowRankCodes(weight, record)
    up, down = update(size)
    scale = 1.1 * record.scale
    merged = dataclasses.replace(moved.merged(up, down), scale=scale)
    assert torch.equal(moved.values(scale, up, down), merged.dequantize())


def test_a_step_is_a_step_of_the_grid() -> None:
    weight, record = decided(bits=8)
    moved = LowRankCodes(weight, record)
    inner = (record.codes > 0) & (record.codes < 255)
    for steps in (1.0, -1.0):
        codes = moved.merged(torch.full((6, 1), steps), torch.ones(1, 24)).codes
        assert torch.equal(codes.int()[inner], record.codes.int()[inner] + int(steps))


@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"group_size": 6}, {"mixed": True}, {"bits": 1}])
def test_gradients_are_those_of_the_weight_as_if_it_were_not_rounded(given: dict[str, Any]) -> None:
    weight, record = decided(**given)
    moved = LowRankCodes(weight, record)
    factors = [x.requires_grad_() for x in update(0.2)]
    scale = record.scale.clone().requires_grad_()
    towards = torch.randn(weight.shape, generator=seeded(7))
    (moved.values(scale, *factors) * towards).sum().backward()
    fixed = dataclasses.replace(moved.merged(*(x.detach() for x in factors)), scale=record.scale.clone())
    fixed.scale.requires_grad_()
    (fixed.dequantize() * towards).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, fixed.scale.grad)
    others = [x.detach().requires_grad_() for x in factors]
    steps = (others[0] @ others[1]).reshape(*record.scale.shape, -1) * record.scale.unsqueeze(-1)
    inside = _inside(moved, record, steps.detach())
    (steps.reshape(weight.shape) * towards * inside).sum().backward()
    assert bool(inside.any())
    for factor, other in zip(factors, others, strict=True):
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad, other.grad)


def _inside(moved: LowRankCodes, record: WeightRecord, steps: Tensor) -> Tensor:
    """Where a push of half a step changes a code at least one way beyond the first and the last."""
    place = moved._start + steps / record.scale.unsqueeze(-1)
    widths = torch.as_tensor(record.row_bits).expand(len(record.codes))[:, None, None]
    zero = record.zero_point.unsqueeze(-1)
    low = torch.full_like(zero, 0) - zero if not record.symmetric else -(2 ** (widths.int() - 1))
    high = low + 2 ** widths.int() - 1
    low, high = (torch.where(widths == 1, one, end) for one, end in ((-1, low), (1, high)))
    return ((place >= low - 0.5) & (place <= high + 0.5)).reshape(record.codes.shape)


def test_beyond_the_last_code_there_is_no_gradient() -> None:
    weight, record = decided()
    moved = LowRankCodes(weight, record)
    up = torch.full((6, 1), 50.0).requires_grad_()
    moved.values(record.scale, up, torch.ones(1, 24)).sum().backward()
    assert up.grad is not None
    assert not bool(up.grad.any())


def test_the_second_factor_is_drawn_from_the_generator() -> None:
    weight, record = decided()
    first, again, other = (LowRankCodes(weight, record).factors(2, seeded(seed))[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.abs().max()) <= 24**-0.5
    assert float(first.std()) == pytest.approx((24 * 3) ** -0.5, rel=0.3)


def test_a_rank_beyond_the_weights_is_the_weights() -> None:
    weight, record = decided()
    up, down = LowRankCodes(weight, record).factors(100, seeded())
    assert (up.shape, down.shape) == ((6, 6), (6, 24))
