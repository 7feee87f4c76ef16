"""How the rows of a graph's values belong to samples: found out by what each value does when samples change places.

Guidance inside the denoiser doubles the batch, frames, windows and heads become rows, tokens may come before samples:
a value's rows need not be the samples. The graph runs on a few samples, on the same in other orders, and on half of
them. A layout is right where the value changes places as the samples did, for orders that make up all others.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import size_rules
from dmq_ao.samples.graph_samples import GraphSamples

# Of a value's largest element: what kernels of another batch may round otherwise.
_TOLERANCE = 1e-3
# How much better another layout must fit: values that are the same for all samples fit any, but for rounding.
_CLEARLY = 10
_MOST = 32


@dataclass(frozen=True)
class Layout:
    """A value with rows of each sample: along ``axis`` lie ``outer`` times all samples, of each ``inner`` rows."""

    outer: int = 1
    inner: int = 1
    axis: int = 0

    @property
    def per_sample(self) -> int:
        """Rows of a sample."""
        return self.outer * self.inner

    def channel(self, ch_axis: int) -> int:
        """Where the channel axis ``ch_axis`` stands after ``by_sample`` and joining its first two axes."""
        return ch_axis + 1 if ch_axis < self.axis else ch_axis

    def by_sample(self, x: Tensor, count: int) -> Tensor:
        """A value of ``count`` samples as [count, rows of a sample, ...]."""
        x = x.movedim(self.axis, 0)
        if self.outer == 1:  # as it lies in memory
            rows: Tensor = x.unflatten(0, (count, self.inner))
        else:
            rows = x.unflatten(0, (self.outer, count, self.inner)).transpose(0, 1).flatten(1, 2)
        return rows

    def pick(self, parts: Sequence[tuple[Any, Tensor, int]]) -> Tensor:
        """The value of some samples: of each part, a batch's value, those at places [m] of its so many samples."""
        chosen = [self.by_sample(item, size)[places.to(item.device)] for item, places, size in parts]
        if self.outer == 1:
            rows = torch.cat([x.flatten(0, 1) for x in chosen])
        else:
            rows = torch.cat(chosen).unflatten(1, (self.outer, self.inner)).transpose(0, 1).flatten(0, 2)
        return rows.movedim(0, self.axis)


@dataclass(frozen=True)
class SharedValue:
    """A value that is the same whatever the samples are."""

    def by_sample(self, x: Tensor, count: int) -> Tensor:
        """[count, rows, ...]: every sample has all of it; a vector is one row."""
        rows = x[None] if x.dim() == 1 else x
        return rows.expand(count, *rows.shape)

    def channel(self, ch_axis: int) -> int:
        """As of a ``Layout``."""
        return ch_axis

    def pick(self, parts: Sequence[tuple[Any, Tensor, int]]) -> Any:
        """As of a ``Layout``."""
        return parts[0][0]


@dataclass(frozen=True)
class Count:
    """A whole number that grows with the number of samples."""

    base: int
    slope: int

    def pick(self, parts: Sequence[tuple[Any, Tensor, int]]) -> int:
        """As of a ``Layout``."""
        return self.base + self.slope * sum(len(places) for _, places, _ in parts)


@dataclass(frozen=True)
class Several:
    """A list or tuple of values."""

    items: tuple[RowLayout, ...]

    def pick(self, parts: Sequence[tuple[Any, Tensor, int]]) -> list[Any]:
        """As of a ``Layout``."""
        picked = []
        for index, item in enumerate(self.items):
            assert not isinstance(item, Mixed)
            picked.append(item.pick([(whole[index], places, size) for whole, places, size in parts]))
        return picked


@dataclass(frozen=True)
class Mixed:
    """A value whose rows cannot be told apart by sample: samples meet in them, or lie in an order of their own."""


RowLayout: TypeAlias = Layout | SharedValue | Count | Several | Mixed


def is_known(layout: RowLayout) -> bool:
    """Whether the value of some samples can be picked out of that of all."""
    if isinstance(layout, Several):
        return all(map(is_known, layout.items))
    return not isinstance(layout, Mixed)


def row_layouts(prepared: GraphModule, samples: GraphSamples) -> dict[Node, RowLayout]:
    """The layout of every value that the graph computes from its inputs.

    Args:
        prepared: its observers let values through, and see nothing.
        samples: a few of them are looked at.

    Raises:
        ValueError: for a graph that does not take batches of a few samples and of twice as many.
    """
    half = _half(prepared, samples)
    some = samples.spread(2 * half)
    rows = torch.arange(2 * half, device="cpu") % len(some)
    swap = torch.tensor([1, 0, *range(2, 2 * half)])
    turn = torch.arange(2 * half, device="cpu").roll(-1)
    batches = [some.batch(order) for order in (rows, rows[swap], rows[turn], rows[:half])]
    return _lockstep(prepared, [batch.arguments for batch in batches], (swap, turn), 2 * half)


def _half(prepared: GraphModule, samples: GraphSamples) -> int:
    """Half of how many samples to look at: the graph may want batches of an even number, or of so many frames."""
    rules = graph.signature_of(prepared).rules

    def broken(count: int) -> str | None:
        shapes = {name: (count, *x.shape[1:]) for name, x in samples.per_sample.items()}
        return size_rules.broken(rules, shapes | {name: tuple(x.shape) for name, x in samples.shared.items()})

    for count in range(2, _MOST + 1):
        if broken(count) is None and broken(2 * count) is None:
            return count
    raise ValueError(
        f"the denoiser was captured for some numbers of samples alone: {broken(2) or broken(4)}. Prepare it with"
        " another number, example_inputs=samples.example(4); where its code makes a Python number of a batch's size,"
        " as int(x.shape[0]) or range(len(x)) do, let it do without"
    )


def _lockstep(
    prepared: GraphModule, runs: Sequence[list[Tensor]], orders: tuple[Tensor, Tensor], count: int
) -> dict[Node, RowLayout]:
    """Run the graph on several inputs at once, node by node, so that no value lives longer than it is read."""
    inputs = iter(zip(*runs, strict=True))
    values: dict[Node, tuple[Any, ...]] = {}
    layouts: dict[Node, RowLayout] = {}
    last = {source: node for node in prepared.graph.nodes for source in node.all_input_nodes}
    with torch.no_grad():
        for node in prepared.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = next(inputs)
            else:
                values[node] = tuple(_value_of_node(prepared, node, values, run) for run in range(len(runs)))
            layouts[node] = SharedValue() if node.op == "get_attr" else _layout_of(values[node], orders, count)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]
    return layouts


def _value_of_node(prepared: GraphModule, node: Node, values: Mapping[Node, tuple[Any, ...]], run: int) -> Any:
    if node.op == "get_attr":
        return graph.attribute(prepared, node)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: values[source][run])
    if node.op == "call_module":  # an observer
        return args[0]
    if node.op == "call_method":
        return operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _layout_of(value: tuple[Any, ...], orders: tuple[Tensor, Tensor], count: int) -> RowLayout:
    """Of a value as computed from ``count`` samples, from them in two other orders, and from half of them."""
    whole, *others, part = value
    if isinstance(whole, (list, tuple)):
        return Several(tuple(_layout_of(items, orders, count) for items in zip(*value, strict=True)))
    if isinstance(whole, int) and not isinstance(whole, bool):
        slope, left = divmod(whole - part, count // 2)
        return Mixed() if left else Count(whole - slope * count, slope) if slope else SharedValue()
    if not isinstance(whole, Tensor):
        return SharedValue() if all(one == whole for one in (*others, part)) else Mixed()
    if whole.shape == part.shape and all(_equal_but_rounding(whole, one) for one in (*others, part)):
        return SharedValue()
    if whole.dim() != part.dim():
        return Mixed()
    axes = [axis for axis in range(whole.dim()) if whole.shape[axis] != part.shape[axis]]
    if len(axes) != 1 or whole.shape[axes[0]] != 2 * part.shape[axes[0]] or whole.shape[axes[0]] % count:
        return Mixed()
    return _arrangement(whole, others, orders, count, axes[0])


def _arrangement(
    whole: Tensor, others: Sequence[Tensor], orders: tuple[Tensor, Tensor], count: int, axis: int
) -> RowLayout:
    """The arrangement under which the rows change places as the samples do, and best if there are several."""
    rows = whole.shape[axis] // count
    best, least = None, 0.0
    for inner in [n for n in range(rows, 0, -1) if rows % n == 0]:
        layout = Layout(rows // inner, inner, axis)
        by_sample = layout.by_sample(whole, count)
        pairs = [
            (by_sample[order.to(whole.device)], layout.by_sample(other, count))
            for order, other in zip(orders, others, strict=True)
        ]
        if all(_equal_but_rounding(left, right) for left, right in pairs):
            apart = sum(float((_all_finite(left) - _all_finite(right)).abs().sum()) for left, right in pairs)
            if best is None or apart < least / _CLEARLY:
                best, least = layout, apart
    return best or Mixed()


def _equal_but_rounding(left: Tensor, right: Tensor) -> bool:
    """Whether two values are the same but for rounding, and of equal shape."""
    if left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    if not torch.equal(left.isfinite(), right.isfinite()):
        return False
    left, right = _all_finite(left), _all_finite(right)
    largest = left.abs().max() if left.numel() else torch.zeros(())
    return bool(((left - right).abs() <= _TOLERANCE * largest).all())


def _all_finite(x: Tensor) -> Tensor:
    """The same in float64, 0 where it is not finite."""
    x = x.double()
    return torch.where(x.isfinite(), x, 0.0)
