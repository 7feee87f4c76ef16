"""Who gets the bits: budgets are exact, more bits never hurt, and no scorer beats the exchange at its own measure."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.mixed_precision.allocation import error_curves, exchange, kurtosis, places, swap
from dmq_ao.observers import MSE, MinMax, quantize_weight

WIDTHS = (1, 2, 3, 4)
CONFIG = TensorConfig(3, Granularity.PER_CHANNEL)
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling(seed: int, out: int) -> Tensor:
    """Error curves [out, widths] that fall, convex or not."""
    falls = torch.rand(out, len(WIDTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return falls.flip(1).cumsum(1).flip(1)


def test_kurtosis_is_the_published_formula() -> None:
    rows = drawn(0, 5, 40).double()
    for row, found in zip(rows, kurtosis(rows), strict=True):
        deviation = sum((float(x) - float(row.mean())) ** 2 for x in row) / 39
        assert float(found) == pytest.approx(sum((float(x) - float(row.mean())) ** 4 for x in row) / 40 / deviation**2)


@given(SEEDS, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_kurtosis_does_not_see_scale_or_shift(seed: int, scale: float, shift: float) -> None:
    rows = drawn(seed, 4, 30).double()
    torch.testing.assert_close(kurtosis(rows * scale + shift), kurtosis(rows), rtol=1e-6, atol=1e-9)


def test_a_constant_channel_makes_no_claim() -> None:
    rows = torch.cat([torch.full((1, 20), 0.7), torch.zeros(1, 20), drawn(0, 1, 20)])
    assert kurtosis(rows)[:2].tolist() == [3.0, 3.0]


def test_curves_are_the_error_of_the_final_grid() -> None:
    weight, importance = drawn(0, 6, 4, 3), drawn(1, 6, 12).square()
    for estimator in (MinMax, MSE):
        curves = error_curves(weight, importance, CONFIG, estimator, WIDTHS)
        for column, bits in enumerate(WIDTHS):
            widths = torch.full((6,), bits)
            rounded = quantize_weight(weight, CONFIG, estimator, widths).dequantize().double()
            expected = ((rounded - weight.double()).flatten(1).square() * importance).sum(1)
            torch.testing.assert_close(curves[:, column], expected, rtol=1e-5, atol=1e-9)
        assert bool((curves[:, 1:].sum(0) < curves[:, :-1].sum(0)).all())


@given(SEEDS, st.integers(1, 12))
def test_a_swap_keeps_the_mean_and_is_never_worse(seed: int, out: int) -> None:
    curves, scores = falling(seed, out), drawn(seed, out)
    sizes = [size for size in range(out // 2 + 1)]
    widths = swap(scores, curves, 2, WIDTHS, sizes)
    assert float(widths.double().mean()) == 2
    assert set(widths.tolist()) <= {1, 2, 3}
    error = float(curves.gather(1, places(widths, WIDTHS)[:, None]).sum())
    assert error <= float(curves[:, 1].sum()) + 1e-12
    high, low = scores[widths == 3], scores[widths == 1]
    assert len(high) == len(low)
    assert not len(high) or float(high.min()) >= float(low.max())


def test_a_swap_orders_equal_scores_by_channel() -> None:
    curves = torch.tensor([[9.0, 8, 0, 0], [9.0, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64).flip(0)
    assert swap(torch.zeros(4), curves, 2, WIDTHS, [0, 1, 2]).tolist() == [1, 1, 3, 3]


@settings(max_examples=60)
@given(SEEDS, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(1, 4))
def test_an_exchange_fits_the_budget_and_beats_every_swap(seed: int, sizes: list[int], mean: float) -> None:
    curves = [falling(seed + place, out) for place, out in enumerate(sizes)]
    costs = [3 + place for place in range(len(sizes))]
    numel = sum(cost * out for cost, out in zip(costs, sizes, strict=True))
    budget = int(mean * numel)
    widths = exchange(curves, costs, [WIDTHS] * len(sizes), budget)
    spent = sum(cost * int(one.sum()) for cost, one in zip(costs, widths, strict=True))
    assert spent <= budget
    assert all(set(one.tolist()) <= set(WIDTHS) for one in widths)
    assert mean < 4 or spent == 4 * numel
    # Among all plans on the curves' convex hulls it is the best up to its last step: no plan of less bits is better.
    if len(curves) == 1 and sizes[0] <= 4:
        error = float(curves[0].gather(1, places(widths[0], WIDTHS)[:, None]).sum())
        largest = max(float(c) for c in curves[0][:, 0])
        for other in itertools.product(WIDTHS, repeat=sizes[0]):
            if costs[0] * sum(other) <= spent - 3 * costs[0]:
                alone = float(curves[0].gather(1, places(torch.tensor(other), WIDTHS)[:, None]).sum())
                assert error <= alone + largest


@given(SEEDS)
def test_more_bits_never_cost_error(seed: int) -> None:
    curves = [falling(seed, 6)]
    errors = []
    for budget in range(6, 25):
        widths = exchange(curves, [1], [WIDTHS], budget)[0]
        errors.append(float(curves[0].gather(1, places(widths, WIDTHS)[:, None]).sum()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_a_bit_goes_where_it_saves_most() -> None:
    curves = torch.tensor([[8.0, 4, 2, 1], [80.0, 40, 20, 10], [0.0, 0, 0, 0]], dtype=torch.float64)
    assert exchange([curves], [1], [WIDTHS], 6)[0].tolist() == [1, 4, 1]
    assert exchange([curves], [1], [WIDTHS], 12)[0].tolist() == [4, 4, 1]  # a dead channel gains none
    wide, narrow = torch.tensor([[8.0, 4, 2, 1]]).double(), torch.tensor([[8.0, 4, 2, 1]]).double()
    assert [one.tolist() for one in exchange([wide, narrow], [10, 1], [WIDTHS] * 2, 14)] == [[1], [4]]


def test_a_budget_below_the_smallest_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="the budget is 2 bits, and the smallest widths take 3"):
        exchange([falling(0, 3)], [1], [WIDTHS], 2)
