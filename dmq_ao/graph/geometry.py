"""How the windows of a convolution lie, read off its operator."""

from __future__ import annotations

from collections.abc import Sequence
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

    @classmethod
    def of(cls, node: Node, shape: Sequence[int]) -> Geometry:
        """That of a layer's ``node``, whose weight is of ``shape`` [out, in / groups, ...]."""
        if node.target == LINEAR:
            return cls()
        axes = len(shape) - 2
        defaults: list[object] = [None, None, None, [1], [0], [1], 1]
        args = [*node.args, *defaults[len(node.args) :]]
        stride, padding, dilation = (_each(value, axes) for value in args[3:6])
        groups = args[6]
        assert isinstance(groups, int)
        return cls(tuple(shape[2:]), stride, padding, dilation, groups)

    @property
    def is_linear(self) -> bool:
        """Whether there are no windows."""
        return not self.kernel

    @property
    def is_pointwise(self) -> bool:
        """Whether a convolution is one product of pixels by a matrix, for which linear kernels are the better ones."""
        plain = set(self.kernel) == set(self.stride) == {1} and set(self.padding) == {0}
        return plain and self.groups == 1

    @property
    def in_2d(self) -> Geometry:
        """That of a 1-d convolution as a 2-d one of height one; any other as it is."""
        if len(self.kernel) != 1:
            return self
        return Geometry((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)


def geometry(node: Node, weight: Tensor) -> Geometry:
    """Geometry of a layer's ``node``, whose weight is ``weight`` [out, in / groups, ...]."""
    return Geometry.of(node, weight.shape)


def _each(value: object, axes: int) -> tuple[int, ...]:
    numbers = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return tuple(numbers * axes if len(numbers) == 1 else numbers)
