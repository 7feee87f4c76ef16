"""Write attention out as two products and a softmax, so that what stands between them can be quantized."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import aten

PRODUCTS = "dmq_ao.attention"  # in a product's meta: the path of the module that the attention stands in


def decompose_attention(gm: GraphModule) -> GraphModule:
    """Replace every plain ``scaled_dot_product_attention`` of a captured float graph, in place.

    Before:  sdpa(q, k, v, mask)        After:  softmax(q @ k^T * scale + mask) @ v

    The two products are marked for ``DiffusionQuantizer``. Causal attention, dropout, boolean masks and grouped
    queries stay whole: no denoiser known to us has them.
    """
    for node in list(gm.graph.nodes):
        if node.target == aten.scaled_dot_product_attention.default and _is_plain(node):
            _write_out(gm, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _is_plain(node: Node) -> bool:
    mask, dropout, causal = _options(node)
    floating = mask is None or (isinstance(mask, Node) and mask.meta["val"].is_floating_point())
    return floating and not dropout and not causal and not node.kwargs.get("enable_gqa", False)


def _options(node: Node) -> tuple[Any, ...]:
    """Mask, dropout and causality, given by position or keyword."""
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = dict(zip(defaults, node.args[3:], strict=False))
    return tuple({**defaults, **given, **{k: v for k, v in node.kwargs.items() if k in defaults}}.values())


def _write_out(gm: GraphModule, node: Node) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, Node)
    mask = _options(node)[0]
    scale = node.kwargs.get("scale")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    with gm.graph.inserting_before(node):
        turned = _call(gm, node, aten.transpose.int, key, -2, -1)
        scores = _call(gm, node, aten.matmul.default, query, turned)
        scaled = _call(gm, node, aten.mul.Tensor, scores, scale)
        masked = scaled if mask is None else _call(gm, node, aten.add.Tensor, scaled, mask)
        weights = _call(gm, node, aten.softmax.int, masked, -1)
        result = _call(gm, node, aten.matmul.default, weights, value)
    for product in (scores, result):
        product.meta[PRODUCTS] = _module_of(node)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _call(gm: GraphModule, like: Node, target: Any, *args: Any) -> Node:
    """A node with the value's shape worked out, standing in the module that ``like`` stands in."""
    node = gm.graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def _module_of(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix(graph.PREFIX) if stack else node.name
