"""One look-up of all scales, and one of all zero points, where each layer has a row of its own per timestep."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.numerics import ops


def hoist_tables(gm: GraphModule) -> None:
    """Look up the tables of all layers at once, in place: one gather instead of two small ones per layer.

    Before:  index_select(table_l, 0, row)  per layer l     After:  select(index_select(stack(tables), 1, row), 0, l)
    """
    for rows in [node for node in gm.graph.nodes if node.target == ops.row]:
        families: dict[tuple[torch.dtype, torch.Size], list[Node]] = {}
        for read in rows.users:
            if read.target == graph.aten.index_select.default and read.args[1:] == (0, rows):
                table = _stored_table(gm, read)
                if table.dtype in (torch.float32, torch.int32):
                    families.setdefault((table.dtype, table.shape), []).append(read)
        for reads in families.values():
            with gm.graph.inserting_after(rows):
                tables = torch.stack([_stored_table(gm, read) for read in reads])
                stack = graph.add_tensor(gm, "tables", tables)
            with gm.graph.inserting_after(stack):
                looked_up = gm.graph.call_function(graph.aten.index_select.default, (stack, 1, rows))
            for index, read in enumerate(reads):
                with gm.graph.inserting_after(looked_up):
                    read.replace_all_uses_with(gm.graph.call_function(graph.aten.select.int, (looked_up, 0, index)))
                gm.graph.erase_node(read)


def _stored_table(gm: GraphModule, read: Node) -> Tensor:
    """The tensor that an ``index_select`` reads; an empty one when it is computed."""
    source = read.args[0]
    assert isinstance(source, Node)
    return graph.attribute(gm, source) if source.op == "get_attr" else torch.empty(0, dtype=torch.bool)
