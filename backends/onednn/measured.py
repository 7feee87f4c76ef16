"""Which of oneDNN's kernels runs a layer, by the clock: int8, or float on values that were dequantized.

int8 loses where there is little to multiply: few channels, few rows, rows of a batch with scales of their own. Each
integer layer of the lowered graph is timed where it stands, in turns with the float product of the same shapes; the
slow ones are left in float when the graph is lowered again. Their input is still quantized and dequantized, so the
graph means what it meant.

The quantize step, which both have, and the dequantize step after it, which a compiler merges with it, are not timed.
The integer kernels are timed as ``dmq_ao.compile`` calls them by default; with ``mode="max"`` they start faster, which
counts where a product takes microseconds.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao import graph
from dmq_ao.backends.backend import Lowered
from dmq_ao.backends.onednn.lowering import lower_to_onednn
from dmq_ao.backends.onednn.operators import INTEGER_KERNELS
from dmq_ao.backends.products import FLOAT_KERNEL
from dmq_ao.evaluation import latency
from dmq_ao.graph.values import VAL, value_of
from dmq_ao.records import Kernel, LayerRecord

# By how much float must be faster: less may be the clock, and float moves four times the bytes around it.
FLOAT_MARGIN = 0.1
_CPU_REPEATS, _CPU_WARMUP = 7, 2
_TARGETS = tuple(kernel.target for kernel in INTEGER_KERNELS)

Calls = Mapping[str, Callable[[], object]]
LayerClock = Callable[[Calls], Mapping[str, float]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one layer on an input of ``shape``, by its integer kernels and by a float product."""

    integer_ms: float
    float_ms: float
    shape: tuple[int, ...]

    @property
    def why(self) -> str:
        """Why the layer runs in float; empty when it runs on integers."""
        if self.float_ms >= (1 - FLOAT_MARGIN) * self.integer_ms:
            return ""
        return f"measured: int8 {self.integer_ms:.2g} ms, float {self.float_ms:.2g} ms on {list(self.shape)}"


@dataclass(frozen=True, eq=False)
class FloatProduct:
    """What would run a layer in float.

    Attributes:
        target: the operator, a convolution or ``aten.linear``.
        codes: the node that holds the codes of the layer's input.
        weight: shape [out, in / groups, ...].
        bias: whether there is one.
        geometry: the operator's arguments after the bias.
        dtype: of input, weight and output.
    """

    target: Callable[..., Tensor]
    codes: Node
    weight: tuple[int, ...]
    bias: bool
    geometry: tuple[Any, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, node: Node, record: LayerRecord) -> FloatProduct:
        """That of a layer's node in the q/dq graph."""
        real, bias, geometry = node.args[0], (*node.args, None)[2], node.args[3:]
        assert isinstance(real, Node)
        assert callable(node.target)
        shape = tuple(record.weight.codes.shape)
        return cls(node.target, real.all_input_nodes[0], shape, bias is not None, geometry, _dtype(node))

    def call(self, shape: Sequence[int]) -> partial[Tensor]:
        """The product of an input [N, C, ...] or [..., in] and the weight, laid out as integer layers leave them."""
        x, weight = (_laid_out(torch.ones(size, dtype=self.dtype)) for size in (shape, self.weight))
        bias = torch.ones(self.weight[0], dtype=self.dtype) if self.bias else None
        return partial(self.target, x, weight, bias, *self.geometry)


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta[VAL].dtype
    return dtype


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def lower_by_layer_times(gm: GraphModule, records: Mapping[str, LayerRecord], inputs: Sequence[Tensor]) -> Lowered:
    """As ``lower_to_onednn``, in place, but layers that a float product runs faster on ``inputs`` are left in float.

    Layers that one kernel runs together stay or go together.

    Args:
        gm: a q/dq graph.
        records: of its layers.
        inputs: tensors [B, ...] that the graph is called with, once.
    """
    times = _layer_times(gm, records, inputs)

    def by_the_clock(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel | None:
        why = times[node.meta[graph.LAYER]].why
        return _left_in_float(gm, node, record, why) if why else None

    return lower_to_onednn(gm, records, by_the_clock)


def _layer_times(gm: GraphModule, records: Mapping[str, LayerRecord], inputs: Sequence[Tensor]) -> dict[str, Timing]:
    """Times of every integer layer of ``gm``, which stays as it is: lowering edits a graph."""
    products: dict[str, FloatProduct] = {}

    def note(_: GraphModule, node: Node, record: LayerRecord) -> None:
        products[node.meta[graph.LAYER]] = FloatProduct.of(node, record)

    lowered, _ = lower_to_onednn(GraphModule(gm, copy.deepcopy(gm.graph)), records, note)
    return timings(lowered, products, inputs)


def _left_in_float(gm: GraphModule, node: Node, record: LayerRecord, why: str) -> Kernel:
    """Leave a layer as it is, but for its weight: that is dequantized now, not in every call."""
    weight = _laid_out(record.weight.dequantize().to(_dtype(node)))
    with gm.graph.inserting_before(node):
        read = graph.add_tensor(gm, f"{record.name}.dequantized", weight)
    read.meta[VAL] = value_of(weight)
    bias_and_geometry = () if node.args[2:] == (None,) else node.args[2:]  # of joint layers; as export writes it
    node.args = (node.args[0], read, *bias_and_geometry)
    return Kernel(FLOAT_KERNEL, why)


def medians(calls: Calls) -> dict[str, float]:
    """Milliseconds of each call, made in turns."""
    return {name: timed.median_ms for name, timed in latency(calls, repeats=_CPU_REPEATS, warmup=_CPU_WARMUP).items()}


def timings(
    gm: GraphModule, products: Mapping[str, FloatProduct], inputs: Sequence[Tensor], clock: LayerClock = medians
) -> dict[str, Timing]:
    """Run a lowered graph once, and time its integer layers against float products on the way.

    Args:
        gm: from ``lower_to_onednn``.
        products: for each integer layer, what it is compared with.
        inputs: tensors [B, ...] of the graph.
        clock: tells the milliseconds of calls named ``int8`` and ``float``; asked once for layers that are alike.
    """
    run = _LayersByTheClock(gm, products, clock)
    with torch.no_grad():
        run.run(*inputs)
    return run.times


class _LayersByTheClock(Interpreter):
    """One run over a lowered graph; ``times`` has the layers that it came by."""

    def __init__(self, gm: GraphModule, products: Mapping[str, FloatProduct], clock: LayerClock) -> None:
        super().__init__(gm)
        self.products, self.clock = products, clock
        self.times: dict[str, Timing] = {}
        self._ends = {node: name for name, node in graph.layer_nodes(gm).items() if name in products}
        self._owners = {part: name for node, name in self._ends.items() for part in _parts(node)}
        self._shapes: dict[Node, tuple[int, ...]] = {product.codes: () for product in products.values()}
        self._calls: defaultdict[str, list[partial[Tensor]]] = defaultdict(list)
        self._alike: dict[tuple[object, ...], tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; a layer's last node also has the layer timed."""
        result = super().run_node(n)
        if n in self._shapes:
            self._shapes[n] = tuple(result.shape)
        if n in self._owners:
            assert callable(n.target)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._calls[self._owners[n]].append(partial(n.target, *args, **kwargs))
        if n in self._ends:
            name = self._ends[n]
            self.times[name] = self._timing(self.products[name], self._calls.pop(name))
        return result

    def _timing(self, product: FloatProduct, calls: Sequence[partial[Tensor]]) -> Timing:
        shape = self._shapes[product.codes]
        in_float = product.call(shape)
        key = tuple(_cost_key(call) for call in (in_float, *calls))
        if key not in self._alike:
            times = self.clock({"int8": lambda: [call() for call in calls], "float": in_float})
            self._alike[key] = times["int8"], times["float"]
        return Timing(*self._alike[key], shape)


def _parts(end: Node) -> list[Node]:
    """The integer kernels that end in a layer's last node, and their sums."""
    if end.target in _TARGETS:
        return [end]
    before = [part for source in end.all_input_nodes for part in _parts(source)]
    return [*before, end] if end.target is graph.aten.add.Tensor else before


def _cost_key(call: partial[Tensor]) -> tuple[object, ...]:
    """What the time of a call depends on: shapes, types, plain arguments, and whether rows differ in scale."""
    kinds: list[object] = [call.func]
    kinds += [(tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else str(arg) for arg in call.args]
    if call.func in _TARGETS:
        scale = call.args[1]
        kinds.append(bool((scale != scale[0]).any()))
    return tuple(kinds)
