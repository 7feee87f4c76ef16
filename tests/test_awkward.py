"""Denoisers that graphs find hard: the graph equals the module, backends equal the graph, every weight has a row."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from awkward import MADE, REGIONS, WEIGHTS, Case, all_layers, inputs
from plain import record, relative, seeded
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph, recipes
from dmq_ao.config import Recipe

CASES = REGIONS | MADE | WEIGHTS
OTHER_SIZES = {"flex_attention", "vmap", "complex128", "lazy cache"}  # the size is in their code


def prepared_and_calibrated(model: nn.Module, recipe: Recipe) -> GraphModule:
    samples = record(model, lambda step: model(inputs(4, seed=step)[0], torch.full((4,), float(step))))
    prepared = dmq_ao.prepare(model, recipe, samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    return prepared


@pytest.mark.parametrize("name", CASES)
def test_the_graph_and_the_integers_are_the_modules(name: str) -> None:
    case: Case = CASES[name]
    model = seeded(case.build)
    before = {key: id(value) for module in model.modules() for key, value in vars(module).items()}
    x, t = inputs()
    gm = graph.capture(model, (x, t))
    assert before == {key: id(value) for module in model.modules() for key, value in vars(module).items()}
    with torch.no_grad():
        expected = model(x, t)
        torch.testing.assert_close(gm(x, t), expected, rtol=1e-5, atol=1e-5)
        if name not in OTHER_SIZES:
            other = inputs(3, 5, 8)
            torch.testing.assert_close(gm(*other), model(*other), rtol=1e-4, atol=1e-5)
    prepared = prepared_and_calibrated(model, all_layers())
    reference, onednn = (dmq_ao.convert(prepared, backend) for backend in ("reference", "onednn"))
    rows = {row["name"]: row for row in onednn.layer_reports()}
    assert {name for name, row in rows.items() if row["status"] == "quantized"} == set(case.layers)
    assert {name for name, row in rows.items() if row["status"] == "float"} == set(case.floats)
    assert all(word in rows[name]["why"] for name, word in case.floats.items())
    with torch.no_grad():
        integers = reference(x, t)
        assert relative(onednn(x, t), integers) < case.tolerance
        assert 0 < relative(integers, expected) < 0.1


@pytest.mark.parametrize("name", ["no_grad", "autocast", "weight_norm", "learned vector", "cond"])
def test_a_recipe_that_learns_takes_them(name: str) -> None:
    recipe = all_layers(recipes.dmq("w4a8"))
    prepared = prepared_and_calibrated(seeded(CASES[name].build), recipe)
    x, t = inputs()
    with torch.no_grad():
        reference = dmq_ao.convert(prepared, "reference")(x, t)
        assert relative(dmq_ao.convert(prepared, "onednn")(x, t), reference) < CASES[name].tolerance


@pytest.mark.parametrize("name", ["weight_norm", "masked", "autocast", "padding in words"])
def test_computed_weights_are_saved_and_count(name: str, tmp_path: Path) -> None:
    model = seeded(CASES[name].build)
    x, t = inputs()
    for keep in ((), ("last",)):
        recipe = all_layers(keep=keep)
        quantized = dmq_ao.convert(prepared_and_calibrated(model, recipe), "reference")
        folder = tmp_path / f"{len(keep)}"
        dmq_ao.save(quantized, folder)
        loaded = dmq_ao.load(folder, model=model, backend="reference")
        with torch.no_grad():
            assert torch.equal(loaded(x, t), quantized(x, t))
        assert loaded.mean_bits == quantized.mean_bits


def test_a_denoiser_of_which_nothing_is_quantized_is_refused() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.einsum("bchw,cd->bdhw", x, self.mix) * t[:, None, None, None]

    message = (
        "nothing of Product would be quantized.*were looked for: 1 kept in float: no rule quantizes einsum.*"
        "graph calls .*1 einsum.*write the products as nn.Linear"
    )
    with pytest.raises(ValueError, match=message):
        dmq_ao.prepare(Product().eval(), recipes.minmax("w8a8"), inputs())
    with pytest.raises(
        ValueError, match=r"1 kept in float: input projection \(role @input\); 1 kept in float: output"
    ):
        dmq_ao.prepare(seeded(CASES["arange"].build), recipes.dmq("w4a8"), inputs())


def test_the_model_works_as_before_after_it_was_captured() -> None:
    """Caches that an export fills hold tensors without values."""
    model = seeded(CASES["lazy list and object"].build)
    x, t = inputs()
    with torch.no_grad():
        expected = copy.deepcopy(model)(x, t)
    graph.capture(model, (x, t))
    assert model.cache == []
    with torch.no_grad():
        assert torch.equal(model(x, t), expected)
