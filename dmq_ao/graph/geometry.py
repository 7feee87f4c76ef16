"""How the windows of a convolution lie, read off its operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from dmq_ao.graph.layers import LINEAR


@dataclass(frozen=True)
class Geometry:
    """How a convolution's windows lie; a linear layer has none.

    Attributes:
        kernel: window, one number a spatial axis; empty for a linear layer.
        stride: likewise, and so are the rest.
        padding: zeros on each side.
        dilation: distance of the window's taps.
        groups: of a grouped convolution.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def geometry(node: Node, weight: Tensor) -> Geometry:
    """Geometry of a layer's ``node``, whose weight is ``weight`` [out, in / groups, ...]."""
    if node.target == LINEAR:
        return Geometry()
    axes = weight.dim() - 2
    defaults: list[object] = [None, None, None, [1], [0], [1], 1]
    args = [*node.args, *defaults[len(node.args) :]]
    stride, padding, dilation = (_each(value, axes) for value in args[3:6])
    groups = args[6]
    assert isinstance(groups, int)
    return Geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)


def _each(value: object, axes: int) -> tuple[int, ...]:
    numbers = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return tuple(numbers * axes if len(numbers) == 1 else numbers)
