"""Write attention out as two products and a softmax, so that what stands between them can be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import aten

PRODUCTS = "dmq_ao.attention"  # in a product's meta: the path of the module that the attention stands in


def decompose_attention(gm: GraphModule) -> GraphModule:
    """Replace every ``scaled_dot_product_attention`` of a captured float graph, in place.

    Before:  sdpa(q, k, v, mask)        After:  softmax(q @ k^T * scale + mask) @ v

    The two products are marked for ``DiffusionQuantizer``. Boolean masks and causality become ``where`` on the scores
    (a row that sees nothing answers 0, as in the operator), heads that share keys and values get copies of them.
    Dropout stays whole, see ``whole_attention``.
    """
    for node in list(gm.graph.nodes):
        if node.target == aten.scaled_dot_product_attention.default and not _why_whole(node):
            _write_out(gm, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def whole_attention(gm: GraphModule) -> dict[str, str]:
    """The modules whose attention is not written out, each with the reason."""
    reasons = {}
    for node in gm.graph.nodes:
        if node.target == aten.scaled_dot_product_attention.default:
            reasons[_module_of(node)] = _why_whole(node)
        elif graph.name_of_region(node) == "flex_attention":
            reasons[_module_of(node)] = (
                "flex_attention, whose scores are any function's; scaled_dot_product_attention can be quantized"
            )
    return reasons


def _why_whole(node: Node) -> str:
    _, dropout, _ = _options(node)
    query, key = (one.meta["val"].shape for one in node.args[:2])  # type: ignore[union-attr]
    widths = [query[-1]] if node.kwargs.get("scale") is None else []
    widths += [query[-3], key[-3]] if node.kwargs.get("enable_gqa", False) else []
    if not all(isinstance(size, int) for size in widths):
        return "attention whose heads, or their width, are sizes of an input and not fixed by a weight"
    return f"attention with dropout of {dropout}, which draws: call .eval() on the module" if dropout else ""


def _options(node: Node) -> tuple[Any, ...]:
    """Mask, dropout and causality, given by position or keyword."""
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    positional = dict(zip(defaults, node.args[3:], strict=False))
    return tuple({**defaults, **positional, **{k: v for k, v in node.kwargs.items() if k in defaults}}.values())


def _write_out(gm: GraphModule, node: Node) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    mask, _, causal = _options(node)
    scale = node.kwargs.get("scale")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    with gm.graph.inserting_before(node):
        if node.kwargs.get("enable_gqa", False):
            key, value = (_copied_heads(gm, node, query, one) for one in (key, value))
        if causal:
            mask = _causal_mask(gm, node, query, key)
        key_t = _call(gm, node, aten.transpose.int, key, -2, -1)
        scores = _call(gm, node, aten.matmul.default, query, key_t)
        scaled = _call(gm, node, aten.mul.Tensor, scores, scale)
        boolean = mask is not None and mask.meta["val"].dtype == torch.bool
        if boolean:
            lowest = torch.finfo(scaled.meta["val"].dtype).min
            masked = _call(gm, node, aten.where.ScalarOther, mask, scaled, lowest)
        else:
            masked = scaled if mask is None else _call(gm, node, aten.add.Tensor, scaled, mask)
        weights = _call(gm, node, aten.softmax.int, masked, -1)
        mixed = result = _call(gm, node, aten.matmul.default, weights, value)
        if boolean and not causal:
            sees = _call(gm, node, aten.any.dim, mask, -1, True)
            result = _call(gm, node, aten.where.ScalarOther, sees, mixed, 0.0)
    for product in (scores, mixed):
        product.meta[PRODUCTS] = _module_of(node)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _copied_heads(gm: GraphModule, node: Node, query: Node, shared: Node) -> Node:
    """Keys or values [..., heads, tokens, C] once for each head of the query that reads them."""
    copies = query.meta["val"].shape[-3] // shared.meta["val"].shape[-3]
    return _call(gm, node, aten.repeat_interleave.self_int, shared, copies, -3)


def _causal_mask(gm: GraphModule, node: Node, query: Node, key: Node) -> Node:
    """[tokens of the query, tokens of the key] bool, True where a token is seen: up to its own place."""
    rows, columns = (_call(gm, node, aten.sym_size.int, one, -2) for one in (query, key))
    kind = {"dtype": torch.bool, "device": query.meta["val"].device}
    ones = gm.graph.call_function(aten.ones.default, ([rows, columns],), kind)
    ones.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    ones.meta["val"] = query.meta["val"].new_ones((rows.meta["val"], columns.meta["val"]), dtype=torch.bool)
    return _call(gm, node, aten.tril.default, ones)


def _call(gm: GraphModule, like: Node, target: Any, *args: Any) -> Node:
    """A node with the value's shape worked out, standing in the module that ``like`` stands in."""
    node = gm.graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def _module_of(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix(graph.PREFIX) if stack else node.name
