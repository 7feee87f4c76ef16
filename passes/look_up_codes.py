"""Embedding tables stay codes: rows are looked up first and dequantized then."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.numerics import ops


def look_up_codes(gm: GraphModule) -> list[str]:
    """Dequantize the rows that are looked up and not whole tables, in place.

    Before:  embedding(dequantize_weight(codes, scale, zero_point), indices)
    After:   look_up(codes, scale, zero_point, indices)

    Returns:
        Names of the layers.
    """
    names = []
    for name, node in graph.layer_nodes(gm).items():
        table = node.args[0]
        if node.target != graph.LOOKUP or not isinstance(table, Node) or table.target != ops.dequantize_weight:
            continue
        *codes, dtype = table.args
        with gm.graph.inserting_before(node):
            graph.replace_node(node, gm.graph.call_function(ops.look_up, (*codes, node.args[1], dtype)))
        names.append(name)
    return names
