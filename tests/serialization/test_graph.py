"""A graph written as JSON and read back is the same graph; what the format has no word for is refused by name."""

from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from dmq_ao.graph.values import VAL, Value, replace_fake_tensors, value_of
from dmq_ao.serialization import graph as stored_graph
from dmq_ao.serialization import operators
from dmq_ao.serialization.graph import NotStorable
from dmq_ao.serialization.operators import Forbidden, NotReadable

aten = torch.ops.aten


def built(*calls: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> GraphModule:
    """A graph of one input and calls whose argument ``...`` stands for what came before."""
    root, made = nn.Module(), Graph()
    root.register_buffer("table", torch.arange(6.0).reshape(2, 3))
    last = made.placeholder("x")
    last.meta[VAL] = torch.empty(2, 3, device="meta")
    for target, args, kwargs in calls:
        last = made.call_function(target, tuple(last if arg is ... else arg for arg in args), kwargs)
    made.output(made.call_function(aten.add.Tensor, (last, made.get_attr("table"))))
    gm = GraphModule(root, made)
    replace_fake_tensors(gm, keep=())
    return gm


CALLS = [
    (aten.mul.Tensor, (..., float("inf")), {}),
    (aten.clamp.default, (..., -1e30, 1e30), {}),
    (aten.reshape.default, (..., [3, -1]), {}),
    (operator.getitem, (..., (slice(0, 2), None)), {}),
    (aten.to.dtype, (..., torch.float64), {}),
    (aten._to_copy.default, (...,), {"dtype": torch.float32, "layout": torch.strided, "device": torch.device("cpu")}),
    (aten.contiguous.default, (...,), {"memory_format": torch.contiguous_format}),
    (aten.reshape.default, (..., [2, -1]), {}),
    (aten.slice.Tensor, (..., 1, 0, 1), {}),
]


def test_a_graph_comes_back() -> None:
    gm = built(*CALLS)
    description = json.loads(json.dumps(stored_graph.to_json(gm, ()), allow_nan=False))
    again = stored_graph.from_json(description, lambda target, home: gm.table)
    x = torch.randn(2, 3)
    assert torch.equal(again(x), gm(x))
    assert called(again) == called(gm)
    assert next(iter(again.graph.nodes)).meta[VAL] == Value((2, 3), torch.float32)


def called(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_no_name_of_a_file_is_a_name_of_the_graph() -> None:
    gm = built(*CALLS)
    again = stored_graph.from_json(stored_graph.to_json(gm, ()), lambda target, home: gm.table)
    theirs = {node.name for node in gm.graph.nodes if node.op != "output"} | {"table"}
    assert not theirs & {name for node in again.graph.nodes for name in (node.name, str(node.target))}


def test_a_graph_of_several_answers_comes_back() -> None:
    gm = built(*CALLS)
    output = gm.graph.output_node()
    output.args = ((output.args[0], next(iter(gm.graph.nodes))),)
    gm.recompile()
    again = stored_graph.from_json(stored_graph.to_json(gm, ()), lambda target, home: gm.table)
    x = torch.randn(2, 3)
    assert isinstance(again(x), tuple)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again(x), gm(x), strict=True))


def test_constants_travel_beside_the_graph() -> None:
    gm = built(*CALLS)
    stored = stored_graph.stored(gm, ())
    assert set(stored.constants) == {"table"}
    assert stored_graph.stored(gm, ("table",)).constants == {}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((print, (...,), {}), "operator <built-in function print>"),
        ((aten.mul.Tensor, (..., 1j), {}), "argument 1j of type complex"),
        ((torch.ops.prims.sin.default, (...,), {}), "operator prims.sin.default"),
    ],
)
def test_what_has_no_word_is_not_stored(call: tuple[Any, tuple[Any, ...], dict[str, Any]], named: str) -> None:
    gm = built(call)
    with pytest.raises(NotStorable) as caught:
        stored_graph.to_json(gm, ())
    assert named in str(caught.value)
    with pytest.raises(NotStorable):
        stored_graph.stored(gm, ())


def test_an_operator_of_another_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    description = stored_graph.to_json(built(CALLS[0]), ())
    next(node for node in description["nodes"] if node["op"] == "call_function")["target"] = "aten.later.default"
    monkeypatch.setattr(operators, "ALLOWED", operators.ALLOWED | {"aten.later.default"})
    with pytest.raises(NotReadable, match=r"torch 2.* has no operator 'aten.later.default'"):
        stored_graph.from_json(description, lambda target, home: torch.zeros(2, 3))


@pytest.mark.parametrize(
    "name",
    ["aten.nothing.default", "builtins.eval", "torch.load", "aten.__name__.x", "os.system", "aten.from_file.default"]
    + ["aten.as_strided.default", "aten._reshape_alias.default", "aten.empty.memory_format", "aten.set_.source_Tensor"]
    + ["aten.resize_.default", "aten.randn.default", "aten.bernoulli.default", "prims.empty_strided.default", 3, None],
)
def test_only_known_operators_are_read(name: Any) -> None:
    description = stored_graph.to_json(built(CALLS[0]), ())
    next(node for node in description["nodes"] if node["op"] == "call_function")["target"] = name
    with pytest.raises(Forbidden, match="is not one that a stored graph may hold"):
        stored_graph.from_json(description, lambda target, home: torch.zeros(2, 3))


def test_values() -> None:
    assert value_of([torch.zeros(2), 3]) == (Value((2,), torch.float32), None)
    assert Value((2, None), torch.float32).to(torch.bfloat16) == Value((2, None), torch.bfloat16)
    assert Value((2,), torch.int64).to(torch.bfloat16) == Value((2,), torch.int64)
    assert Value((2, None), torch.float32).dim() == 2
