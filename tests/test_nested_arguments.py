"""Arguments that nest: tuples, named tuples, keys with dots in them and keys that are numbers keep what they are."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import Net, all_layers, inputs
from plain import flow, record, relative, seeded, without_graph
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import dmq_ao
from dmq_ao.graph import containers
from dmq_ao.samples import CalibrationSet

Pair = collections.namedtuple("Pair", "shift scale")  # noqa: PYI024  what people write


class Nested(Net):
    """Reads its argument as only the right containers can be read."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor, t: Tensor, extra: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x + self.read(extra), t)


def _tuple(extra: Any) -> Tensor:
    assert type(extra) is tuple
    return extra[0] * extra[1]


def _named(extra: Any) -> Tensor:
    assert isinstance(extra, tuple)
    return extra.shift + extra.scale


def _inside(extra: Any) -> Tensor:
    one, two = extra["pair"]
    assert type(extra["list"]) is list
    return one.shift * one.scale + two["a.b"][7] + extra["list"][0]


def _value(seed: int) -> Tensor:
    return torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(seed))


def _pair(seed: int) -> Pair:
    return Pair(_value(seed), _value(seed + 50))


KINDS = {
    "tuple": (_tuple, lambda s: (_value(s), _value(s + 50))),
    "named tuple": (_named, _pair),
    "dots": (
        lambda e: e["text.embeds"] + e["text"]["ids"],
        lambda s: {"text.embeds": _value(s), "text": {"ids": _value(s)}},
    ),
    "numbers": (lambda e: sum(v * k for k, v in e.items()), lambda s: {0: _value(s), 1: _value(s + 50)}),
    "numbers apart": (lambda e: e[3] - e[10], lambda s: {3: _value(s), 10: _value(s + 50)}),
    "digits": (lambda e: e["0"] - e["1"], lambda s: {"0": _value(s), "1": _value(s + 50)}),
    "one in another": (_inside, lambda s: {"pair": (_pair(s), {"a.b": {7: _value(s)}}), "list": [_value(s)]}),
    "no tensor": (lambda e: e[0] * e[1]["by.two"], lambda s: (_value(s), {"by.two": 2.0})),
}


def samples_of(net: Nested, make: Any) -> CalibrationSet:
    def call(step: int) -> None:
        net(inputs(4, seed=step)[0], torch.full((4,), float(step)), make(step))

    return record(net, call)


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_gets_its_arguments_as_they_were(kind: str, tmp_path: Path) -> None:
    read, make = KINDS[kind]
    net = seeded(lambda: Nested(read))
    samples = samples_of(net, make)
    samples.save(tmp_path / "samples.safetensors")
    loaded = CalibrationSet.load(tmp_path / "samples.safetensors")
    assert loaded.digest() == samples.digest()
    x, t = inputs(4, seed=600)
    expected = net(x, t, make(600))
    for one in (loaded, samples):
        quantized, _ = flow(net, all_layers(), one)
        assert 0 < relative(quantized(x, t, make(600)), expected) < 0.05
    dmq_ao.save(quantized, tmp_path / "folder")
    again = dmq_ao.load(tmp_path / "folder", model=net, backend="reference")
    assert torch.equal(again(x, t, extra=make(600)), quantized(x, t, make(600)))
    without_graph(tmp_path / "folder")
    exported = dmq_ao.load(tmp_path / "folder", model=net, backend="reference")
    assert torch.equal(exported(x, t, extra=make(600)), quantized(x, t, make(600)))
    net(**samples.select([3, 5]).example())  # as it is, without a list for a tuple


def test_what_paths_tell_is_not_written(tmp_path: Path) -> None:
    """Sets of lists and plain names have the bytes they always had."""
    net = seeded(lambda: Nested(lambda e: e["a"][0] + e["a"][1]))
    samples = samples_of(net, lambda s: {"a": [_value(s), _value(s)]})
    assert samples.nesting is None
    samples.save(tmp_path / "samples.safetensors")
    with safe_open(tmp_path / "samples.safetensors", framework="pt") as file:
        assert "nesting" not in file.metadata()["dmq_ao.calibration_set"]


def test_keys_of_other_types_and_paths_of_two_values_are_refused() -> None:
    net = seeded(lambda: Nested(lambda e: next(iter(e.values()))))
    for value, message in (
        ({None: _value(0)}, "extra has the key None; keys of a denoiser's arguments are printable text.*rename it"),
        ({True: _value(0)}, "has the key True"),
        ({(1, 2): _value(0)}, "has the key"),
        ({"": _value(0)}, "has the key ''"),
        ({"a..b": _value(0)}, "has the key 'a..b'"),
        ({"a\nb": _value(0)}, "has the key"),
        (
            {"a.b": _value(0), "a": {"b": _value(0)}},
            "two of the denoiser's arguments have the path 'extra.a.b'; rename",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            samples_of(net, lambda _, value=value: value)


@pytest.mark.parametrize(
    "nesting",
    [
        7,
        {"set": []},
        {"tuple": ["x"], "list": []},
        {"dict": [[None, "x"]]},
        {"dict": [["x", "x"], ["t", "t"], ["extra", {"tuple": ["extra.0"]}]]},
        {"dict": [["x", "x"], ["t", "t"], ["extra", {"tuple": ["extra.0", "extra.0"]}]]},
        {"namedtuple": ["import os", ["a"], ["x"]]},
        {"namedtuple": ["Pair", ["a", "_b"], ["x", "t"]]},
        {"namedtuple": ["Pair", ["a"], ["x", "t"]]},
        {"namedtuple": ["Pair"]},
        {"list": 5},
    ],
)
def test_nestings_of_a_file_that_are_none(nesting: Any, tmp_path: Path) -> None:
    read, make = KINDS["tuple"]
    path = tmp_path / "samples.safetensors"
    samples_of(seeded(lambda: Nested(read)), make).save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dmq_ao.calibration_set"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
    header["nesting"] = nesting
    save_file(tensors, path, metadata={"dmq_ao.calibration_set": json.dumps(header)})
    with pytest.raises(dmq_ao.InvalidFile):
        CalibrationSet.load(path)


def test_a_nesting_goes_through_json() -> None:
    nesting = containers.paths_of({"a": (1, [2, Pair(3, {4: 5, "b.c": 6})]), "d": {}})
    again = containers.nesting_from_json(json.loads(json.dumps(containers.nesting_to_json(nesting))))
    assert again == nesting
    assert type(again["a"]) is tuple
    pair = again["a"][1][1]
    assert (type(pair).__name__, pair._fields, pair.shift, pair.scale[4]) == (
        "Pair",
        ("shift", "scale"),
        "a.1.1.0",
        "a.1.1.1.4",
    )
    values = {"a.0": 1, "a.1.0": 2, "a.1.1.0": 3, "a.1.1.1.4": 5, "a.1.1.1.b.c": 6}
    assert containers.filled(again, values) == {"a": (1, [2, (3, {4: 5, "b.c": 6})]), "d": {}}


class InOrder(Net):
    """Calls one layer for each of its keyword arguments, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
        for value in more.values():
            shift = self.shift(value)
            x = x + (shift if shift.dim() == 2 else shift.mean(1))[:, :, None, None]
        return super().forward(x, t)


@pytest.mark.parametrize("names", [("late", "early"), ("early", "late"), ("b", "a")])
def test_a_denoiser_exported_again_gets_its_keywords_in_their_order(names: tuple[str, str], tmp_path: Path) -> None:
    """A layer called twice has a record for each call: they are told apart by the order of the calls."""
    net = seeded(InOrder)
    first, second = names

    def more(rows: int) -> dict[str, Tensor]:
        return {first: torch.randn(rows, 4, 5), second: torch.randn(rows, 5)}

    samples = record(net, lambda step: net(inputs(4, seed=step)[0], torch.full((4,), float(step)), **more(4)))
    prepared = dmq_ao.prepare(
        net, all_layers(dmq_ao.recipes.minmax("w4a8", ranges=dmq_ao.Ranges.DYNAMIC)), samples.example(4)
    )
    dmq_ao.calibrate(prepared, samples, progress=False)
    quantized = dmq_ao.convert(prepared)
    dmq_ao.save(quantized, tmp_path / "out")
    without_graph(tmp_path / "out")
    loaded = dmq_ao.load(tmp_path / "out", model=net)
    call = (inputs(4, seed=9)[0], torch.full((4,), 1.0))
    values = more(4)
    assert torch.equal(loaded(*call, **values), quantized(*call, **values))
