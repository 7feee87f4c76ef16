"""Attention as one kernel of our own, in bfloat16: as an operator, or written out as two products and a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.onednn.matching import behind, has_one_reader, rank_of, width_of
from dmq_ao.graph import aten
from dmq_ao.graph.values import VAL, Value


def fuse_attention(gm: GraphModule, node: Node) -> None:
    """Attention without mask, in bfloat16."""
    if len(node.args) != 3 or set(node.kwargs) - {"scale"}:
        return
    q, k, v = (one for one in node.args if isinstance(one, Node))
    width = width_of(q)
    if width and {width_of(k), width_of(v)} == {width} and all(rank_of(one) == 4 for one in (q, k, v)):
        scale = node.kwargs.get("scale")
        _put_attention(gm, node, (q, k, v), float(width) ** -0.5 if scale is None else scale)


def fuse_written_out_attention(gm: GraphModule, node: Node) -> None:
    """``softmax(q @ k.transpose(1, 2) * scale, -1) @ v`` of one head, [B, N, D] each."""
    shares, v = node.args
    assert isinstance(shares, Node)
    assert isinstance(v, Node)
    softmax, _ = behind(shares, None)
    if softmax.target is not aten.softmax.int or softmax.args[1] not in (-1, 2) or not has_one_reader(softmax):
        return
    scaled, _ = behind(softmax.all_input_nodes[0], None)
    scale: Any = 1.0
    product = scaled
    if scaled.target is aten.mul.Tensor and has_one_reader(scaled):
        product, scale = scaled.args  # type: ignore[assignment]
    if not isinstance(scale, float) or product.target is not aten.matmul.default or not has_one_reader(product):
        return
    q, transpose = product.args
    assert isinstance(q, Node)
    assert isinstance(transpose, Node)
    swaps = ((1, 2), (2, 1), (-1, -2), (-2, -1))
    if transpose.target is not aten.transpose.int or tuple(transpose.args[1:]) not in swaps:
        return
    heads = (q, transpose.all_input_nodes[0], v)
    if len({width_of(one) for one in heads}) != 1 or any(rank_of(one) != 3 for one in heads):
        return
    with gm.graph.inserting_before(node):
        single = tuple(gm.graph.call_function(aten.unsqueeze.default, (one, 1)) for one in heads)
    for one, whole in zip(single, heads, strict=True):
        batch, *rest = whole.meta[VAL].shape
        one.meta[VAL] = Value((batch, 1, *rest), whole.meta[VAL].dtype)
    _put_attention(gm, node, single, scale, squeeze=True)


def _put_attention(gm: GraphModule, node: Node, heads: tuple[Node, ...], scale: Any, *, squeeze: bool = False) -> None:
    width = width_of(heads[0])
    if width is None or width % 2 or not (isinstance(scale, float) and scale > 0):
        return
    if any(one.meta[VAL].dtype != torch.bfloat16 for one in heads):
        return
    with gm.graph.inserting_before(node):
        fast = gm.graph.call_function(torch.ops.dmq_ao_cpu.attention.default, (*heads, scale))
        if squeeze:
            fast = gm.graph.call_function(aten.squeeze.dim, (fast, 1))
    graph.replace_node(node, fast)
