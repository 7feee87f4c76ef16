"""Rows times weight is the layer, for every geometry; moments against weighted sums in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from dmq_ao.algorithms.moments import Moments, outputs, rows, windows
from dmq_ao.algorithms.rounding import round_by_feedback
from dmq_ao.algorithms.sampled_rows import product
from dmq_ao.config import Granularity, Rounding, TensorConfig
from dmq_ao.graph import CONVOLUTIONS, LINEAR
from dmq_ao.graph.geometry import Geometry, geometry
from dmq_ao.observers import MinMax
from dmq_ao.observers.error_feedback import factor

AXES = pytest.mark.parametrize("axes", [1, 2, 3])


@st.composite
def shapes(draw: st.DrawFn, axes: int) -> Geometry:
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    return Geometry(each(1, 3), each(1, 3), each(0, 2), each(1, 2), draw(st.integers(1, 3)))


def layer(shape: Geometry, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and output of a convolution in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [3 + gap * (k - 1) + i for i, (k, gap) in enumerate(zip(shape.kernel, shape.dilation, strict=True))]
    x = torch.randn(2, 2 * shape.groups, *sizes, generator=generator, dtype=torch.float64)
    weight = torch.randn(3 * shape.groups, 2, *shape.kernel, generator=generator, dtype=torch.float64)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(shape.kernel) - 1]
    y = convolve(x, weight, None, list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups)
    return x, weight, y


def multiplied(found: Tensor, weight: Tensor, groups: int) -> Tensor:
    parts = [found[:, group] @ part.flatten(1).T for group, part in enumerate(weight.chunk(groups))]
    return torch.cat(parts, 1)


@AXES
@given(st.data())
def test_rows_times_weight_is_the_convolution(axes: int, data: st.DataObject) -> None:
    shape = data.draw(shapes(axes))
    x, weight, y = layer(shape, data.draw(st.integers(0, 99)))
    found = rows(x, shape)
    assert found.shape == (2 * y[0, 0].numel(), shape.groups, weight[0].numel())
    expected = torch.stack([y[(b, slice(None), *at)] for b in range(2) for at in places(y)])
    assert torch.equal(outputs(y, shape), expected)
    assert torch.allclose(multiplied(found, weight, shape.groups), expected, rtol=1e-10, atol=1e-10)


def places(y: Tensor) -> list[tuple[int, ...]]:
    return [tuple(at) for at in torch.ones(y.shape[2:]).nonzero().tolist()]


@AXES
@given(st.data())
def test_keep_selects_positions(axes: int, data: st.DataObject) -> None:
    shape = data.draw(shapes(axes))
    x, _, y = layer(shape, 0)
    count = y[0, 0].numel()
    keep = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6, unique=True)))
    for whole, some in ((rows(x, shape), rows(x, shape, keep)), (outputs(y, shape), outputs(y, shape, keep))):
        assert torch.equal(some, whole.unflatten(0, (2, count))[:, keep].flatten(0, 1))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5)])
@pytest.mark.parametrize("keep", [None, [0]])
def test_a_linear_layer(shape: tuple[int, ...], keep: list[int] | None) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    chosen = None if keep is None else torch.tensor(keep)
    found = rows(x, Geometry(), chosen)
    expected = torch.nn.functional.linear(x, weight).reshape(3, -1, 7)
    expected = (expected if keep is None else expected[:, keep]).reshape(-1, 7)
    assert torch.allclose(found[:, 0] @ weight.T, expected)
    assert torch.allclose(outputs(torch.nn.functional.linear(x, weight), Geometry(), chosen), expected)


def test_windows_of_a_padded_convolution_are_zero_outside() -> None:
    view = windows(torch.ones(1, 1, 2), Geometry((3,), (1,), (1,), (1,)))
    assert view.tolist() == [[[[0, 1, 1]], [[1, 1, 0]]]]


def node(target: object, *args: object) -> Node:
    graph = Graph()
    inputs = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    return graph.call_function(target, (*inputs[:2], *args))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), Geometry((3, 2), (1, 1), (0, 0), (1, 1), 1)),
        ((None, [2], [1]), Geometry((3, 2), (2, 2), (1, 1), (1, 1), 1)),
        ((None, [2, 3], [1, 0], [1, 2], 4), Geometry((3, 2), (2, 3), (1, 0), (1, 2), 4)),
        ((None, 2, 1, 3), Geometry((3, 2), (2, 2), (1, 1), (3, 3), 1)),
    ],
)
def test_geometry_of_a_convolution_node(args: tuple[object, ...], expected: Geometry) -> None:
    assert geometry(node(CONVOLUTIONS[1], *args), torch.zeros(8, 1, 3, 2)) == expected


def test_geometry_of_a_linear_node() -> None:
    assert geometry(node(LINEAR), torch.zeros(4, 5)) == Geometry()


@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_moments_are_weighted_covariances(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = Moments(3, 2, torch.float64)
    seen = []
    for size in sizes:
        x, r, weight = (torch.rand(size, n, generator=generator, dtype=torch.float64) for n in (3, 2, 1))
        found.update(x, r, weight[:, 0])
        seen += list(zip(x, r, weight[:, 0].tolist(), strict=True))
    total = sum(weight for *_, weight in seen)
    mean_x, mean_r = (sum(row[i] * row[2] for row in seen) / total for i in (0, 1))
    xx = sum(w * torch.outer(x - mean_x, x - mean_x) for x, _, w in seen) / total
    rx = sum(w * torch.outer(r - mean_r, x - mean_x) for x, r, w in seen) / total
    for actual, expected in (
        (found.mean_x(), mean_x),
        (found.mean_r(), mean_r),
        (found.covariance(), xx),
        (found.centred_rx(), rx),
    ):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)
    assert found.weight == pytest.approx(total)


def test_moments_keep_their_own_precision() -> None:
    found = Moments(2, 1)
    found.update(torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float16), torch.ones(4))
    assert {one.dtype for one in (found.sum_x, found.sum_r, found.xx, found.rx)} == {torch.float32}


def test_a_covariance_is_the_end_of_counting() -> None:
    found = Moments(2, 1)
    rows_given = torch.randn(5, 2), torch.randn(5, 1), torch.ones(5)
    found.update(*rows_given)
    first = found.covariance().clone()
    assert torch.equal(found.covariance(), first)
    with pytest.raises(AssertionError, match="were turned into a covariance"):
        found.update(*rows_given)


# --- inputs that hardly vary -------------------------------------------------

INPUTS = 12


def _rows(kind: str, generator: torch.Generator) -> Tensor:
    """Rows [64, 12] float32 of a kind that sums of squares in float32 do badly on."""
    x = torch.randn(64, INPUTS, generator=generator)
    if kind == "constant":
        return x[:1].expand(64, INPUTS).clone()
    if kind == "constant but for rounding":
        return x[:1] * (1 + 1e-7 * torch.randn(64, INPUTS, generator=generator))
    if kind == "far from zero":
        return 1000 + x
    if kind == "of low rank":
        return x[:, :2] @ torch.randn(2, INPUTS, generator=generator)
    if kind == "with copies":
        return torch.cat([x[:, :6], x[:, :6]], 1)
    if kind == "with columns of zeros":
        return x * (torch.arange(INPUTS) % 3 > 0)
    if kind == "of nine orders of magnitude":
        return x * torch.logspace(0, 9, INPUTS)
    if kind == "of nine orders about as many means":
        return (x + 100) * torch.logspace(0, 9, INPUTS)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "too large to be squared":
        return x * 1e25
    assert kind == "one row"
    return x[:1]


KINDS = [
    "constant",
    "constant but for rounding",
    "far from zero",
    "of low rank",
    "with copies",
    "with columns of zeros",
    "of nine orders of magnitude",
    "of nine orders about as many means",
    "zero",
    "too large to be squared",
    "one row",
]


def _moments(x: Tensor, r: Tensor, weight: Tensor, damping: float = 0.01) -> Moments:
    """As a layer has them: once, and again where that was not precise."""
    first = Moments(INPUTS, r.shape[1])
    first.update(x, r, weight)
    if first.precise(damping):
        return first
    second = Moments(INPUTS, r.shape[1], torch.float64, around=first)
    second.update(x, r, weight)
    return second


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31))
def test_moments_are_those_of_float64_as_far_as_damping_can_tell(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = _rows(kind, generator)
    r, weight = torch.randn(len(x), 3, generator=generator), torch.rand(len(x), generator=generator) + 0.1
    moments = _moments(x, r, weight)
    wide, share = x.double(), (weight / weight.double().sum()).double()[:, None]
    mean_x, mean_r = (share * wide).sum(0), (share * r.double()).sum(0)
    xx = (share * (wide - mean_x)).T @ (wide - mean_x)
    rx = (r.double() - mean_r).T @ (share * (wide - mean_x))
    # What is added to the diagonal, or the noise that float32 inputs bring.
    damped = 0.01 * float(xx.diagonal().mean()) + 1e-9 * float((share * wide.square()).sum(0).mean())
    assert float((moments.covariance() - xx).norm()) <= 0.2 * damped
    assert torch.allclose(moments.mean_x().double(), mean_x, rtol=1e-4, atol=1e-4 * float(mean_x.abs().max()))
    assert torch.allclose(moments.mean_r().double(), mean_r, rtol=1e-4, atol=1e-4)
    assert float((moments.centred_rx() - rx).norm()) <= 1e-4 * float(rx.norm()) + damped**0.5 * 1e-2
    assert moments.mean_square() == pytest.approx(float((share * wide.square()).sum(0).mean()), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensate", [True, False])
@given(seed=st.integers(0, 2**31))
def test_feedback_on_such_inputs_is_no_worse_than_nearest(kind: str, compensate: bool, seed: int) -> None:
    """Of the output's variance; the mean is the bias' business."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = _rows(kind, generator), torch.randn(5, INPUTS, generator=generator)
    residual = 0.01 * product(x[:, None], weight)
    moments = _moments(x, residual, torch.ones(len(x)))
    config = TensorConfig(4, Granularity.PER_CHANNEL)
    record = round_by_feedback(weight, config, MinMax, [moments], Rounding(compensate=compensate))
    values = record.dequantize()
    assert bool(torch.isfinite(values).all())
    wide = (x - x.mean(0)).double()
    wanted = wide @ weight.double().T
    error = float((wide @ values.double().T - wanted).norm())
    nearest = round_by_feedback(
        weight,
        config,
        MinMax,
        [_moments(torch.zeros_like(x), residual, torch.ones(len(x)))],
        Rounding(compensate=False),
    ).dequantize()
    assert error <= 1.25 * float((wide @ nearest.double().T - wanted).norm()) + 0.05 * float(wanted.norm())
    # Along what never varied nothing was compensated: the weight stays within its own grid.
    assert float((values - weight).abs().max()) <= float(weight.abs().max())


def test_well_conditioned_rows_are_seen_once_in_float32() -> None:
    moments = _moments(torch.randn(64, INPUTS) + 0.5, torch.randn(64, 3), torch.ones(64))
    assert moments.covariance().dtype is torch.float32


def test_a_matrix_that_rounding_left_indefinite_is_damped_until_it_has_a_factor() -> None:
    vectors, _ = torch.linalg.qr(torch.randn(8, 8))
    matrix = vectors @ torch.diag(torch.tensor([4.0, 3, 2, 1, 1, 1, 1e-4, -1e-4])) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    before = matrix.clone()
    lower = factor(matrix)
    assert torch.allclose(lower @ lower.T, matrix, atol=1e-5)
    assert 0 < float((matrix - before).diagonal().max()) < 1e-3
    assert torch.equal(factor(torch.zeros(3, 3)), torch.eye(3))


def test_a_matrix_that_is_not_finite_has_no_factor() -> None:
    with pytest.raises(ValueError, match="second moments are NaN or infinite"):
        factor(torch.full((3, 3), float("nan")))
