"""Questions about a node and what stands before it, for the rewrites of ``fused``."""

from __future__ import annotations

import torch
from torch.fx import Node

from dmq_ao.graph import aten
from dmq_ao.graph.values import VAL


def rank_of(node: Node) -> int:
    """Number of axes."""
    return int(node.meta[VAL].dim())


def width_of(node: Node) -> int | None:
    """Size of the last axis, if the graph fixes it."""
    size = node.meta[VAL].shape[-1]
    return size if isinstance(size, int) else None


def has_one_reader(node: Node) -> bool:
    """Whether one node reads it, so that nothing else misses it."""
    return len(node.users) == 1


def behind(node: Node, target: object) -> tuple[Node, Node | None]:
    """The node before ``target``, past what changes no value, and ``target``'s node; the node itself if not there."""
    while has_one_reader(node) and (node.target is aten.clone.default or _is_float_cast(node)):
        node = node.all_input_nodes[0]
    if target is None or node.target is not target or not has_one_reader(node):
        return node, None
    return node.all_input_nodes[0], node


def _is_float_cast(node: Node) -> bool:
    return node.target is aten.to.dtype and isinstance(node.args[1], torch.dtype) and node.args[1].is_floating_point
