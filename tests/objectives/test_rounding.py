"""The term that makes roundings hard, and its temperature."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmq_ao.objectives import rounding_regularizer, temperature

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(SHARES, st.floats(1, 20))
def test_the_regularizer_number_by_number(soft: list[float], beta: float) -> None:
    expected = sum(1 - abs(2 * h - 1) ** beta for h in soft)
    assert float(rounding_regularizer(torch.tensor(soft, dtype=torch.float64), beta)) == pytest.approx(
        expected, abs=1e-9
    )


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1), st.floats(1, 20))
def test_hard_roundings_cost_nothing(soft: list[float], beta: float) -> None:
    assert float(rounding_regularizer(torch.tensor(soft), beta)) == 0


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_it_pushes_away_from_the_middle(beta: float) -> None:
    soft = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    rounding_regularizer(soft, beta).backward()
    assert soft.grad is not None
    assert (soft.grad > 0).tolist() == [True, True, False, False]


@given(st.integers(1, 1000), st.floats(0, 0.99), st.floats(2, 30))
def test_the_temperature_waits_and_falls(steps: int, warmup: float, start: float) -> None:
    values = [temperature(step, steps, warmup, start, 2.0) for step in range(steps + 1)]
    assert all(later <= earlier for earlier, later in zip(values, values[1:], strict=False))
    assert all(value == start for step, value in enumerate(values) if step <= warmup * steps)
    assert values[-1] == pytest.approx(2)


def test_the_published_temperature() -> None:
    for step in range(1, 101):
        published = 2 + 18 * max(0.0, 1 - (step - 20) / 80) if step >= 20 else 20.0
        assert temperature(step, 100, 0.2) == pytest.approx(published)
