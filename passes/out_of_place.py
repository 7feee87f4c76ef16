"""Operators that change a tensor in place, where nobody else reads it, as those that make a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node


def out_of_place(gm: GraphModule) -> None:
    """Replace in-place operators by their twins, in place.

    Before:  arange -> div_(.., 96)      After:  arange -> div(.., 96)

    Only where the changed tensor is a result of its own, not a view, an input or a stored tensor, and has no other
    reader: elsewhere the change is meant to be seen.
    """
    for node in gm.graph.nodes:
        twin = _twin(node.target) if node.op == "call_function" else None
        if twin is not None and _is_fresh(node.all_input_nodes[0]):
            node.target = twin
    gm.recompile()


def mutates(node: Node) -> bool:
    """Whether an operator changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _twin(target: Any) -> torch._ops.OpOverload | None:
    """The operator without the underscore and with the same arguments, None if there is none."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    found = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or not isinstance(found, torch._ops.OpOverload):
        return None
    same = [one.name for one in found._schema.arguments] == [one.name for one in target._schema.arguments]
    return found if same else None


def _is_fresh(value: Node) -> bool:
    if value.op != "call_function" or len(value.users) != 1 or not isinstance(value.target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in value.target._schema.returns)
