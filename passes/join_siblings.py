"""One product where several linears read the same codes (queries, keys and values of an attention)."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph.values import VAL, Value
from dmq_ao.records import LayerRecord

_VIEWS = (graph.aten.view.default, graph.aten.reshape.default)


def join_siblings(gm: GraphModule, records: Mapping[str, LayerRecord]) -> dict[str, tuple[str, ...]]:
    """Join linears of one quantized input, in place.

    Before:  linear(x, w_q), linear(x, w_k), linear(x, w_v)      After:  split(linear(x, [w_q; w_k; w_v]))

    Each output is the same sum as before, and a view of the joint result; outputs that somebody flattens stay alone.

    Args:
        gm: a converted graph, before it is lowered.
        records: of the layers that may be joined.

    Returns:
        Names of the joint layers, ``a+b+c``, and their members; ``records.joint_record`` makes their records.
    """
    nodes = {name: node for name, node in graph.layer_nodes(gm).items() if name in records}
    families: dict[tuple[object, ...], list[str]] = {}
    for name, node in nodes.items():
        record = records[name]
        plain = record.weight.scale.shape[1] == 1 and _has_stored_bias(node)
        if node.target == graph.LINEAR and plain and not _is_flattened(node):
            has_votes = record.activation is not None and record.activation.exponents is not None
            # Wider codes may not be shifted; where nothing is, the width does not matter.
            weight = record.weight
            key = (node.args[0], weight.bits if has_votes else None, weight.symmetric, weight.float8)
            families.setdefault(key, []).append(name)
    joint = {}
    for members in families.values():
        if len(members) > 1:
            name = "+".join(members)
            _join(gm, name, [nodes[member] for member in members], [records[member] for member in members])
            joint[name] = tuple(members)
    return joint


def join_projections(gm: GraphModule) -> None:
    """Join float linears of one vector [B, C], in place: what every block makes of the timestep's embedding.

    Before:  linear(silu(t), w_1), linear(silu(t), w_2) ..      After:  split(linear(silu(t), [w_1; w_2; ..]))

    Each is a product of a few rows, whose cost is that of calling it.
    """
    families: dict[tuple[object, ...], list[Node]] = {}
    for node in gm.graph.nodes:
        if node.target == graph.LINEAR and _is_projection(node) and not _is_flattened(node):
            vector = node.all_input_nodes[0]
            before = vector.all_input_nodes[0] if vector.target is graph.aten.silu.default else None
            families.setdefault((before or vector, before is None, len(node.args)), []).append(node)
    for nodes in families.values():
        if len(nodes) > 1:
            _join_floats(gm, nodes)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _has_stored_bias(node: Node) -> bool:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias is None or isinstance(bias, Node) and bias.op == "get_attr"


def _is_projection(node: Node) -> bool:
    vector, *tensors = node.all_input_nodes
    value = vector.meta.get(VAL)
    is_stored = all(tensor.op == "get_attr" for tensor in tensors)
    return is_stored and isinstance(value, Value) and value.dim() == 2 and value.dtype.is_floating_point


def _join_floats(gm: GraphModule, nodes: Sequence[Node]) -> None:
    columns = zip(*(node.all_input_nodes[1:] for node in nodes), strict=True)
    tensors = [torch.cat([graph.attribute(gm, read).detach() for read in column]) for column in columns]
    sizes = [len(graph.attribute(gm, node.all_input_nodes[1])) for node in nodes]
    with gm.graph.inserting_before(nodes[0]):
        reads = [graph.add_tensor(gm, "projections", tensor) for tensor in tensors]
        total = gm.graph.call_function(graph.LINEAR, (nodes[0].args[0], *reads))
        _replace_by_parts(gm, total, nodes, sizes)


def _is_flattened(node: Node) -> bool:
    """Whether a reader wants the output without gaps: it views it with fewer axes, or who knows how."""
    value = node.meta.get(VAL)
    if not isinstance(value, Value):
        return True
    views = [user.meta.get(VAL) for user in node.users if user.target in _VIEWS]
    return any(not isinstance(view, Value) or view.dim() < value.dim() for view in views)


def _join(gm: GraphModule, name: str, nodes: Sequence[Node], records: Collection[LayerRecord]) -> None:
    sizes = [len(record.weight.scale) for record in records]
    first: Value = nodes[0].meta[VAL]
    call = gm.graph.call_function
    with gm.graph.inserting_before(nodes[0]):
        bias = _bias(gm, name, nodes, sizes, first.dtype)
        total = call(graph.LINEAR, (nodes[0].args[0], nodes[0].args[1], bias))
        total.meta[graph.LAYER] = name
        _replace_by_parts(gm, total, nodes, sizes)


def _replace_by_parts(gm: GraphModule, total: Node, nodes: Sequence[Node], sizes: Sequence[int]) -> None:
    """Replace ``nodes`` by the parts of ``total``, at the insertion point."""
    first: Value = nodes[0].meta[VAL]
    total.meta[VAL] = Value((*first.shape[:-1], sum(sizes)), first.dtype)
    parts = gm.graph.call_function(graph.aten.split_with_sizes.default, (total, list(sizes), -1))
    parts.meta[VAL] = tuple(node.meta[VAL] for node in nodes)
    for index, node in enumerate(nodes):
        part = gm.graph.call_function(operator.getitem, (parts, index))
        part.meta[VAL] = node.meta[VAL]
        node.replace_all_uses_with(part)
    for node in nodes:
        gm.graph.erase_node(node)


def _bias(gm: GraphModule, name: str, nodes: Sequence[Node], sizes: Sequence[int], dtype: torch.dtype) -> Node | None:
    biases_of = [node.args[2] if len(node.args) > 2 else None for node in nodes]
    if not any(isinstance(bias, Node) for bias in biases_of):
        return None
    biases: list[Tensor] = [
        graph.attribute(gm, bias).detach() if isinstance(bias, Node) else torch.zeros(size, dtype=dtype)
        for bias, size in zip(biases_of, sizes, strict=True)
    ]
    return graph.add_tensor(gm, f"{name}.bias".replace("+", "_"), torch.cat(biases))
