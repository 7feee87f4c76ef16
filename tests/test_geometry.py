"""How windows lie, and which convolutions are a product of pixels or lie in a plane."""

import pytest
from torch.fx import Graph, Node

from dmq_ao.graph import CONVOLUTIONS, LINEAR
from dmq_ao.graph.geometry import Geometry


def node(target: object, *args: object) -> Node:
    built = Graph()
    return built.call_function(target, (built.placeholder("x"), built.placeholder("w"), *args))  # type: ignore[arg-type]


def test_a_linear_has_no_windows() -> None:
    assert Geometry.of(node(LINEAR), (4, 5)) == Geometry()
    assert Geometry().is_linear
    assert not Geometry().is_pointwise


@pytest.mark.parametrize(
    ("shape", "pointwise"),
    [
        (Geometry((1, 1), (1, 1), (0, 0), (1, 1)), True),
        (Geometry((1,), (1,), (0,), (1,)), True),
        (Geometry((1, 1), (1, 1), (0, 0), (2, 2)), True),  # one tap is nowhere else
        (Geometry((1, 1), (1, 2), (0, 0), (1, 1)), False),
        (Geometry((1, 1), (1, 1), (0, 1), (1, 1)), False),
        (Geometry((1, 1), (1, 1), (0, 0), (1, 1), 2), False),
        (Geometry((1, 3), (1, 1), (0, 0), (1, 1)), False),
    ],
)
def test_one_tap_on_every_pixel_is_a_product_of_pixels(shape: Geometry, pointwise: bool) -> None:
    assert shape.is_pointwise is pointwise
    assert not shape.is_linear


def test_one_axis_is_a_plane_of_height_one() -> None:
    shape = Geometry.of(node(CONVOLUTIONS[0], None, [2], [1], [3], 2), (8, 4, 5))
    assert shape == Geometry((5,), (2,), (1,), (3,), 2)
    assert shape.in_2d == Geometry((1, 5), (1, 2), (0, 1), (1, 3), 2)
    assert shape.in_2d.in_2d == shape.in_2d


def test_a_single_number_counts_for_every_axis() -> None:
    assert Geometry.of(node(CONVOLUTIONS[1], None, 2, [1]), (8, 4, 3, 2)) == Geometry((3, 2), (2, 2), (1, 1), (1, 1))
