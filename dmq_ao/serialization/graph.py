"""A quantize/dequantize graph as JSON and back: to load it takes neither the model's code nor another export.

A node is ``{"name", "op", "target", "args", "kwargs", "val", "layer"}``. A tensor that a node reads is named by where
it is kept: ``{"record": [layer, field]}`` of a layer record, ``{"float": name}`` of the original model,
``{"constant": name}`` beside the graph.

torch.fx writes a graph as Python source. So nothing that stands in a file is passed on to it but numbers, words in
quotes and operators of ``operators.ALLOWED``: names are given anew, and keywords are those of the operator's schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import private
from dmq_ao.graph.values import VAL, Value
from dmq_ao.serialization import operators

MAX_NODES = 40_000
MAX_LIST = 10_000
MAX_DEPTH = 8
DTYPES = frozenset({"bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128"})
DTYPES |= {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYS = {
    "placeholder": {"name", "op", "val", "layer"},
    "get_attr": {"name", "op", "target", "from", "val", "layer"},
    "call_function": {"name", "op", "target", "args", "kwargs", "val", "layer"},
}
_LITERALS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


@dataclass(frozen=True, eq=False)
class StoredGraph:
    """A description as JSON text, and the tensors [...] of this graph alone, by the name in ``{"constant": name}``."""

    text: str
    constants: Mapping[str, Tensor]


class NotStorable(ValueError):
    """A graph holds what this file format has no word for; the message names it."""


def to_json(gm: GraphModule, float_names: Collection[str]) -> dict[str, Any]:
    """Describe a converted graph.

    Args:
        gm: after ``values.replace_fake_tensors``.
        float_names: original names of the tensors that are kept as they are.

    Raises:
        NotStorable: for an operator or argument that the format does not know.
    """
    nodes = [_node_to_json(gm, node, float_names) for node in gm.graph.nodes if node.op != "output"]
    outputs = private.leaves(gm.graph.output_node().args[0])
    return {"nodes": nodes, "outputs": [_argument_to_json(value) for value in outputs], "single": _returns_one(gm)}


def _returns_one(gm: GraphModule) -> bool:
    """Whether the graph answers with a bare tensor.

    Raises:
        NotStorable: for anything but a tensor or a flat sequence of them.
    """
    spec = private.answer_spec(gm)
    if spec is None:  # a graph that returns what its last node says
        return isinstance(gm.graph.output_node().args[0], Node)
    if spec.is_leaf():
        return True
    if spec.type not in (tuple, list) or any(not child.is_leaf() for child in spec.children()):
        raise NotStorable(f"an answer of the form {spec}")
    return False


def _node_to_json(gm: GraphModule, node: Node, float_names: Collection[str]) -> dict[str, Any]:
    if node.op not in _KEYS:
        raise NotStorable(f"a node {node.op} {node.target}")
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        entry |= {"target": str(node.target), "from": _home(gm, node, float_names)}
    elif node.op == "call_function":
        entry |= {"target": _function_name(node.target), "args": _argument_to_json(node.args)["tuple"]}
        entry |= (
            {"kwargs": {key: _argument_to_json(value) for key, value in node.kwargs.items()}} if node.kwargs else {}
        )
    if VAL in node.meta:
        entry["val"] = _value_to_json(node.meta[VAL])
    if graph.LAYER in node.meta:
        entry["layer"] = node.meta[graph.LAYER]
    return entry


def _home(gm: GraphModule, node: Node, float_names: Collection[str]) -> dict[str, Any]:
    """Where the tensor that a node reads is kept."""
    if graph.SOURCE in node.meta:
        tensor = graph.attribute(gm, node)
        layout = {"shape": list(tensor.shape), "dtype": _torch_name(tensor.dtype)}
        return {"record": list(node.meta[graph.SOURCE]), **layout}
    name = graph.parameter_name(node)
    return {"float": name} if name in float_names else {"constant": str(node.target)}


def stored(gm: GraphModule, float_names: Collection[str]) -> StoredGraph:
    """A converted graph as ``save`` writes it.

    Raises:
        NotStorable: when the format has no words for it.
    """
    description = to_json(gm, float_names)
    return StoredGraph(json.dumps(description, allow_nan=False), _constants(gm, description))


def _constants(gm: GraphModule, description: Mapping[str, Any]) -> dict[str, Tensor]:
    homes = [node["from"] for node in description["nodes"] if node["op"] == "get_attr"]
    names = [home["constant"] for home in homes if "constant" in home]
    return {name: graph.attribute_at(gm, name).detach() for name in names}


def from_json(description: Mapping[str, Any], tensor: Callable[[str, Mapping[str, Any]], Tensor]) -> GraphModule:
    """Build the graph again; the nodes have names of their own.

    Args:
        description: from ``to_json``, or anything that JSON can be.
        tensor: a function from a path in the graph and a ``"from"`` to the tensor [...] that is kept there.

    Raises:
        operators.NotReadable: for an operator that this PyTorch does not have.
        KeyError, TypeError, ValueError: for a description that is damaged, ``operators.Forbidden`` among them.
    """
    root, new_graph = nn.Module(), Graph()
    nodes: dict[str, Node] = {}
    for number, entry in enumerate(_checked_nodes(description)):
        node = _build(new_graph, entry, nodes, number)
        if node.op == "get_attr":
            graph.set_tensor(root, str(node.target), tensor(str(node.target), entry["from"]))
        if "val" in entry:
            node.meta[VAL] = _value_from_json(entry["val"])
        if "layer" in entry:
            node.meta[graph.LAYER] = _text(entry["layer"])
        nodes[entry["name"]] = node
    outputs = [_argument_from_json(value, nodes) for value in description["outputs"]]
    single = description["single"]
    if not outputs or not isinstance(outputs[0], Node) or type(single) is not bool or single and len(outputs) > 1:
        raise ValueError("a graph answers with one or more of its nodes, one of them if it is single")
    new_graph.output(outputs[0] if single else tuple(outputs))
    return GraphModule(root, new_graph)


def _checked_nodes(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The nodes, their keys and names checked."""
    nodes = description["nodes"]
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        raise ValueError(f"nodes must be a list of at most {MAX_NODES}")
    names = set()
    for entry in nodes:
        name, op = entry["name"], entry["op"]
        if op not in _KEYS or not set(entry) <= _KEYS[op]:
            raise ValueError(f"a node of {op!r} with {sorted(entry)}; there are {sorted(_KEYS)}")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            raise ValueError(f"nodes have names of letters, digits and _, each its own; got {name!r}")
        names.add(name)
    return nodes


def _build(new_graph: Graph, entry: Mapping[str, Any], nodes: Mapping[str, Node], number: int) -> Node:
    """One node, named by its number: no name of the file is used."""
    op = entry["op"]
    if op == "placeholder":
        return new_graph.create_node(op, f"input_{number}", (), {}, f"input_{number}")
    if op == "get_attr":  # paths inside the denoiser hold its parameters, see ``graph.set_tensor``
        own = _text(entry["target"]).startswith(graph.PREFIX) and "record" not in entry["from"]
        inside = graph.PREFIX if own else ""
        return new_graph.create_node(op, f"{inside}tensor_{number}", (), {}, f"tensor_{number}")
    name = entry["target"]
    target = operators.operator_of(name)
    args = tuple(_argument_from_json(value, nodes) for value in entry["args"])
    kwargs = {key: _argument_from_json(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    operators.check_call(name, target, args, kwargs)
    return new_graph.create_node(op, target, args, kwargs, f"{name.split('.')[1]}_{number}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a name, got {type(value).__name__}")
    return value


def _function_name(target: Any) -> str:
    name = operators.name_of(target)
    if name is None:
        raise NotStorable(f"the operator {target}")
    return name


def _argument_to_json(value: Any) -> Any:
    """An argument of a node in JSON; what JSON has no word for becomes an object of one key."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_argument_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_argument_to_json(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_argument_to_json(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for word, kind in _LITERALS.items():
        if isinstance(value, kind):
            return {word: _torch_name(value)}
    raise NotStorable(f"an argument {value!r} of type {type(value).__name__}")


def _argument_from_json(value: Any, nodes: Mapping[str, Node], depth: int = 0) -> Any:
    if depth > MAX_DEPTH:  # it would stand as deep in the source that torch.fx writes
        raise ValueError(f"an argument nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        if len(value) > MAX_LIST:
            raise ValueError(f"an argument of {len(value)} items, at most {MAX_LIST}")
        return [_argument_from_json(item, nodes, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    ((word, inner),) = value.items()
    match word:
        case "node":
            return nodes[inner]
        case "float" if inner in ("inf", "-inf", "nan"):
            return float(inner)
        case "tuple":
            return tuple(_argument_from_json(inner, nodes, depth))
        case "slice":
            return slice(*_argument_from_json(inner, nodes, depth))
        case "device":
            return torch.device(inner)
    return _literal(word, inner)


def _literal(word: str, name: Any) -> Any:
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if word not in _LITERALS or not isinstance(value, _LITERALS[word]) or word == "dtype" and name not in DTYPES:
        raise ValueError(f"{name!r} is not a {word} of stored graphs")
    return value


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Value):
        return {"shape": list(value.shape), "dtype": _torch_name(value.dtype)}
    return [_value_to_json(item) for item in value] if isinstance(value, tuple) else None


def _value_from_json(entry: Any) -> Any:
    if isinstance(entry, dict):
        sizes = tuple(entry["shape"])
        if any(size is not None and (type(size) is not int or size < 0) for size in sizes):
            raise ValueError(f"a shape is sizes, or null for what depends on the inputs; got {list(sizes)}")
        return Value(sizes, read_dtype(entry["dtype"]))
    return tuple(_value_from_json(item) for item in entry) if isinstance(entry, list) else None


def read_dtype(name: str) -> torch.dtype:
    """A dtype by its short name, ``"float32"``.

    Raises:
        ValueError: when there is none.
    """
    dtype: torch.dtype = _literal("dtype", name)
    return dtype
