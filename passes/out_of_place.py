"""Operators that change a tensor in place, where nobody else reads it, as those that make a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from dmq_ao.graph import aten
from dmq_ao.graph.private import OpOverload, mutates_arguments, operator_arguments, schema_of
from dmq_ao.graph.values import VAL, value_of

# Views that can be written back, and the operator that does it.
_WRITTEN_BACK = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def out_of_place(gm: GraphModule) -> None:
    """Replace in-place operators by their twins, in place, and memory that is not filled by zeros.

    Before:  arange -> div_(.., 96)                     After:  arange -> div(.., 96)
             empty_like -> slice(..) -> copy_(.., x)            zeros_like -> slice_scatter(.., x, ..)

    Only where the changed tensor is a result of its own, not a view, an input or a stored tensor, and has no other
    reader: elsewhere the change is meant to be seen. A part of such a result may be written while others wait for it.
    """
    for node in list(gm.graph.nodes):
        twin = _twin(node.target) if node.op == "call_function" else None
        if twin is not None and _is_fresh(node.all_input_nodes[0]) and len(node.all_input_nodes[0].users) == 1:
            node.target = twin
        elif (twin is not None or node.target is aten.copy_.default) and not node.users:
            _write_back(gm, node, None if node.target is aten.copy_.default else twin)
    for node in gm.graph.nodes:
        if node.target is aten.empty_like.default:
            node.target = aten.zeros_like.default
    gm.recompile()


def _write_back(gm: GraphModule, change: Node, twin: OpOverload | None) -> None:
    """A change of a part of a result, as a new result that later readers take; left alone where others see both.

    Args:
        gm: the graph.
        change: an in-place operator on the part.
        twin: that computes what the part is changed to; None for ``copy_``, which is told.
    """
    part = change.args[0]
    assert isinstance(part, Node)
    parts = []
    while part.target in _WRITTEN_BACK and len(part.users) == 1:
        parts.append(part)
        part = part.all_input_nodes[0]
    if not parts or not _is_fresh(part) or _has_other_views(part, parts, change):
        return
    if twin is None and _value_shape(parts[0]) != _value_shape(change.args[1]):
        return
    with gm.graph.inserting_before(change):
        value = change.args[1] if twin is None else gm.graph.call_function(twin, change.args, change.kwargs)
        if twin is not None:
            value.meta = dict(parts[0].meta)  # type: ignore[union-attr]
        for view in parts:
            whole, *place = view.args
            assert isinstance(whole, Node)
            value = gm.graph.call_function(_WRITTEN_BACK[view.target], (whole, value, *place))  # type: ignore[index]
            value.meta = dict(whole.meta)
    assert isinstance(value, Node)
    part.replace_all_uses_with(value, delete_user_cb=lambda user: change < user)
    for node in (change, *parts):
        if not node.users:  # a part of a part is still read
            gm.graph.erase_node(node)


def _value_shape(value: Any) -> Any:
    """Of a node; nothing else is equal to it."""
    description = value_of(value.meta.get(VAL)) if isinstance(value, Node) else None
    return object() if description is None else description.shape


def _has_other_views(whole: Node, parts: list[Node], change: Node) -> bool:
    """Whether what was made from ``whole`` before ``change``, and may share its memory, is read after it."""
    views = [user for user in whole.users if user not in parts and user < change and not _makes_new(user)]
    return any(_is_read_after(view, change) for view in views)


def _is_read_after(view: Node, change: Node) -> bool:
    """Whether a view, or a view of it, has a reader after ``change``."""
    return any(change < reader or (not _makes_new(reader) and _is_read_after(reader, change)) for reader in view.users)


def mutates(node: Node) -> bool:
    """Whether an operator changes one of its arguments."""
    return mutates_arguments(node.target)


def _twin(target: Any) -> OpOverload | None:
    """The operator without the underscore and with the same arguments, None if there is none."""
    if not isinstance(target, OpOverload) or target.namespace != "aten" or not mutates_arguments(target):
        return None
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    twin = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or not isinstance(twin, OpOverload):
        return None
    own, other = ([one.name for one in operator_arguments(operator)] for operator in (twin, target))
    return twin if own == other else None


def _is_fresh(value: Node) -> bool:
    return value.op == "call_function" and _makes_new(value)


def _makes_new(node: Node) -> bool:
    """Whether an operator's results share no memory with its arguments."""
    schema = schema_of(node.target) if isinstance(node.target, OpOverload) else None
    return schema is not None and all(result.alias_info is None for result in schema.returns)
