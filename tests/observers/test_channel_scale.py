"""Learned scales: the gradient against float64 differences of the surrogate, the folding, the closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.numerics import along, choose_qparams, code_range, fake_quantize
from dmq_ao.observers.channel_scale import closed_form, fake_quantize_ste, round_ste, spread

SEEDS = st.integers(0, 2**31)
WIDTHS = [(4, False), (8, False), (2, True), (4, True), (8, True)]
KIND = pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)


def surrogate(x: float, low: float, high: float, at: tuple[float, float, float], bits: int, symmetric: bool) -> float:
    """What the straight-through gradient is the gradient of: rounded and clamped as ``at`` (x, low, high)."""

    def step(bottom: float, top: float) -> float:
        bottom, top = min(bottom, 0.0), max(top, 0.0)
        return max(-bottom, top) / largest if symmetric else (top - bottom) / (largest - smallest)

    smallest, largest = code_range(bits, symmetric)
    there = step(*at[1:])
    zero_point = 0 if symmetric else min(max(smallest - round(min(at[1], 0.0) / there), smallest), largest)
    code: float = min(max(round(at[0] / there) + zero_point, smallest), largest)
    if code == round(at[0] / there) + zero_point:
        code += x / step(low, high) - at[0] / there
    return (code - zero_point) * step(low, high)


def differences(x: float, low: float, high: float, bits: int, symmetric: bool) -> list[float]:
    at, found = (x, low, high), []
    for place in range(3):
        ends = []
        for sign in (1, -1):
            moved = list(at)
            moved[place] += sign * 1e-6
            ends.append(surrogate(*moved, at, bits, symmetric))
        found.append((ends[0] - ends[1]) / 2e-6)
    return found


@KIND
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.1), (-2.7, 0.4), (0.2, 1.7), (-1.9, -0.3)])
def test_the_gradient_is_that_of_the_surrogate(low: float, high: float, bits: int, symmetric: bool) -> None:
    values = torch.linspace(-4.01, 4.003, 41, dtype=torch.float64).tolist()
    for value in values:
        inputs = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (value, low, high)]
        result = fake_quantize_ste(*inputs, bits, symmetric)
        assert float(result.detach()) == pytest.approx(
            surrogate(value, low, high, (value, low, high), bits, symmetric)
        )
        result.backward()
        found = [0.0 if one.grad is None else float(one.grad) for one in inputs]
        assert found == pytest.approx(differences(value, low, high, bits, symmetric), abs=1e-4)


@KIND
def test_values_beyond_the_range_pass_no_gradient_of_their_own(bits: int, symmetric: bool) -> None:
    x = torch.tensor([-9.0, -0.3, 0.2, 9.0], requires_grad=True)
    fake_quantize_ste(x, torch.tensor(-1.0), torch.tensor(1.5), bits, symmetric).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-6)


@KIND
def test_the_values_are_those_of_the_codes(bits: int, symmetric: bool) -> None:
    x, low, high = torch.randn(6, 30), torch.randn(6, 1) - 1, torch.randn(6, 1) + 1
    scale, zero_point = choose_qparams(low, high, bits, symmetric)
    expected = fake_quantize(x, scale, zero_point, *code_range(bits, symmetric))
    assert torch.allclose(fake_quantize_ste(x, low, high, bits, symmetric), expected, atol=1e-6)


@KIND
def test_a_channel_of_zeros_is_finite(bits: int, symmetric: bool) -> None:
    x, low, high = (torch.zeros(3, requires_grad=True) for _ in range(3))
    result = fake_quantize_ste(x, low, high, bits, symmetric)
    result.sum().backward()
    assert bool((result == 0).all())
    for one in (x, low, high):
        assert one.grad is None or bool(torch.isfinite(one.grad).all())


def test_rounding_lets_the_gradient_through() -> None:
    x = torch.tensor([0.4, 1.5, -2.6], requires_grad=True)
    rounded = round_ste(x)
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert rounded.tolist() == [0, 2, -3]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


@given(SEEDS)
def test_a_scale_folds_into_a_linear_weight(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, logs = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (9, 5, 1))
    scale = logs[0].exp()
    assert torch.allclose((x / scale) @ (weight * spread(scale, 5, 1)).T, x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 2)])
def test_a_scale_folds_into_a_convolution(kernel: tuple[int, ...], groups: int) -> None:
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel) - 1]
    x = torch.randn(2, 6, *[5] * len(kernel), dtype=torch.float64)
    weight = torch.randn(12, 6 // groups, *kernel, dtype=torch.float64)
    scale = torch.rand(6, dtype=torch.float64) * 5 + 0.1
    scaled = weight.flatten(1) * spread(scale, 12, math.prod(kernel), groups)
    folded = convolve(x / along(scale, 1, x.dim()), scaled.reshape(weight.shape), groups=groups)
    assert torch.allclose(folded, convolve(x, weight, groups=groups), rtol=1e-12, atol=1e-12)


def test_spread_entry_by_entry() -> None:
    rows = spread(torch.arange(6.0), 4, 2, groups=2)
    assert rows.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def peaks(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 12, generator=generator).exp()
    return x, weight


@given(SEEDS, st.floats(0, 1), st.floats(1.1, 100))
def test_the_closed_form_is_positive_and_bounded(seed: int, migration: float, limit: float) -> None:
    scale = closed_form(*peaks(seed), migration, limit)
    assert bool((scale > 0).all())
    assert float(scale.max()) <= limit * (1 + 1e-5)
    assert float(scale.min()) >= (1 - 1e-5) / limit


@given(SEEDS, st.floats(0, 1))
def test_the_closed_form_channel_by_channel(seed: int, migration: float) -> None:
    x, weight = peaks(seed)
    plain = [float(a) ** migration / float(b) ** (1 - migration) for a, b in zip(x, weight, strict=True)]
    middle = math.prod(plain) ** (1 / len(plain))
    scale = closed_form(x, weight, migration, 1e9)
    assert scale.tolist() == pytest.approx([one / middle for one in plain], rel=1e-4)
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-5)


def test_the_ends_of_migration() -> None:
    x, weight = peaks(0)
    inputs = x / closed_form(x, weight, 1.0, 1e9)
    weights = weight * closed_form(x, weight, 0.0, 1e9)
    for even in (inputs, weights):
        assert even.tolist() == pytest.approx([float(even[0])] * len(even), rel=1e-4)


def test_dead_channels_keep_one() -> None:
    x, weight = torch.tensor([0.0, 1.0, 4.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    scale = closed_form(x, weight, 0.5, 32.0)
    assert scale[:2].tolist() == [1, 1]
    assert float(scale[2] * scale[3]) == pytest.approx(1)
    assert closed_form(torch.zeros(3), torch.zeros(3), 0.5, 32.0).tolist() == [1, 1, 1]
