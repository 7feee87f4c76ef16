"""Names in a file: what is codes in one layer and float in another is there twice, and every save is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain import assert_same_records, edit_config, flow, record, relative, seeded, without_graph
from torch import Tensor, nn

import dmq_ao
from dmq_ao.serialization.folder import CONFIG, KEY

GENERATOR = torch.Generator().manual_seed(0)
X, IDS, T = torch.randn(4, 5, 16, generator=GENERATOR), torch.arange(20).reshape(4, 5) % 11, torch.tensor([0, 3, 6, 9])


class Tied(nn.Module):
    """An embedding whose table is also the output's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.middle = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.first(x) + t[:, None, None] / 1000
        return self.head(self.middle(h))


class TiedTwice(Tied):
    """Three places, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(16, 11, bias=False)
        self.again.weight = self.table.weight

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.first(x) + t[:, None, None] / 1000
        return self.head(self.middle(h)) + self.again(h.relu())


class TiedProduct(Tied):
    """A weight that is also multiplied outside of any layer."""

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x) + t[:, None, None] / 1000 + ids[..., None]
        return self.middle(self.head(self.middle(h)) @ self.table.weight)


class Scaled(nn.Linear):
    """A linear with a parameter that has the name of a record's tensor."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.input_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.input_scale)


class NamedAsTheFormat(nn.Module):
    """Modules that are called as the file calls its own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.ModuleDict({"norm": nn.LayerNorm(16)})
        self.first, self.middle, self.last = nn.Linear(16, 16), Scaled(), nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        h = self.graph["norm"](self.first(x)) + t[:, None, None] / 1000 + ids[..., None]
        return self.last(self.middle(h))


def quantized(model: nn.Module, backend: str) -> dmq_ao.QuantizedDenoiser:
    samples = record(model, lambda step: model(X * (1 + step / 900), T + step, IDS))
    return flow(model, dmq_ao.recipes.minmax("w4a8", embeddings=True), samples, backend)[0]


@pytest.mark.parametrize("stored_graph", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Tied, "head.weight"),
        (TiedTwice, "again.weight"),
        (TiedProduct, "head.weight"),
        (NamedAsTheFormat, "graph.norm.weight"),
        (NamedAsTheFormat, "middle.input_scale"),
    ],
)
def test_what_was_saved_is_loaded(
    kind: Callable[[], nn.Module], name: str, stored_graph: bool, tmp_path: Path
) -> None:
    model = seeded(kind)
    denoiser = quantized(model, "reference")
    dmq_ao.save(denoiser, tmp_path / "out")
    names = json.loads((tmp_path / "out" / CONFIG).read_text())[KEY]["float_names"]
    assert names[name] == f"float.{name}"
    if not stored_graph:
        without_graph(tmp_path / "out")
    given = {} if stored_graph else {"model": model}
    loaded = dmq_ao.load(tmp_path / "out", backend="reference", **given)
    assert_same_records(loaded, denoiser)
    assert loaded.float_tensors.keys() == denoiser.float_tensors.keys()
    assert torch.equal(loaded(X, T, IDS), denoiser(X, T, IDS))
    dmq_ao.save(loaded, tmp_path / "again")
    again = dmq_ao.load(tmp_path / "again", backend="reference", **given)
    assert torch.equal(again(X, T, IDS), denoiser(X, T, IDS))


def test_a_tied_weight_is_codes_in_one_place_and_float_in_the_other() -> None:
    model = seeded(Tied)
    denoiser = quantized(model, "auto")
    assert denoiser.records["head"].kind == "embedding table"
    assert torch.equal(denoiser.float_tensors["head.weight"], model.table.weight)
    with torch.no_grad():
        assert 0 < relative(denoiser(X, T, IDS), model(X, T, IDS)) < 0.3


def test_folders_without_such_names_are_as_they_were(tmp_path: Path) -> None:
    class Apart(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 11, bias=False)

    dmq_ao.save(quantized(seeded(Apart), "reference"), tmp_path)
    assert "float_names" not in json.loads((tmp_path / CONFIG).read_text())[KEY]


@pytest.mark.parametrize(
    "names",
    [
        {"head.weight": "float.no.weight"},
        {"head.weight": "middle.weight"},
        {"head.weight": "float.head.weight", "table.weight": "float.head.weight"},
        {"first.bias": "float.head.weight"},
    ],
)
def test_names_that_are_not_the_files_are_refused(names: dict[str, str], tmp_path: Path) -> None:
    dmq_ao.save(quantized(seeded(Tied), "reference"), tmp_path)
    edit_config(tmp_path, lambda config: config[KEY].update(float_names=names))
    with pytest.raises(dmq_ao.InvalidFile, match="float_names|unexpected|missing"):
        dmq_ao.load(tmp_path)
