"""Rows times weight is the layer, for every geometry; moments against weighted sums in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from dmq_ao.algorithms.moments import Moments, outputs, rows, windows
from dmq_ao.graph import CONVOLUTIONS, LINEAR
from dmq_ao.graph.geometry import Geometry, geometry

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
