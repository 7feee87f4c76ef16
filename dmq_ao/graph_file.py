"""A quantize/dequantize graph as JSON and back: to load it takes neither the model's code nor another export.

A node is ``{"name", "op", "target", "args", "kwargs", "val", "layer"}``. Operators are named and looked up among
torch's own and ours, so a file holds no code. A tensor that a node reads is named by where it is kept:
``{"record": [layer, field]}`` of a layer record, ``{"float": name}`` of the original model, ``{"constant": name}``
beside the graph.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from dmq_ao import graph
from dmq_ao.values import VAL, Value

_NAMESPACES = ("aten", "dmq_ao")
_WORDS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem"]
_WORDS += ["eq", "ne", "lt", "le", "gt", "ge"]
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{word}": getattr(operator, word) for word in _WORDS},
    **{f"math.{word}": getattr(math, word) for word in ("ceil", "floor", "trunc")},
    **{f"torch.{word}": getattr(torch, word) for word in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_LITERALS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


@dataclass(frozen=True, eq=False)
class StoredGraph:
    """A description as JSON text, and the tensors that only this graph has, by the name in ``{"constant": name}``."""

    text: str
    constants: Mapping[str, Tensor]


class NotStorable(ValueError):
    """A graph holds what this file format has no word for; the message names it."""


class NotReadable(ValueError):
    """A stored graph needs an operator that this PyTorch does not have; the message names it."""


def to_json(gm: GraphModule, float_names: Collection[str]) -> dict[str, Any]:
    """Describe a converted graph.

    Args:
        gm: after ``values.describe``.
        float_names: original names of the tensors that are kept as they are.

    Raises:
        NotStorable: for an operator or argument that the format does not know.
    """
    nodes = [_node_to_json(gm, node, float_names) for node in gm.graph.nodes if node.op != "output"]
    outputs = pytree.tree_flatten(gm.graph.output_node().args[0])[0]
    return {"nodes": nodes, "outputs": [_argument(value) for value in outputs], "single": _returns_one(gm)}


def _returns_one(gm: GraphModule) -> bool:
    """Whether the graph answers with a bare tensor.

    Raises:
        NotStorable: for anything but a tensor or a flat sequence of them.
    """
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None:  # a graph that returns what its last node says
        return isinstance(gm.graph.output_node().args[0], Node)
    spec = info.out_spec
    if spec.is_leaf():
        return True
    if spec.type not in (tuple, list) or any(not child.is_leaf() for child in spec.children()):
        raise NotStorable(f"an answer of the form {spec}")
    return False


def _node_to_json(gm: GraphModule, node: Node, float_names: Collection[str]) -> dict[str, Any]:
    if node.op not in ("placeholder", "get_attr", "call_function"):
        raise NotStorable(f"a node {node.op} {node.target}")
    stored: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        stored |= {"target": str(node.target), "from": _home(gm, node, float_names)}
    elif node.op == "call_function":
        stored |= {"target": _function_name(node.target), "args": _argument(node.args)["tuple"]}
        stored |= {"kwargs": {key: _argument(value) for key, value in node.kwargs.items()}} if node.kwargs else {}
    if VAL in node.meta:
        stored["val"] = _value_to_json(node.meta[VAL])
    if graph.LAYER in node.meta:
        stored["layer"] = node.meta[graph.LAYER]
    return stored


def _home(gm: GraphModule, node: Node, float_names: Collection[str]) -> dict[str, Any]:
    """Where the tensor that a node reads is kept."""
    if graph.SOURCE in node.meta:
        tensor = graph.attribute(gm, node)
        kept = {"shape": list(tensor.shape), "dtype": _word(tensor.dtype)}
        return {"record": list(node.meta[graph.SOURCE]), **kept}
    name = graph.parameter_name(node)
    return {"float": name} if name in float_names else {"constant": str(node.target)}


def stored(gm: GraphModule, float_names: Collection[str]) -> StoredGraph | None:
    """A converted graph as ``save`` writes it; None when it has no words for it, and ``load`` will export again."""
    try:
        description = to_json(gm, float_names)
    except NotStorable:
        return None
    return StoredGraph(json.dumps(description, allow_nan=False), _constants(gm, description))


def _constants(gm: GraphModule, description: Mapping[str, Any]) -> dict[str, Tensor]:
    homes = [node["from"] for node in description["nodes"] if node["op"] == "get_attr"]
    names = [home["constant"] for home in homes if "constant" in home]
    return {name: graph.attribute_at(gm, name).detach() for name in names}


def from_json(description: Mapping[str, Any], tensor: Callable[[str, Mapping[str, Any]], Tensor]) -> GraphModule:
    """Build the graph again.

    Args:
        description: from ``to_json``.
        tensor: given a path in the graph and a ``"from"``, the tensor that is kept there.

    Raises:
        NotReadable: for an operator that is not there.
        KeyError, TypeError, ValueError: for a description that is damaged.
    """
    root, built = nn.Module(), Graph()
    made: dict[str, Node] = {}
    for stored in description["nodes"]:
        node = _build(built, stored, made)
        if stored["op"] == "get_attr":
            graph.set_tensor(root, stored["target"], tensor(stored["target"], stored["from"]))
        if "val" in stored:
            node.meta[VAL] = _value_from_json(stored["val"])
        if "layer" in stored:
            node.meta[graph.LAYER] = stored["layer"]
        made[stored["name"]] = node
    outputs = [_read(value, made) for value in description["outputs"]]
    built.output(outputs[0] if description["single"] else tuple(outputs))
    return GraphModule(root, built)


def _build(built: Graph, stored: Mapping[str, Any], made: Mapping[str, Node]) -> Node:
    name, op = stored["name"], stored["op"]
    if op == "placeholder":
        return built.create_node(op, name, (), {}, name)
    if op == "get_attr":
        return built.create_node(op, stored["target"], (), {}, name)
    if op != "call_function":
        raise ValueError(f"node {name!r} is a {op!r}")
    args = tuple(_read(value, made) for value in stored["args"])
    kwargs = {key: _read(value, made) for key, value in stored.get("kwargs", {}).items()}
    return built.create_node(op, _function(stored["target"]), args, kwargs, name)


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise NotStorable(f"the operator {target}")


def _function(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if namespace not in _NAMESPACES or not packet.isidentifier():
        raise NotReadable(f"no operator {name!r} can stand in a stored graph")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise NotReadable(f"torch {torch.__version__} has no operator {name!r}")
    return found


def _argument(value: Any) -> Any:
    """An argument of a node in JSON; what JSON has no word for becomes an object of one key."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_argument(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_argument(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_argument(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for word, kind in _LITERALS.items():
        if isinstance(value, kind):
            return {word: _word(value)}
    raise NotStorable(f"an argument {value!r} of type {type(value).__name__}")


def _read(value: Any, made: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((word, inner),) = value.items()
    match word:
        case "node":
            return made[inner]
        case "float":
            return float(inner)
        case "tuple":
            return tuple(_read(item, made) for item in inner)
        case "slice":
            return slice(*(_read(item, made) for item in inner))
        case "device":
            return torch.device(inner)
    return _literal(word, inner)


def _literal(word: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if word not in _LITERALS or not isinstance(found, _LITERALS[word]):
        raise ValueError(f"no {word} is called {name!r}")
    return found


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Value):
        return {"shape": list(value.shape), "dtype": _word(value.dtype)}
    return [_value_to_json(item) for item in value] if isinstance(value, tuple) else None


def _value_from_json(stored: Any) -> Any:
    if isinstance(stored, dict):
        return Value(tuple(stored["shape"]), _literal("dtype", stored["dtype"]))
    return tuple(_value_from_json(item) for item in stored) if isinstance(stored, list) else None


def read_dtype(name: str) -> torch.dtype:
    """A dtype by its short name, ``"float32"``.

    Raises:
        ValueError: when there is none.
    """
    dtype: torch.dtype = _literal("dtype", name)
    return dtype
