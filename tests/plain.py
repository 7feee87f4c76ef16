"""A denoiser of no library, samples for it, and the whole flow in one call: what several test files share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph
from dmq_ao.config import ChannelScaling, Recipe
from dmq_ao.graph.arguments import flatten_inputs
from dmq_ao.serialization import manifest
from dmq_ao.serialization.folder import CONFIG, GRAPH, KEY, TENSORS

STEPS = (900, 600, 300, 0)


class Plain(nn.Module):
    """A denoiser of no library: a concatenation, tokens, a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.tokens = nn.Linear(16, 16)
        self.merge = nn.Conv2d(32, 16, 1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.first(x)
        vector = self.time(t.to(x.dtype)[:, None] / 1000)
        h = nn.functional.silu(self.conv(nn.functional.silu(skip) + vector[:, :, None, None]))
        h = self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(skip.shape)
        return self.last(nn.functional.silu(self.merge(torch.cat([h, skip], 1))))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def record(
    model: nn.Module, call: Callable[[int], None], num_samples: int = 16, window: int = 1
) -> dmq_ao.CalibrationSet:
    select = dmq_ao.Selection(window=window)
    with dmq_ao.record(model, num_samples=num_samples, select=select) as recorder, torch.no_grad():
        for step in STEPS:
            call(step)
    return recorder.calibration_set()


def plain_samples(
    model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 1
) -> dmq_ao.CalibrationSet:
    """Inputs that grow as the noise goes, so that ranges per step differ; 16 rows, four a step."""
    generator = torch.Generator().manual_seed(seed)

    def call(step: int) -> None:
        x = torch.randn(4, 3, 8, 8, generator=generator) * (2 - step / 900)
        model(x.to(dtype), torch.full((4,), step))

    return record(model, call, window=window)


def graph_arguments(gm: GraphModule, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Keyword arguments of a denoiser as its graph takes them."""
    flat = flatten_inputs(inputs)
    return [torch.as_tensor(flat[name]).to(graph.device_of(gm)) for name in graph.signature_of(gm).names]


def repeated_samples(inputs: dict[str, Tensor], noise: float = 0.0) -> dmq_ao.CalibrationSet:
    """Sixteen rows at ``STEPS``, four a step, from inputs of two; on the CPU, as recorded ones are."""
    step = torch.arange(4).repeat_interleave(4)
    rows = {name: torch.cat([x] * 8) for name, x in inputs.items() if name != "timestep"}
    rows = {name: x + noise * torch.randn_like(x) if x.is_floating_point() else x for name, x in rows.items()}
    return dmq_ao.CalibrationSet(rows, {}, torch.tensor(STEPS)[step], step)


def flow(
    model: nn.Module, recipe: Recipe, samples: dmq_ao.CalibrationSet, backend: str = "reference", **given: Any
) -> tuple[dmq_ao.QuantizedDenoiser, dmq_ao.CalibrationReport]:
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend=backend, **given)
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    return dmq_ao.convert(prepared, backend), report


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_same_records(left: dmq_ao.QuantizedDenoiser, right: dmq_ao.QuantizedDenoiser) -> None:
    assert left.records.keys() == right.records.keys()
    for name in left.records:
        assert_same(left.records[name], right.records[name], name)


def assert_same(left: Any, right: Any, where: str) -> None:
    """Two values, tensors bit for bit, records field by field."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name), f"{where}.{field.name}")
    else:
        assert left == right, where


def small(recipe: Recipe, steps: int = 20) -> Recipe:
    """The same recipe with few gradient steps on few positions."""
    changes: dict[str, Any] = {}
    if recipe.scaling is not None:
        changes["scaling"] = dataclasses.replace(recipe.scaling, steps=steps, positions=8)
    if recipe.rounding is not None:
        changes["rounding"] = dataclasses.replace(recipe.rounding, steps=steps, positions=16)
    if recipe.blocks is not None:
        changes["blocks"] = dataclasses.replace(recipe.blocks, steps=steps)
    if recipe.distillation is not None:
        changes["distillation"] = dataclasses.replace(recipe.distillation, steps=steps, passes=0, checks=4)
    return dataclasses.replace(recipe, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scaled(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, scaling=ChannelScaling(steps=2), bias_correction=True)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a saved folder's config, and all checksums with it, as whoever means it would."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    reseal(folder)


def reseal(folder: Path) -> None:
    """Make all checksums of a saved folder those of its files."""
    config = json.loads((folder / CONFIG).read_text())
    names = (name for name in (CONFIG, GRAPH) if (folder / name).exists())
    if isinstance(config, dict) and isinstance(config.get(KEY), dict):
        sums = {"sha256": TENSORS, "graph_sha256": GRAPH}
        for key in [key for key in sums if config[KEY].get(key) and (folder / sums[key]).exists()]:
            config[KEY][key] = manifest.sha256(folder / sums[key])
        (folder / CONFIG).write_text(json.dumps(config))
    files = {name: manifest.sha256(folder / name) for name in names}
    (folder / manifest.MANIFEST).write_text(manifest.text(files, load_file(folder / TENSORS)))


def without_graph(folder: Path) -> None:
    """Make a saved folder one whose graph could not be stored: what loads it exports the model again."""
    (folder / GRAPH).unlink()
    edit_config(folder, lambda config: config[KEY].update(graph_sha256=None))
