"""Weights that the code computes from stored tensors (weight_norm, spectral_norm, casts, masks), computed once."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao.graph.edit import drop_unused, set_tensor
from dmq_ao.graph.layers import (
    COMPUTED,
    CONVOLUTIONS,
    LINEAR,
    LOOKUP,
    OTHER_WEIGHTED,
    PREFIX,
    aten,
    attribute,
    module_of,
)
from dmq_ao.graph.private import OpOverload, mutates_arguments
from dmq_ao.graph.values import VAL

_DTYPE_CASTS = (aten.to.dtype, aten._to_copy.default)


def compute_weights(gm: GraphModule) -> None:
    """Give the layers weights and biases that are read and not computed, in place.

    Before:  conv2d(x, _weight_norm(v, g), b)      After:  conv2d(x, weight, b)

    A computed tensor is kept where the layer's module would have it; one that is only cast, in the stored one's place
    where nothing else reads that.
    """
    computed: set[Node] = set()
    for layer in list(gm.graph.nodes):
        for what, node in _tensors_of(layer):
            if node.op == "call_function" and _is_stored(gm, node):
                computed |= set(_sources(node)[:-1])
                _store(gm, layer, what, node)
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default and computed >= set(node.all_input_nodes):
            gm.graph.erase_node(node)  # it would keep what it checks
    if computed:
        drop_unused(gm)


def _tensors_of(node: Node) -> Iterator[tuple[str, Node]]:
    """What an operator reads as weight and bias."""
    if node.op != "call_function":
        return
    if node.target in CONVOLUTIONS or node.target == LINEAR or node.target in OTHER_WEIGHTED:
        places = {"weight": 1, "bias": 2}
    elif node.target == LOOKUP:
        places = {"weight": 0}
    else:
        return
    for what, place in places.items():
        if len(node.args) > place and isinstance(node.args[place], Node):
            yield what, node.args[place]  # type: ignore[misc]


def _is_stored(gm: GraphModule, node: Node) -> bool:
    """Whether a value depends on nothing but stored tensors, and is the same in every call."""
    sources = _sources(node)
    if not all(one.op in ("get_attr", "call_function") for one in sources):
        return False
    if any(one.op == "get_attr" and not isinstance(attribute(gm, one), Tensor) for one in sources):
        return False
    calls = [one for one in sources if one.op == "call_function"]
    return any(one.op == "get_attr" for one in sources) and all(_is_pure(one) for one in calls)


def _is_pure(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    return not mutates_arguments(node.target) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _sources(node: Node) -> list[Node]:
    """A node and all that it is computed from, in graph order."""
    sources, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in sources:
                sources.add(source)
                waiting.append(source)
    return sorted(sources)


def _stored_value(gm: GraphModule, node: Node) -> Tensor:
    interpreter = Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        for one in _sources(node):
            interpreter.env[one] = interpreter.run_node(one)
    value = interpreter.env[node]
    assert isinstance(value, Tensor)
    return value.detach().clone()


def _store(gm: GraphModule, layer: Node, what: str, node: Node) -> None:
    value, target = _stored_value(gm, node), _place(gm, layer, what, node)
    with gm.graph.inserting_before(node):
        set_tensor(gm, target, value)
        read = gm.graph.get_attr(target)
    read.meta = dict(node.meta)
    read.meta[VAL] = node.meta[VAL]
    node.replace_all_uses_with(read)
    gm.graph.erase_node(node)


def _place(gm: GraphModule, layer: Node, what: str, node: Node) -> str:
    """Where a computed tensor is kept: a name that the layer is known by."""
    sources = _sources(node)
    reads = [one for one in sources if one.op == "get_attr"]
    path = module_of(layer)
    target = f"{PREFIX}{path}.{what}"
    if path and not _exists(gm, target):
        return target
    casts = all(one in reads or one.target in _DTYPE_CASTS for one in sources)
    if casts and set(reads[0].users) <= set(sources) and len(_users_of_value(gm, reads[0])) == 1:
        return str(reads[0].target)
    alike = [str(one.target) for one in reads if one.meta[VAL].shape == node.meta[VAL].shape]
    target = (alike[0] if alike else f"{PREFIX}{layer.name}.{what}") + COMPUTED
    while _exists(gm, target):
        target += COMPUTED
    return target


def _users_of_value(gm: GraphModule, read: Node) -> list[Node]:
    return [node for node in gm.graph.find_nodes(op="get_attr") if node.target == read.target]


def _exists(gm: GraphModule, target: str) -> bool:
    module: object = gm
    for part in target.split("."):
        module = getattr(module, part, None)
        if module is None:
            return False
    return True
