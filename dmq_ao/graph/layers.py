"""The layers of a graph, by the names that they have in the denoiser.

Original parameter names survive: ``parameter_name`` reads them off ``get_attr`` nodes at every stage.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao.graph.private import rows_depend_on_values

LAYER = "dmq_ao.layer"


SOURCE = "dmq_ao.source"  # on a node that reads a tensor of a layer record: (layer, field)


PREFIX = "denoiser."  # of every path of the denoiser's own modules


COMPUTED = "_computed"  # ends the name of a tensor that the code computes from stored ones


aten = torch.ops.aten


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


LINEAR = aten.linear.default


LOOKUP = aten.embedding.default


TABLE = "embedding table"  # kind of a layer that looks rows of its weight up, and multiplies nothing


# Ops with weights that no rule here quantizes; they are listed as kept, never forgotten.
OTHER_WEIGHTED = {
    aten.conv_transpose1d.default: "transposed convolution",
    aten.conv_transpose2d.input: "transposed convolution",
    aten.conv_transpose3d.input: "transposed convolution",
}


_NO_TENSOR = (torch.SymInt, torch.SymBool, torch.SymFloat, type(None))


@dataclass(frozen=True)
class Layer:
    """One weighted operator of the graph.

    Attributes:
        name: original module path of the weight.
        node: the operator; ``args[0]`` is the activation and ``args[1]`` the weight, ``args[0]`` that of a table.
        kind: ``conv1d``, ``conv2d``, ``conv3d``, ``linear``, ``TABLE``, or the words of ``OTHER_WEIGHTED``.
        ch_axis: channel axis of the activation: 1 for convolutions, the last for linears.
        quantizable: False where no rule exists; ``kind`` says why.
        numel: weights of the layer.
    """

    name: str
    node: Node
    kind: str
    ch_axis: int
    quantizable: bool
    numel: int


def name_layers(gm: GraphModule) -> None:
    """Write the names of the layers on their operators."""
    for layer in find_layers(gm):
        layer.node.meta[LAYER] = layer.name


def literal(name: str) -> str:
    """An ``fnmatch`` pattern that matches ``name`` and nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def parameter_name(node: Node) -> str:
    """Original dotted name of the tensor that a ``get_attr`` node reads."""
    return str(node.target).removeprefix(PREFIX)


def module_of(node: Node) -> str:
    """Path of the denoiser's module whose code a node comes from; empty for the denoiser's own, or where unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """The tensor [...] that a ``get_attr`` node reads."""
    return attribute_at(gm, str(node.target))


def attribute_at(gm: GraphModule, target: str) -> Tensor:
    """The tensor [...] at a dotted path of the graph module."""
    tensor: Tensor = operator.attrgetter(target)(gm)
    return tensor


def find_layers(gm: GraphModule) -> list[Layer]:
    """Every operator of a float graph that multiplies by a stored weight or looks its rows up, in graph order."""
    layers: list[Layer] = []
    counts: dict[str, int] = {}
    computed = _computed(gm)
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in CONVOLUTIONS or node.target == LINEAR:
            kind, weight, quantizable = str(node.target).split(".")[1], node.args[1], True
        elif node.target == LOOKUP:
            kind, weight, quantizable = TABLE, node.args[0], True
        elif node.target in OTHER_WEIGHTED:
            kind, weight, quantizable = OTHER_WEIGHTED[node.target], node.args[1], False
        else:
            continue
        if weight.op != "get_attr":
            continue
        name = parameter_name(weight).removesuffix(COMPUTED).removesuffix(".weight")
        count = counts[name] = counts.get(name, 0) + 1
        if quantizable and kind != TABLE and node.args[0] not in computed:
            kind, quantizable = f"{kind} on a stored tensor, the same in every call", False
        elif quantizable and rows_depend_on_values(node.args[0].meta.get("val")):
            kind, quantizable = f"{kind} on rows that are chosen by their values", False
        ndim = node.args[0].meta["val"].dim() if "val" in node.args[0].meta else 0
        if quantizable and kind != TABLE and 0 < ndim < _batched_axes(attribute(gm, weight), kind):
            kind, quantizable = f"{kind} on an input without a batch axis", False
        layers.append(
            Layer(
                name=name if count == 1 else f"{name}#{count}",
                node=node,
                kind=kind,
                ch_axis=ndim - 1 if node.target == LINEAR else 1,
                quantizable=quantizable,
                numel=attribute(gm, weight).numel(),
            )
        )
    return layers


def _batched_axes(weight: Tensor, kind: str) -> int:
    """The fewest axes of an input that has rows: batch and channels, and sizes for convolutions."""
    return weight.dim() if kind != "linear" else 2


def _computed(gm: GraphModule) -> set[Node]:
    """What depends on the inputs, if only on their sizes."""
    computed: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(source in computed for source in node.all_input_nodes):
            computed.add(node)
    return computed


def weight_of(node: Node) -> Node:
    """What a layer's node reads as its weight."""
    weight = node.args[0 if node.target == LOOKUP else 1]
    assert isinstance(weight, Node)
    return weight


def layer_nodes(gm: GraphModule) -> dict[str, Node]:
    """Operators by layer name, at any stage after ``capture``."""
    return {node.meta[LAYER]: node for node in gm.graph.nodes if LAYER in node.meta and node.op == "call_function"}


def reach(gm: GraphModule, start: set[Node], stop: Collection[Node] = ()) -> set[Node]:
    """``start`` and every tensor downstream of it; nodes in ``stop`` are neither entered nor passed.

    Sizes carry no data: a path through a symbolic integer, or a value described as no tensor, does not count.
    """
    reached = set(start)
    for node in gm.graph.nodes:
        if node not in stop and _carries_data(node) and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def reach_back(gm: GraphModule, targets: Collection[Node]) -> set[Node]:
    """All that has one of ``targets`` downstream, as ``reach`` has it; a target only where another one is."""
    upstream: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if _carries_data(node) and (node in targets or node in upstream):
            upstream.update(node.all_input_nodes)
    return upstream


def _carries_data(node: Node) -> bool:
    return not isinstance(node.meta.get("val", node), _NO_TENSOR)
