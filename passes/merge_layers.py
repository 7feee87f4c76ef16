"""Layers that compute the same from the same are one: some checkpoints hold a copy of an embedder for every block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.passes.out_of_place import mutates, out_of_place

PROBES = 16  # numbers of a tensor that are looked at before all are compared


def merge_layers(gm: GraphModule) -> dict[str, str]:
    """Leave the first of layers with equal weights, biases and inputs, in place.

    Before:  linear(silu(t), w_1), linear(silu(t), w_2), w_1 == w_2      After:  linear(silu(t), w_1), read twice

    Inputs are equal where the graph computes them by the same operators from equal values; a graph that changes
    tensors which others read is left alone.

    Returns:
        Names of the layers that are gone, each with that which is read instead.
    """
    same = _equal_tensors(gm)
    weights = [same[graph.weight_of(layer.node)] for layer in graph.find_layers(gm)]
    if len(set(weights)) == len(weights):
        return {}
    out_of_place(gm)
    if any(mutates(node) for node in gm.graph.nodes):
        return {}
    first: dict[Node, graph.Layer] = {}
    values = _values(gm, same)
    stand_ins = {}
    for layer in graph.find_layers(gm):
        twin = first.setdefault(values[layer.node], layer)
        if twin is not layer:
            layer.node.replace_all_uses_with(twin.node)
            stand_ins[layer.name] = twin.name
    if stand_ins:
        graph.drop_unused(gm)
        graph.name_layers(gm)
    return stand_ins


def _equal_tensors(gm: GraphModule) -> dict[Node, Node]:
    """For every node that reads a stored tensor, the first that reads an equal one."""
    alike: defaultdict[Hashable, list[Node]] = defaultdict(list)
    same: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        tensor = graph.attribute(gm, node) if node.op == "get_attr" else None
        if not isinstance(tensor, Tensor):
            continue
        others = alike[_fingerprint(tensor)]
        same[node] = next((n for n in others if _equal(graph.attribute(gm, n), tensor)), node)
        if same[node] is node:
            others.append(node)
    return same


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (not one.is_meta and torch.equal(one, other))


def _fingerprint(tensor: Tensor) -> Hashable:
    """The same for equal tensors, and seldom for others."""
    if tensor.is_meta:
        return tensor.shape, tensor.dtype, tensor.device
    flat = tensor.detach().flatten()
    probes = flat[:: max(1, len(flat) // PROBES)][:PROBES]
    return tensor.shape, tensor.dtype, tensor.device, tuple(probes.tolist())


def _values(gm: GraphModule, same: dict[Node, Node]) -> dict[Node, Node]:
    """For every node the first that has the same value."""
    values: dict[Node, Node] = {}
    first_of: dict[Hashable, Node] = {}
    for node in gm.graph.nodes:
        values[node] = same.get(node, node)
        if node.op == "call_function" and not _is_random(node):
            key = (node.target, _key(node.args, values), _key(node.kwargs, values))
            values[node] = first_of.setdefault(key, node)
    return values


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _key(argument: Any, values: dict[Node, Node]) -> Hashable:
    """Arguments as something to compare: nodes by their values, the rest by type and text."""
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, (list, tuple)):
        return tuple(_key(item, values) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _key(item, values)) for name, item in sorted(argument.items()))
    return type(argument), repr(argument)
