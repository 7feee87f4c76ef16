"""What every range estimator promises, and what each of them is for."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.observers import ALL_OBSERVERS, MSE, Histogram, MinMax, Percentile, RangeEstimator
from dmq_ao.observers.histogram import BINS

EVERY = pytest.mark.parametrize("name", ALL_OBSERVERS)
SEEDS = st.integers(0, 2**31)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def values(seed: int, count: int = 300) -> Tensor:
    """Numbers of many magnitudes and both signs, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp2(torch.randint(-30, 6, (count,), generator=generator))
    return x * (torch.rand(count, generator=generator) > 0.1)


def after(name: str, *parts: Tensor) -> RangeEstimator:
    estimator = ALL_OBSERVERS[name]()
    for part in parts:
        estimator.update(part)
    return estimator


def equal_states(one: RangeEstimator, other: RangeEstimator) -> bool:
    first, second = one.state(), other.state()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def fake(x: Tensor, low: float, high: float, bits: int, symmetric: bool = False) -> Tensor:
    """Asymmetric or symmetric codes and back, float64, from the equations."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = max(-low, high, 1e-30) / top
        return (x.double() / step).round().clamp(-top - 1, top) * step
    step = max(high - low, 1e-30) / (2**bits - 1)
    zero_point = round(-low / step)
    return ((x.double() / step).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * step


def error(x: Tensor, weights: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> float:
    """The searched error, ``|x_hat - x| ** 2.4`` summed with ``weights``."""
    return float(((fake(x, float(low), float(high), bits, symmetric) - x).abs() ** 2.4 * weights).sum())


@EVERY
def test_starts_clean(name: str) -> None:
    after(name, torch.tensor([-1e6, 1e6]))
    assert tuple(map(float, ALL_OBSERVERS[name]().range(8))) == (0.0, 0.0)


@EVERY
def test_range_includes_zero_and_is_of_scalars(name: str) -> None:
    for x in (torch.rand(50) + 1, -torch.rand(50) - 1, torch.randn(4, 5), torch.zeros(3)):
        low, high = after(name, x).range(8)
        assert low <= 0 <= high
        assert (low.shape, low.dtype, high.shape, high.dtype) == ((), torch.float32, (), torch.float32)


@pytest.mark.parametrize("name", [name for name in ALL_OBSERVERS if name != "ema"])
@settings(max_examples=25)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 80), min_size=1, max_size=6), bits=st.sampled_from([2, 8]))
def test_order_and_batches_do_not_matter(name: str, seed: int, sizes: list[int], bits: int) -> None:
    x = values(seed, sum(sizes))
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + 1))]
    at_once, in_parts = after(name, x), after(name, *shuffled.split(sizes))
    assert at_once.range(bits) == in_parts.range(bits)
    assert equal_states(at_once, in_parts)


@EVERY
def test_shape_and_dtype_do_not_matter(name: str) -> None:
    x = values(3, 64).bfloat16()
    flat, shaped = after(name, x.float()), after(name, x.reshape(4, 2, 8))
    assert equal_states(flat, shaped)


@EVERY
def test_goes_on_from_a_state(name: str) -> None:
    first, second = values(1), values(2) * 100
    one = after(name, first)
    kept = {key: value.clone() for key, value in one.state().items()}
    live = one.state()
    other = ALL_OBSERVERS[name]()
    other.load_state(live)
    assert equal_states(one, other)
    one.update(first)
    assert all(torch.equal(live[key], kept[key]) for key in kept), "a state taken earlier has changed"
    one = after(name, first, second)
    other.update(second)
    assert equal_states(one, other)
    assert one.range(4) == other.range(4)


@EVERY
def test_does_not_touch_its_input(name: str) -> None:
    x = values(4)
    before = x.clone()
    after(name, x)
    ALL_OBSERVERS[name].weight_range(x.reshape(3, -1), 4, False)
    assert torch.equal(x, before)


@EVERY
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_range_is_per_row_and_inside(name: str, bits: int, symmetric: bool) -> None:
    rows = torch.randn(6, 40) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 0.0])[:, None]
    rows[1] = rows[1].abs()
    low, high = ALL_OBSERVERS[name].weight_range(rows, bits, symmetric)
    assert low.shape == high.shape == (6,)
    assert bool(torch.isfinite(low).all())
    assert bool(torch.isfinite(high).all())
    for row in range(6):
        alone = ALL_OBSERVERS[name].weight_range(rows[row : row + 1], bits, symmetric)
        assert (low[row : row + 1], high[row : row + 1]) == alone
        assert min(float(rows[row].min()), 0.0) <= low[row] <= high[row] <= max(float(rows[row].max()), 0.0)


def test_minmax_is_the_extremes() -> None:
    x = values(5)
    assert after("minmax", *x.split(7)).range(4) == (x.min(), x.max())
    rows = torch.randn(4, 9)
    low, high = MinMax.weight_range(rows, 4, False)
    assert torch.equal(low, rows.amin(1))
    assert torch.equal(high, rows.amax(1))


@settings(max_examples=25)
@given(seed=SEEDS, bits=st.integers(2, 8))
def test_mse_has_the_least_error_of_all_shrinks(seed: int, bits: int) -> None:
    estimator = MSE()
    estimator.update(values(seed))
    x, weights = estimator.centres(), estimator.counts
    found = error(x, weights, *estimator.range(bits), bits)
    shrinks = [1 - 0.01 * i for i in range(80)]
    errors = [error(x, weights, estimator.low * f, estimator.high * f, bits) for f in shrinks]
    # Shrinks of equal error may be told apart by float32: the error counts, not which of them it is.
    assert found <= errors[0] * (1 + 1e-3)
    assert found <= min(errors) * (1 + 1e-2)


@settings(max_examples=25)
@given(seed=SEEDS, bits=st.integers(2, 8), symmetric=st.booleans())
def test_mse_of_weights_has_the_least_error_of_all_shrinks(seed: int, bits: int, symmetric: bool) -> None:
    rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(seed)) ** 3
    low, high = MSE.weight_range(rows, bits, symmetric)
    for row, x in enumerate(rows):
        ones = torch.ones(len(x))
        found = error(x, ones, low[row], high[row], bits, symmetric)
        errors = [error(x, ones, x.min() * f, x.max() * f, bits, symmetric) for f in (1 - 0.01 * i for i in range(80))]
        assert found <= errors[0] * (1 + 1e-3)
        assert found <= min(errors) * (1 + 1e-2)


def test_mse_gives_up_an_outlier() -> None:
    x = torch.cat([torch.randn(5000), torch.tensor([12.0])])
    estimator = after("mse", x)
    low, high = estimator.range(4)
    assert high < 8
    assert error(x, torch.ones(len(x)), low, high, 4) < 0.5 * error(x, torch.ones(len(x)), x.min(), x.max(), 4)
    low, high = MSE.weight_range(x[None], 4, True)
    assert high < 8


@given(seed=SEEDS, count=st.integers(1, 5000))
def test_percentile_is_inside_minmax(seed: int, count: int) -> None:
    x = values(seed, count)
    low, high = after("percentile", x).range(8)
    assert min(float(x.min()), 0.0) <= low <= 0 <= high <= max(float(x.max()), 0.0)


def test_percentile_clips_what_is_rare() -> None:
    x = torch.cat([torch.randn(99_990), torch.full((3,), 50.0), torch.full((2,), -70.0), torch.full((5,), 0.0)])
    low, high = after("percentile", x).range(8)
    assert -6 < low < -3
    assert 3 < high < 6
    outside = (x < low).float().mean() + (x > high).float().mean()
    assert 3e-5 < outside <= 1e-4 + 1e-6
    low, high = Percentile.weight_range(torch.stack([x, x * 2]), 8, False)
    assert bool((low < torch.tensor([-3.0, -6.0])).all() and (low > torch.tensor([-6.0, -12.0])).all())
    assert torch.allclose(high[1], 2 * high[0])


def test_percentile_of_few_values_is_minmax() -> None:
    x = values(6)
    assert after("percentile", x).range(8) == (x.min(), x.max())


@given(st.lists(st.lists(FLOATS, min_size=1, max_size=8), min_size=1, max_size=6))
def test_histogram_growth_is_exact(parts: list[list[float]]) -> None:
    histogram = Histogram()
    for part in parts:
        histogram.update(torch.tensor(part))
    seen = [value for part in parts for value in part]
    # One pass with the final limit, in exact arithmetic.
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in seen:
        expected[math.floor(Fraction(value) / Fraction(2) ** histogram.exponent * (BINS // 2)) + BINS // 2] += 1
    assert torch.equal(histogram.counts, expected)
    assert (float(histogram.low), float(histogram.high)) == (min(*seen, 0.0), max(*seen, 0.0))
    assert max(map(abs, seen)) < 2.0**histogram.exponent
    assert histogram.exponent == -64 or max(map(abs, seen)) >= 2.0 ** (histogram.exponent - 1)


def test_histogram_keeps_the_sign_of_small_values_as_it_grows() -> None:
    grown, at_once = Histogram(), Histogram()
    grown.update(torch.tensor([-1e-9]))
    grown.update(torch.tensor([1.0]))
    at_once.update(torch.tensor([-1e-9, 1.0]))
    assert torch.equal(grown.counts, at_once.counts)
    assert int(at_once.counts[BINS // 2 - 1]) == 1


def test_histogram_centres_are_the_middles() -> None:
    histogram = Histogram()
    histogram.update(torch.tensor([3.0]))
    centres = histogram.centres()
    assert (histogram.exponent, len(centres), centres.dtype) == (2, BINS, torch.float64)
    assert abs(float(centres[histogram.counts.argmax()]) - 3.0) <= 4.0 / BINS
    assert float(centres.sum()) == 0
    assert float(centres[1] - centres[0]) == 8.0 / BINS


def test_a_moving_average_is_that_of_the_published_code() -> None:
    batches = [torch.tensor([-1.0, 3.0]), torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 5.0])]
    found = ALL_OBSERVERS["ema"]()
    low, high = -1.0, 3.0
    for index, batch in enumerate(batches):
        found.update(batch)
        if index:
            low, high = 0.95 * low + 0.05 * float(batch.min()), 0.95 * high + 0.05 * float(batch.max())
    assert tuple(map(float, found.range(8))) == pytest.approx((low, high))
