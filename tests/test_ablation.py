"""The ablation example: every variant is a recipe, results are collected in order, and a run goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from plain import Plain, plain_samples, seeded
from torch import nn

import dmq_ao
from dmq_ao.config import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import ablation

        yield ablation
    for name in ("ablation", "quantize_custom_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a6"])
def test_every_variant_is_a_recipe_of_its_own(ablation: ModuleType, bits: str) -> None:
    recipes = [build(bits) for build in ablation.variants().values()]
    assert all(Recipe.from_dict(recipe.to_dict()) == recipe for recipe in recipes)
    assert len({json.dumps(recipe.to_dict()) for recipe in recipes}) == len(recipes) - 3 * (bits == "w8a8")


def test_a_run_measures_what_is_missing(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    subject = ablation.Subject(
        net, lambda select, seed: samples, samples, lambda denoiser: _pictures(denoiser, samples)
    )
    chosen = ["min-max per step", "+ PTS", "static"]
    ablation.run(subject, tmp_path / "plain", ["w4a8"], chosen, [0], 8)
    kept = next((tmp_path / "plain" / "w4a8").glob("min*.json"))
    stamp = kept.stat().st_mtime_ns
    ablation.run(subject, tmp_path / "plain", ["w4a8"], chosen, [0], 8)
    assert kept.stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.count("one-step") == len(chosen)
    results: list[dict[str, Any]] = ablation.collect(tmp_path)
    assert [result["variant"] for result in results] == chosen
    text = ablation.table(results)
    assert all(f"| {name} | {r['one_step_error']:.4f} |" in text for name, r in zip(chosen, results, strict=True))
    assert results[0]["date"] in text
    ablation.run(subject, tmp_path / "plain", ["w4a8"], ["+ PTS"], [0, 1], 8)
    both = [r for r in ablation.collect(tmp_path) if r["variant"] == "+ PTS"]
    assert [r["seed"] for r in both] == [0, 1]
    assert "(2 seeds)" in ablation.table(both)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    ablation.plot(results, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    whole = _height(ablation, results, tmp_path)
    next((tmp_path / "plain" / "w4a8").glob("min*.safetensors")).unlink()
    assert 0 < _height(ablation, results, tmp_path) < whole


def _height(ablation: ModuleType, results: list[dict[str, Any]], folder: Path) -> int:
    """Of the picture of images, which has a row for each result whose images are there."""
    ablation.pictures(results, folder)
    with Image.open(folder / "plain-w4a8.png") as picture:
        return picture.height


def _pictures(denoiser: nn.Module, samples: dmq_ao.CalibrationSet) -> torch.Tensor:
    with torch.no_grad():
        inputs = next(iter(samples.batches(4)))
        return torch.sigmoid(denoiser(**inputs))
