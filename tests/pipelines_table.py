"""Every published recipe on eight tiny pipelines of diffusers: ``make test-pipelines``.

``python tests/pipelines_table.py`` quantizes each to 4-bit weights and 8-bit activations, in three dtypes, with and
without guidance, in one step and in four, puts it in its pipeline and compares the latents of two seeds that
calibration never saw with the float pipeline's. A row that raises, that is not finite, or that comes in another dtype
is a fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from digests import short
from tiny_pipelines import TINY_PIPELINES, TinyPipeline, tiny_pipeline
from torch import Tensor

import dmq_ao
from dmq_ao import CalibrationSet, Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPES = ("default", "dmq", "mpq_dm", "eda_dm")
CALIBRATION_SEEDS, FRESH_SEEDS = range(4), (100, 101)


def recorded(tiny: TinyPipeline, recipe: Recipe, steps: int, guided: bool) -> CalibrationSet:
    """What the recipe's own selection keeps of four runs."""
    with dmq_ao.record(tiny.denoiser, num_samples=16, select=recipe.select) as recorder:
        for seed in CALIBRATION_SEEDS:
            with recorder.trajectory():
                tiny.latents(steps, guided, seed)
    return recorder.calibration_set()


def distance(latents: Tensor, wanted: Tensor) -> float:
    """Relative to the float pipeline's, both [1, ...]."""
    return float((latents.float() - wanted.float()).norm() / wanted.float().norm())


def error_of(tiny: TinyPipeline, name: str, steps: int, guided: bool) -> float:
    """The largest over the fresh seeds; the pipeline has its float denoiser back afterwards.

    Raises:
        AssertionError: for latents that are not finite, or of another dtype.
    """
    recipe, denoiser = short(dmq_ao.recipes.ALL_RECIPES[name]("w4a8")), tiny.denoiser
    wanted = [tiny.latents(steps, guided, seed) for seed in FRESH_SEEDS]
    try:
        dmq_ao.quantize(tiny.pipe, recipe, recorded(tiny, recipe, steps, guided), progress=False)
        latents = [tiny.latents(steps, guided, seed) for seed in FRESH_SEEDS]
    finally:
        tiny.pipe.register_modules(**{tiny.part: denoiser})
    for ours, floats in zip(latents, wanted, strict=True):
        assert ours.dtype == floats.dtype, f"latents in {ours.dtype}, the float pipeline's in {floats.dtype}"
        assert bool(ours.isfinite().all()), "latents are not finite"
    return max(map(distance, latents, wanted))


def rows(pipelines: list[str], dtypes: list[str], recipes: list[str]) -> Iterator[dict[str, Any]]:
    """One at a time, as they are measured."""
    for pipeline, dtype in itertools.product(pipelines, dtypes):
        tiny = tiny_pipeline(pipeline, DTYPES[dtype])
        for guided, steps, recipe in itertools.product((False, True), (1, 4), recipes):
            row: dict[str, Any] = {"pipeline": pipeline, "dtype": dtype, "guided": guided, "steps": steps}
            started = time.perf_counter()
            try:
                row |= {"recipe": recipe, "error": error_of(tiny, recipe, steps, guided)}
            except Exception as error:
                row |= {"recipe": recipe, "fault": f"{type(error).__name__}: {error}"}
            yield row | {"seconds": round(time.perf_counter() - started, 1)}


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: a line for each pipeline and dtype, the recipes' errors at each number of steps and guidance."""
    columns = list(dict.fromkeys((row["steps"], row["guided"], row["recipe"]) for row in measured))
    heads = [f"{steps}{' guided' if guided else ''} {recipe}" for steps, guided, recipe in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for key in dict.fromkeys((row["pipeline"], row["dtype"]) for row in measured):
        cells = {
            (row["steps"], row["guided"], row["recipe"]): f"{row['error']:.3f}" if "error" in row else "**fault**"
            for row in measured
            if (row["pipeline"], row["dtype"]) == key
        }
        lines.append(f"| {' '.join(key)} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Ends with 1 where a row is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="*", default=list(TINY_PIPELINES), choices=TINY_PIPELINES)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--json", type=Path, help="a line of JSON a row, as they come")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measured = []
    for row in rows(options.pipelines, options.dtypes, options.recipes):
        measured.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    faults = sum("fault" in row for row in measured)
    print(table(measured))
    print(f"{len(measured)} rows, {faults} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
