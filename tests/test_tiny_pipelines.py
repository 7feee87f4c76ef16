"""One recipe on tiny pipelines as people call them; ``make test-pipelines`` runs all recipes on all eight."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from digests import short
from pipelines_table import error_of, rows, table
from tiny_pipelines import tiny_pipeline

from dmq_ao.recipes import default


@pytest.mark.parametrize(
    "name", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd15", "flux", "wan", "pixart"))]
)
def test_a_published_recipe_runs_in_a_pipeline(name: str) -> None:
    tiny = tiny_pipeline(name)
    denoiser = tiny.denoiser
    assert error_of(tiny, "dmq", steps=1, guided=True) < 0.1
    assert tiny.denoiser is denoiser


def test_what_raises_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> float:
        raise ValueError("no such thing")

    monkeypatch.setattr("pipelines_table.error_of", refused)
    (row, *others) = rows(["ltx"], ["float32"], ["default"])
    assert row["fault"] == "ValueError: no such thing"
    assert len(others) == 3
    text = table([row, row | {"pipeline": "sdxl", "error": 0.5}])
    assert "| ltx float32 | **fault** |" in text
    assert "| sdxl float32 | 0.500 |" in text


def test_recipes_of_the_table_are_shortened() -> None:
    recipe = short(default("w4a8"))
    assert recipe.distillation is not None
    assert recipe.distillation.steps == 6
