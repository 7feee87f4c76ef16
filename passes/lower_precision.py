"""Half-width floats between integer layers: norms, activations, additions and shortcuts move half the bytes."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import aten
from dmq_ao.graph.kernels import KernelOperator
from dmq_ao.graph.values import VAL, Value
from dmq_ao.numerics import ops
from dmq_ao.passes.out_of_place import mutates, out_of_place

# Where values only move: what comes in narrow goes out narrow.
_MOVES = {
    operator.getitem,
    aten.cat.default,
    aten.chunk.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.movedim.int,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.stack.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.upsample_nearest2d.vec,
    aten.view.default,
}
# Computed in float32 whatever comes in, by eager kernels and by Inductor; only the result is rounded.
_POINTWISE = {
    aten.add.Tensor,
    aten.div.Tensor,
    aten.gelu.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softmax.int,
    aten.sub.Tensor,
    aten.tanh.default,
}
_NORMS = {aten.group_norm.default, aten.layer_norm.default}
# Summed in float32; the operands must be of one type.
_PRODUCTS = {
    *graph.CONVOLUTIONS,
    graph.LINEAR,
    aten.avg_pool2d.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
}


def lower_precision(
    gm: GraphModule, kernels: Iterable[KernelOperator] = (), dtype: torch.dtype = torch.bfloat16
) -> GraphModule:
    """Make integer kernels write ``dtype``, and the operators between them read and write it.

    Before:  kernel(.., float32) -> group_norm -> silu -> quantize      After:  kernel(.., bfloat16) -> ...

    Sums are still taken in float32. Operators that this pass does not know get float32 back, inputs and outputs of the
    graph keep their type, and so do vectors [B, C] and all that is before any integer kernel (the embedding of the
    timestep): they are few, and stand for every pixel.

    Args:
        gm: a lowered float32 graph; stays as it is.
        kernels: of the backend that it was lowered to: those that write a dtype start what is narrow, and products
            of floats keep it.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        Another graph of the same tensors; a copy of ``gm`` where nothing can be narrower.
    """
    narrow = GraphModule(gm, copy.deepcopy(gm.graph))
    out_of_place(narrow)
    changed = next((node for node in narrow.graph.nodes if mutates(node)), None)
    if changed is not None:
        warnings.warn(
            f"{changed.target} changes a tensor in place: the graph stays in its own precision", stacklevel=2
        )
        return narrow
    _Narrowing(narrow, list(kernels), dtype).run()
    narrow.graph.eliminate_dead_code()
    narrow.recompile()
    return narrow


class _Narrowing:
    """One walk over a graph; ``narrow`` holds the nodes whose values are of the narrow type by now."""

    def __init__(self, gm: GraphModule, kernels: Sequence[KernelOperator], dtype: torch.dtype) -> None:
        self.gm, self.dtype = gm, dtype
        self.narrow: set[Node] = set()
        self.writers = {kernel.target for kernel in kernels if kernel.writes_dtype}
        self.products = {*_PRODUCTS, *(kernel.target for kernel in kernels if not kernel.writes_dtype)}

    def run(self) -> None:
        """Visit every node once, inputs first."""
        for node in list(self.gm.graph.nodes):
            if node.target in self.writers and node.args[-1] == torch.float32 and not _is_vectors(node):
                node.args = (*node.args[:-1], self.dtype)
                self._mark(node)
            elif any(source in self.narrow for source in node.all_input_nodes):
                self._visit(node)

    def _visit(self, node: Node) -> None:
        if node.target is ops.quantize:
            return
        if node.target is aten._assert_tensor_metadata.default:
            self.gm.graph.erase_node(node)
        elif node.target is aten.to.dtype and node.args[1] == torch.float32:  # meant its own type, which changed
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif node.target in _MOVES or node.target in self.products:
            self._cast(node, self._wide(node.all_input_nodes), self.dtype)
            self._mark(node)
        elif node.target in _NORMS:
            self._mark(node)
        elif node.target in _POINTWISE and "dtype" not in node.kwargs and len(node.args) < 3:
            if self._wide(node.all_input_nodes):
                self._round(node)
            else:
                self._mark(node)
        else:
            self._cast(node, [source for source in node.all_input_nodes if source in self.narrow], torch.float32)

    def _wide(self, nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if node not in self.narrow and _is_float32(node)]

    def _mark(self, node: Node) -> None:
        self.narrow.add(node)
        if VAL in node.meta:
            node.meta[VAL] = _retyped(node.meta[VAL], self.dtype)

    def _round(self, node: Node) -> None:
        """Narrow the result of a node that also reads a wide value."""
        with self.gm.graph.inserting_after(node):
            rounded = self.gm.graph.call_function(aten.to.dtype, (node, self.dtype))
        rounded.meta = dict(node.meta)
        node.replace_all_uses_with(rounded, lambda user: user is not rounded)
        self._mark(rounded)

    def _cast(self, node: Node, sources: list[Node], dtype: torch.dtype) -> None:
        for source in sources:
            with self.gm.graph.inserting_before(node):
                if source.op == "get_attr":  # once, now, rather than in every call
                    tensor = graph.attribute(self.gm, source).detach().to(dtype)
                    cast = graph.add_tensor(self.gm, f"{source.target}.{_dtype_name(dtype)}", tensor)
                else:
                    cast = self.gm.graph.call_function(aten.to.dtype, (source, dtype))
            cast.meta = {**source.meta, VAL: _retyped(source.meta.get(VAL), dtype)}
            node.replace_input_with(source, cast)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_float32(node: Node) -> bool:
    value = node.meta.get(VAL)
    return isinstance(value, Value) and value.dtype == torch.float32


def _is_vectors(node: Node) -> bool:
    value = node.meta.get(VAL)
    return isinstance(value, Value) and len(value.shape) == 2


def _retyped(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_retyped(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Value) else value
