"""Where a denoiser's features are taken from its graph: what its last norm reads, or what a named module gives."""

from __future__ import annotations

import difflib

from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.algorithms.blocks import belongs, is_static
from dmq_ao.graph import aten
from dmq_ao.quantizer.prepared import state_of

_MAP_NORMS = {aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default}
_TOKEN_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


def find_feature_node(prepared: GraphModule, tap: str | None) -> tuple[Node, int]:
    """The node whose value stands for what a denoiser sees.

    Args:
        prepared: from ``dmq_ao.prepare``.
        tap: path of a module; None for the output of the last block: what the last layer's norm reads, or where there
            is none, what the last layer reads, but for operators on each element by itself.

    Returns:
        The node, of value [B, C, ...] or [B, ..., C], and the channel axis.

    Raises:
        ValueError: for a path that is no module, naming close ones; where there are no features with a row for each
            sample.
    """
    node = _before_the_last_norm(prepared) if tap is None else _output_of(prepared, tap)
    batch = graph.placeholders(prepared)[graph.signature_of(prepared).batch].meta["val"].shape[0]
    if node is None or not _holds_features(node) or str(node.meta["val"].shape[0]) != str(batch):
        what = "the denoiser's last block" if tap is None else f"tap {tap!r}"
        raise ValueError(
            f"{what} gives no floating tensor [batch, channels, ...] or [batch, tokens, channels]; name a module that"
            " does with Relation(tap=...)"
        )
    return node, _ch_axis(node, node.meta["val"].dim())


def _holds_features(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2


def _before_the_last_norm(prepared: GraphModule) -> Node | None:
    reachable = graph.reach(prepared, {graph.placeholders(prepared)[graph.signature_of(prepared).batch]})
    layers = [node for node in graph.layer_nodes(prepared).values() if node in reachable]
    if not layers:
        return None
    node = _observed(layers[-1].args[0])
    while node not in layers:
        if node.target in _MAP_NORMS | _TOKEN_NORMS:
            return _observed(node.args[0])
        sources = [_observed(source) for source in node.all_input_nodes if source in reachable]
        if len(sources) != 1 or _shape(sources[0]) != _shape(node):
            break
        node = sources[0]
    return node


def _observed(node: object) -> Node:
    """What stands before an observer, which lets it through."""
    assert isinstance(node, Node)
    return _observed(node.args[0]) if node.op == "call_module" else node


def _shape(node: Node) -> str:
    """Comparing symbolic sizes themselves would add guards."""
    return str(tuple(node.meta["val"].shape))


def _output_of(prepared: GraphModule, tap: str) -> Node | None:
    tree = state_of(prepared).skeleton
    paths = [] if tree is None else [name for name, _ in tree.named_modules() if name]
    if tree is not None and tap not in paths:
        close = difflib.get_close_matches(tap, paths, n=5, cutoff=0.4)
        raise ValueError(f"tap {tap!r} is no module of {type(tree).__name__}; close ones are {close}")
    own = {node: None for node in prepared.graph.nodes if belongs(node, tap) and not is_static(node)}
    live = [node for node in own if _holds_features(node) and any(user not in own for user in node.users)]
    return live[-1] if live else None


def _ch_axis(node: Node, dims: int) -> int:
    """By the first norm or layer that reads the features, element-wise operators apart; else maps have C first."""
    same = {node}
    for reader in node.graph.nodes:
        if not same.intersection(reader.all_input_nodes):
            continue
        if reader.target in {*_MAP_NORMS, *graph.CONVOLUTIONS}:
            return 1
        if reader.target in {*_TOKEN_NORMS, graph.LINEAR}:
            return dims - 1
        if reader.op == "call_module" or (_holds_features(reader) and _shape(reader) == _shape(node)):
            same.add(reader)
    return 1 if dims > 3 else dims - 1
