"""Embedding tables as codes: what a row becomes, in a graph, on a backend, in a file and after distillation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from plain import flow, record, relative, small, without_graph
from safetensors.torch import load_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao import graph, numerics, recipes
from dmq_ao.config import Distillation, Override, Recipe, TensorConfig
from dmq_ao.numerics import ops
from dmq_ao.passes import look_up_codes
from dmq_ao.quantizer.prepared import state_of

EMBEDDINGS = recipes.minmax("w4a8", embeddings=True)


class Labelled(nn.Module):
    """A denoiser that is told a class [B] and words [B, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.classes = nn.Embedding(10, 16)
        self.words = nn.Embedding(40, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, words: Tensor) -> Tensor:
        told = self.classes(label) * (t.to(x.dtype)[:, None] / 1000) + self.words(words).mean(1)
        return self.last(torch.relu(self.conv(self.first(x) + told[:, :, None, None])))


def inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, 3, 8, 8, generator=generator),
        "t": torch.full((batch,), 300),
        "label": torch.randint(10, (batch,), generator=generator),
        "words": torch.randint(40, (batch, 5), generator=generator),
    }


@pytest.fixture(scope="module")
def labelled() -> nn.Module:
    torch.manual_seed(0)
    return Labelled().eval()


@pytest.fixture(scope="module")
def seen(labelled: nn.Module) -> dmq_ao.CalibrationSet:
    def call(step: int) -> None:
        labelled(**{**inputs(4), "t": torch.full((4,), step)})

    return record(labelled, call)


def of_tables(recipe: Recipe, weight: TensorConfig) -> Recipe:
    override = Override("@table", weight=weight)
    return dataclasses.replace(
        recipe, config=dataclasses.replace(recipe.config, overrides=(*recipe.config.overrides, override))
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("indices", [(3,), (2, 5), (1, 2, 3), (0,)])
def test_a_row_is_looked_up_as_in_the_dequantized_table(bits: int, symmetric: bool, indices: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = numerics.code_range(bits, symmetric)
    codes = torch.randint(low, high + 1, (7, 6), generator=generator).to(numerics.code_dtype(symmetric))
    scale = torch.rand(7, 1, generator=generator) + 0.01
    zero_point = torch.randint(low, high + 1, (7, 1), generator=generator, dtype=torch.int32)
    wanted = torch.randint(7, indices, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        found = ops.look_up(codes, scale, zero_point, wanted, dtype)
        table = ops.dequantize_weight(codes, scale, zero_point, dtype)
        torch.testing.assert_close(found, table[wanted], rtol=0, atol=0)
        assert (found.shape, found.dtype) == ((*indices, 6), dtype)


@pytest.mark.parametrize(
    "weight", [TensorConfig(8, symmetric=True), TensorConfig(4, symmetric=False), TensorConfig(3, symmetric=True)]
)
def test_a_backend_looks_codes_up(weight: TensorConfig, labelled: nn.Module, seen: dmq_ao.CalibrationSet) -> None:
    recipe = of_tables(EMBEDDINGS, weight)
    reference, _ = flow(labelled, recipe, seen)
    net, report = flow(labelled, recipe, seen, backend="onednn")
    for batch in (1, 2, 3):
        torch.testing.assert_close(net(**inputs(batch)), reference(**inputs(batch)), rtol=1e-4, atol=1e-5)
    rows = {row["name"]: row for row in net.layer_reports() if row["kind"] == graph.TABLE}
    assert list(rows) == ["classes", "words"]
    for row in rows.values():
        assert (row["status"], row["weight_bits"], row["activation_bits"]) == ("quantized", weight.bits, 32)
        assert (row["kernel"], row["why"]) == ("look-up of codes", "")
        assert row["sqnr_db"] > 4 * weight.bits
    assert not [t for t in net.graph_module.state_dict().values() if t.is_floating_point() and t.shape == (40, 16)]
    expected = numerics.sqnr(reference.records["words"].weight.dequantize(), labelled.words.weight.detach())
    assert expected > 4 * weight.bits
    assert {name: report.sqnr_db[name] for name in rows} == {n: row["sqnr_db"] for n, row in rows.items()}


def test_the_pass_leaves_other_tables_alone(labelled: nn.Module, seen: dmq_ao.CalibrationSet) -> None:
    gm = graph.capture(labelled, seen.example())
    before = str(gm.graph)
    assert look_up_codes(gm) == []
    assert str(gm.graph) == before


def test_a_file_holds_codes(labelled: nn.Module, seen: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    net, _ = flow(labelled, EMBEDDINGS, seen, backend="onednn")
    floats, _ = flow(labelled, recipes.minmax("w4a8"), seen, backend="onednn")
    dmq_ao.save(net, tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert (stored["words.weight"].dtype, stored["words.weight"].numel()) == (torch.uint8, 40 * 16)
    assert floats.mean_bits - net.mean_bits > 20 * (50 * 16) / sum(p.numel() for p in labelled.parameters())
    from_graph = dmq_ao.load(tmp_path)
    without_graph(tmp_path)
    for loaded in (from_graph, dmq_ao.load(tmp_path, model=Labelled().eval())):
        torch.testing.assert_close(loaded(**inputs(3)), net(**inputs(3)), rtol=0, atol=0)


def test_float_stays_float_where_the_recipe_says_so(labelled: nn.Module, seen: dmq_ao.CalibrationSet) -> None:
    plain = {row["name"]: row for row in flow(labelled, recipes.minmax("w4a8"), seen)[0].layer_reports()}
    assert (plain["words"]["status"], plain["words"]["why"]) == (
        "float",
        "time, label or size embedding (role @embedding)",
    )
    published = recipes.eda_dm("w4a8", compat="reference")
    prepared = dmq_ao.prepare(labelled, published, seen.example())
    assert state_of(prepared).plan["words"].why == "embedding table (role @table)"


def test_what_distillation_tuned_is_what_is_rounded(labelled: nn.Module, seen: dmq_ao.CalibrationSet) -> None:
    recipe = dataclasses.replace(small(recipes.default("w4a8"), steps=2), distillation=Distillation(steps=8, lr=1e-2))
    prepared = dmq_ao.prepare(labelled, recipe, seen.example(), backend="reference")
    dmq_ao.calibrate(prepared, seen, progress=False)
    net = dmq_ao.convert(prepared, "reference")
    tuned = state_of(prepared).tuned["denoiser.classes.weight"]
    assert relative(tuned, labelled.classes.weight) > 1e-4
    stored = net.records["classes"].weight
    assert stored.bits == 8
    steps = (stored.dequantize() - tuned).abs() / stored.scale
    assert float(steps.max()) < 0.501
    codes = [t for n, t in net.graph_module.named_buffers() if n.startswith("classes") and t.shape == (10, 16)]
    assert len(codes) == 1
    assert torch.equal(codes[0], stored.codes)
