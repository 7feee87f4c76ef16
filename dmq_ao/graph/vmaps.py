"""Stretches of a graph under ``torch.vmap`` as calls of a region: begin and end stay with what is between."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

_BEGIN, _END = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def is_vmap(node: Node) -> bool:
    """Whether a node is one of those with which export writes a ``vmap`` down; no graph operator is."""
    return node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def enclose_vmaps(gm: GraphModule) -> None:
    """Put each stretch between the begin and the end of a ``vmap`` into a graph of its own, in place.

    Before:  begin, add_batch_dim, ..., remove_batch_dim, end        After:  wrap(body, x, w)

    The begin and the end are read by nobody, and would be removed as dead code.
    """
    stretch: list[Node] = []
    depth = count = 0
    for node in list(gm.graph.nodes):
        if is_vmap(node) and node.target.__name__ == _BEGIN:
            depth += 1
        if depth:
            stretch.append(node)
        if is_vmap(node) and node.target.__name__ == _END:
            depth -= 1
            if not depth:
                _enclose(gm, stretch, f"vmap_{count}")
                stretch, count = [], count + 1


def _enclose(gm: GraphModule, stretch: list[Node], name: str) -> None:
    inside = set(stretch)
    operands = list(dict.fromkeys(one for node in stretch for one in node.all_input_nodes if one not in inside))
    results = [node for node in stretch if any(user not in inside for user in node.users)]
    body = Graph()
    copies: dict[Node, Node] = {}
    for one in operands:
        copies[one] = body.placeholder(one.name)
        copies[one].meta = dict(one.meta)
    for node in stretch:
        copies[node] = body.node_copy(node, copies.__getitem__)
    ends = [node for node in stretch if is_vmap(node) and node not in results]  # so that somebody reads them
    body.output(tuple(copies[node] for node in [*results, *ends]))
    gm.add_module(name, GraphModule(gm, body))
    with gm.graph.inserting_before(stretch[0]):
        read = gm.graph.get_attr(name)
        call = gm.graph.call_function(torch.ops.higher_order.wrap, (read, *operands))
        for place, node in enumerate(results):
            item = gm.graph.call_function(operator.getitem, (call, place))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        gm.graph.erase_node(node)
