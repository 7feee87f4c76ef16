"""Answers keep their type: named tuples, dictionaries, lists, classes, and what is no tensor in them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from awkward import Net, all_layers, inputs
from plain import flow, record, relative, seeded
from torch import Tensor

import dmq_ao
from dmq_ao import graph
from dmq_ao.graph import CaptureError
from dmq_ao.graph.structure import taken_apart
from dmq_ao.serialization.signature import signature_from_json, signature_to_json


class Pair(NamedTuple):
    eps: Tensor
    rest: Any


@dataclasses.dataclass
class Parts:
    first: Tensor | None
    second: Any = None


Loose = collections.namedtuple("Loose", "eps logvar")
ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "named tuple": lambda y: Pair(y, y * 2),
    "named tuple of a dict": lambda y: Pair(y, {"more": [y + 1, None], "count": 3}),
    "older named tuple": lambda y: Loose(y, y),
    "dict": lambda y: {"sample": y, "a.b": y * 2},
    "list": lambda y: [y, y * 2],
    "one in a list": lambda y: [y],
    "tuple in a tuple": lambda y: (y, (y * 2, "text")),
    "dataclass, None first": lambda y: Parts(None, y),
}


class Answers(Net):
    answer: Callable[[Tensor], Any]

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return type(self).answer(super().forward(x, t))


def like(value: Any) -> Any:
    """The same with types of tensors for tensors."""
    return taken_apart(value)[1]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_keeps_its_type(name: str, tmp_path: Path) -> None:
    kind = type("Answering", (Answers,), {"answer": staticmethod(ANSWERS[name])})
    kind.__module__ = __name__
    model = seeded(kind)
    samples = record(model, lambda step: model(inputs(4, seed=step)[0], torch.full((4,), float(step))))
    quantized, _ = flow(model, all_layers(), samples)
    x, t = inputs()
    assert like(quantized(x, t)) == like(model(x, t))
    dmq_ao.save(quantized, tmp_path / "out")
    again = dmq_ao.load(tmp_path / "out", model=model, backend="reference")(x, t)
    assert like(again) == like(model(x, t))
    for one, other in zip(taken_apart(again)[0], taken_apart(quantized(x, t))[0], strict=True):
        assert torch.equal(one, other)


def test_a_plain_answer_is_stored_as_before() -> None:
    call = graph.signature_of(graph.capture(seeded(Net), inputs()))
    assert call.answer is None
    assert "answer" not in signature_to_json(call)
    stored = type("Stored", (), {"example": call.example, "constants": {}, "timestep_arg": "t"})()
    with pytest.raises(ValueError, match="signature.answer: expected levels of"):
        signature_from_json(signature_to_json(call) | {"answer": {"kind": "module"}}, stored, None)


class Tupled(Net):
    """Asks for a tuple, where a calibration set gives a list."""

    def forward(self, x: Tensor, t: Tensor, more: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(more, tuple), "must be a tuple"
        return super().forward(x * more[0] + more[1], t)


def test_a_tuple_among_the_arguments() -> None:
    model, (x, t) = seeded(Tupled), inputs(4)
    more = (torch.rand(4, 3, 1, 1), torch.rand(4, 3, 1, 1))
    samples = record(model, lambda step: model(x + step / 900, torch.full((4,), float(step)), more))
    quantized, _ = flow(model, all_layers(), samples)
    with torch.no_grad():
        assert relative(quantized(x, t, more), model(x, t, more)) < 0.1
    broken = seeded(type("Broken", (Tupled,), {"body": lambda self, x: self.missing(x)}))
    with pytest.raises(CaptureError, match="has no attribute 'missing'|must be a tuple"):
        graph.capture(broken, {"x": x, "t": t, "more": list(more)})


def test_what_cannot_be_an_answer_says_so() -> None:
    class Odd(Net):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return {1, 2}

    class Bare(Net):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return 3

    with pytest.raises(CaptureError, match="answers with tensors, or tuples, lists, dicts or dataclasses.*got set"):
        graph.capture(seeded(Odd), inputs())
    with pytest.raises(CaptureError, match="answers without a tensor"):
        graph.capture(seeded(Bare), inputs())
