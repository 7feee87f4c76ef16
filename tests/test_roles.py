"""Roles of layers: told in every report, by dataflow, and said by the caller where that misleads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.cli.output import layers_text

RECIPE = recipes.minmax("w8a8", ranges=dmq_ao.Ranges.STATIC)
INPUTS = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([5.0, 900.0])}


class Net(nn.Module):
    """Its stem reads the sample as the first thing, its head gives the answer, time is embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.stem, self.second, self.middle = (nn.Conv2d(a, 8, 3, padding=1) for a in (3, 8, 8))
        self.head = nn.Conv2d(8, 3, 3, padding=1)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.second(self.stem(x)) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.head(self.middle(torch.relu(h)) + self.middle(h))


def rows(quantized: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in quantized.layer_reports()}


def converted(net: nn.Module, **options: Any) -> Any:
    samples = dmq_ao.CalibrationSet(
        {"x": torch.randn(4, 3, 8, 8)}, {}, torch.tensor([900.0, 900.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), "t"
    )
    prepared = dmq_ao.prepare(net, RECIPE, INPUTS, backend="reference", **options)
    dmq_ao.calibrate(prepared, samples, progress=False)
    return dmq_ao.convert(prepared, "reference")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def said(net: nn.Module) -> Any:
    return converted(net, roles={"second": "@input", "stem": "@none", "middle#2": ["@output"], "time": ("@none",)})


def test_reports_tell_the_roles_that_dataflow_shows(net: nn.Module, tmp_path: Path) -> None:
    quantized = converted(net)
    shown = {name: row["roles"] for name, row in rows(quantized).items()}
    expected = {"stem": ["@input"], "second": [], "time": ["@embedding"], "middle": [], "middle#2": []}
    assert {name: shown[name] for name in expected} == expected
    assert shown["head"] == ["@output"]
    dmq_ao.save(quantized, tmp_path / "out")
    assert rows(dmq_ao.load(tmp_path / "out", model=net, backend="reference")) == rows(quantized)
    assert "roles" not in json.loads((tmp_path / "out" / "graph.json").read_text())["plan"][0]
    table = layers_text(quantized.layer_reports())
    assert [line.split()[2] for line in table.splitlines() if line.startswith("stem")] == ["@input"]


def test_what_is_said_stands_in_the_place_of_what_is_shown(said: Any) -> None:
    kept = {name: row["why"] for name, row in rows(said).items() if row["status"] == "float" and row["roles"]}
    assert kept == {
        "second": "input projection (role @input)",
        "middle#2": "output projection (role @output)",
        "head": "output projection (role @output)",
    }
    assert {name for name, row in rows(said).items() if row["status"] == "quantized"} == {"stem", "time", "middle"}
    assert [rows(said)[name]["roles"] for name in ("stem", "time")] == [["@none"], ["@none"]]


def test_what_was_said_is_saved(said: Any, net: nn.Module, tmp_path: Path) -> None:
    dmq_ao.save(said, tmp_path / "out")
    loaded = dmq_ao.load(tmp_path / "out", model=net, backend="reference")
    assert rows(loaded) == rows(said)
    assert torch.equal(loaded(**INPUTS), said(**INPUTS))
    dmq_ao.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "graph.json").read_bytes() == (tmp_path / "out" / "graph.json").read_bytes()


def test_a_split_layer_keeps_what_was_said(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    unet, inputs = tiny_unet2d
    name = "up_blocks.0.resnets.0.conv1"
    recipe = recipes.minmax("w4a8", power_of_two=True)
    prepared = dmq_ao.prepare(unet, recipe, inputs, backend="reference", roles={name: "@input"})
    from dmq_ao.quantizer.prepared import state_of

    plan = state_of(prepared).plan
    own = [item for one, item in plan.items() if one.startswith(name)]
    assert own
    assert {item.why for item in own} == {"input projection (role @input)"}


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"stemm": "@input"}, r"roles: pattern 'stemm' matches no layer; near ones of 6 are \['stem'"),
        ({"stem.weight": "@input"}, r"roles: pattern 'stem.weight' matches no layer; .*'stem'"),
        ({"st*": "@input"}, r"roles: pattern 'st\*' matches no layer"),
        ({"stem": "@table"}, r"roles: 'stem' must have some of the roles \['@input', .*\], got '@table'"),
        ({"stem": "input"}, "must have some of the roles .* got 'input'"),
        ({"stem": []}, r"must have some of the roles .* got \[\]"),
    ],
)
def test_wrong_names_and_roles_raise_before_the_export(
    roles: dict[str, Any], words: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmq_ao.graph, "capture", lambda *rest: pytest.fail("exported"))
    with pytest.raises(ValueError, match=words):
        dmq_ao.prepare(net, RECIPE, INPUTS, roles=roles)


@pytest.mark.parametrize("name", ["unused", "middle#3"])
def test_a_layer_that_is_not_called_is_none(name: str, net: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"roles: pattern '{name}' matches no layer; near ones of"):
        dmq_ao.prepare(net, RECIPE, INPUTS, roles={name: "@input"})
