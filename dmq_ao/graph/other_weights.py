"""Weights that no layer reads: recurrent cells, einsum, products with a parameter, what stands inside regions."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao.graph.layers import PREFIX, attribute, find_layers, parameter_name
from dmq_ao.graph.private import OpOverload
from dmq_ao.graph.regions import name_of_region

# Between a stored tensor and the operator that multiplies by it: the same numbers, elsewhere or in another dtype.
_MOVED = {"t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"}
_MOVED |= {"to", "_to_copy", "contiguous", "clone", "detach", "alias", "chunk", "split", "unbind", "select", "slice"}
_MOVED |= {"numpy_T", "mT", "movedim", "swapaxes", "repeat", "getitem"}
# Operators with a weight that multiply nothing by it but single numbers, and tables that are added.
_SINGLE = {"add", "sub", "rsub", "mul", "div", "layer_norm", "group_norm", "instance_norm", "batch_norm", "rms_norm"}
_SINGLE |= {"prelu", "addcmul", "where", "cat", "stack", "copy", "copy_", "sym_size", "_assert_tensor_metadata"}


@dataclass(frozen=True)
class OtherWeight:
    """A stored matrix, or more than that, that stays in float because no rule quantizes what reads it.

    Attributes:
        name: of the tensor, without ``.weight``.
        kind: the operator or region that reads it.
        numel: its elements.
        why: in words for a report.
    """

    name: str
    kind: str
    numel: int
    why: str


def other_weights(gm: GraphModule) -> list[OtherWeight]:
    """Every stored tensor of two or more axes that something else than a layer multiplies by, in graph order."""
    layers = find_layers(gm)
    own = {source for layer in layers for source in layer.node.all_input_nodes}
    layer_names = {layer.name for layer in layers}
    weights: dict[str, OtherWeight] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if node in own or not str(node.target).startswith(PREFIX):
            continue
        tensor = attribute(gm, node)
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        name = parameter_name(node).removesuffix(".weight")
        reader = next((one for one in _readers(node) if _word(one) not in _SINGLE), None)
        if reader is not None and name not in weights:
            kind, why = _described(reader)
            weights[name] = OtherWeight(
                name if name not in layer_names else f"{name}#other", kind, tensor.numel(), why
            )
    return list(weights.values())


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if _word(user) in _MOVED:
            yield from _readers(user)
        elif user.op == "call_function":
            yield user


def _word(node: Node) -> str:
    if isinstance(node.target, OpOverload):
        return str(node.target).split(".")[1]
    return "getitem" if node.target is operator.getitem else node.name


def _described(node: Node) -> tuple[str, str]:
    region = name_of_region(node)
    if not region:
        word = _word(node)
        return word, f"no rule quantizes {word}, which multiplies by it"
    if region == "wrap":
        return "inside vmap", "inside torch.vmap, which a graph of layers cannot show"
    if region == "wrap_with_autocast":
        return "inside autocast", "inside torch.autocast around code that a graph keeps apart"
    word = region.removesuffix("_impl")
    return f"inside {word}", f"inside torch's {word}: which of its code runs, or how often, is known in a call only"


def operators_of(gm: GraphModule) -> dict[str, int]:
    """How often each operator is called, most first: of the graph, and of the regions in it."""
    counts: dict[str, int] = {}
    for module in (one for one in gm.modules() if isinstance(one, GraphModule)):
        for node in module.graph.nodes:
            if node.op == "call_function":
                word = name_of_region(node) or _word(node)
                counts[word] = counts.get(word, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
