"""What each ingredient of DMQ and EDA-DM brings: one-step error and same-seed images, ingredient by ingredient.

    python examples/ablation.py --models demo --bits w4a8 w4a6 -o build/ablation
    python examples/ablation.py --loaders MODELS/loaders.py --models ddpm64 flowvit -o build/ablation
    python examples/ablation.py --models demo --bits w4a6 --variants "+ FBR" "+ blocks" --seeds 0 1 2 -o build/ablation

Every result is a file of its own under the output folder: interrupted, the same command goes on where it stopped. At
the end ``results.json``, ``table.md``, ``errors.png`` and, for each model and width, a picture of same-seed images
hold all results found there. Errors are relative to the float denoiser's output, on states of float trajectories whose
seeds calibration did not see, at ten timesteps spread over the schedule; images are drawn from the same seeds by both.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quantize_custom_module import load_module, record, samplers, spread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks.measure import by_timestep, held_out_states, images_of
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.config import (
    BitAllocation,
    BlockReconstruction,
    ChannelScaling,
    Distillation,
    Protection,
    Ranges,
    Recipe,
    Relation,
    Rounding,
    RoundingMethod,
    Scope,
    Scorer,
    Selection,
    SelectMethod,
    StepWeights,
    Weighting,
)
from dmq_ao.evaluation import image_fidelity, machine, one_step_error, peak_rss_bytes
from dmq_ao.evaluation.pictures import image_grid
from dmq_ao.pipelines.adapter import load_pipeline, record_pipeline
from dmq_ao.samples import CalibrationSet

UNIFORM = StepWeights(Weighting.UNIFORM)
EVEN, TDAC = Selection(), Selection(SelectMethod.TDAC)
LAYERS, FBR = Rounding(RoundingMethod.ADAROUND, compensate=True), BlockReconstruction()
BLOCKS = BlockReconstruction(layer_weight=0.0)
TIMESTEPS = 10
STEPS = 20
SHOWN = 8
IMAGES, FLOAT = ".safetensors", "float.safetensors"


@dataclass(frozen=True)
class Subject:
    """A denoiser to measure with: samples by selection and seed, held-out states, and what draws images."""

    net: nn.Module
    samples: Callable[[Selection, int], CalibrationSet]
    states: CalibrationSet
    images: Callable[[nn.Module], Tensor]


def variants() -> dict[str, Callable[[str], Recipe]]:
    """Recipes by name: DMQ and EDA-DM built up, the default, and the default with ingredients left out.

    All take the same number of samples from the same number of trajectories, uniform or by density and diversity.
    """
    return {
        "min-max per step": _minmax,
        "+ LES": lambda bits: _with(_minmax(bits), scaling=ChannelScaling(step_weights=UNIFORM)),
        "+ step weights": lambda bits: _with(_minmax(bits), scaling=ChannelScaling()),
        "+ PTS": lambda bits: _with(_minmax(bits, power_of_two=True), scaling=ChannelScaling()),
        "+ AdaRound": lambda bits: _with(recipes.dmq(bits), bias_correction=False),
        "+ bias correction = dmq": recipes.dmq,
        "dmq, rounding in closed form": _feedback,
        "dmq, rounding in closed form, TDAC samples": lambda bits: _with(_feedback(bits), select=TDAC),
        "dmq, rounding in closed form without LES": lambda bits: _with(_feedback(bits), scaling=None),
        "dmq, rounding in closed form without LES, TDAC samples": lambda bits: _with(
            _feedback(bits), scaling=None, select=TDAC
        ),
        "dmq, TDAC samples": lambda bits: _with(recipes.dmq(bits), select=TDAC),
        "dmq, protected": lambda bits: _with(recipes.dmq(bits), protection=Protection()),
        "dmq, blocks": lambda bits: _with(recipes.dmq(bits), rounding=None, blocks=BLOCKS),
        "dmq, FBR": lambda bits: _with(recipes.dmq(bits), rounding=None, blocks=FBR),
        "dmq, FBR, TDAC samples": lambda bits: _with(recipes.dmq(bits), rounding=None, blocks=FBR, select=TDAC),
        "static": lambda bits: _with(recipes.eda_dm(bits), blocks=None, select=EVEN),
        "+ layers": lambda bits: _with(recipes.eda_dm(bits), blocks=None, rounding=LAYERS, select=EVEN),
        "+ blocks": lambda bits: _with(recipes.eda_dm(bits), blocks=BLOCKS, select=EVEN),
        "+ FBR": lambda bits: _with(recipes.eda_dm(bits), select=EVEN),
        "+ TDAC samples = eda_dm": recipes.eda_dm,
        "default, bits by kurtosis": lambda bits: _with(
            recipes.default(bits), allocation=BitAllocation(scorer=Scorer.KURTOSIS, scope=Scope.LAYER)
        ),
        "default, bits shared out always": lambda bits: _with(
            recipes.default(bits), allocation=BitAllocation(least_gain=0.0)
        ),
        "default, bits by layer": lambda bits: _with(
            recipes.default(bits), allocation=BitAllocation(scope=Scope.LAYER)
        ),
        "default, bits of weights alone": lambda bits: _with(
            recipes.default(bits), allocation=BitAllocation(inputs=False)
        ),
        "default, TDAC samples": lambda bits: _with(recipes.default(bits), select=TDAC),
        "default": recipes.default,
        "default, distilled with low rank": lambda bits: _with(recipes.mpq_dm(bits), distillation=_low_rank(None)),
        "default, distilled with low rank and relations = mpq_dm": recipes.mpq_dm,
        "default without shared bits": _even,
        "default without shared bits, TDAC samples": lambda bits: _with(_even(bits), select=TDAC),
        "default without shared bits, then FBR": lambda bits: _with(_even(bits), blocks=FBR),
        "default without shared bits or LES": lambda bits: _with(_even(bits), scaling=None),
        "default without shared bits or step weights": lambda bits: _with(
            _even(bits), scaling=ChannelScaling(step_weights=UNIFORM)
        ),
        "default without shared bits or PTS": _without_votes,
        "default without shared bits or bias correction": lambda bits: _with(_even(bits), bias_correction=False),
        "default without shared bits or protection": lambda bits: _with(_even(bits), protection=None),
        "default without shared bits or distillation": lambda bits: _with(_even(bits), distillation=None),
        "default without shared bits or good rounding": lambda bits: _with(_even(bits), rounding=None),
    }


def _low_rank(relation: Relation | None) -> Distillation | None:
    base = recipes.mpq_dm().distillation
    return None if base is None else dataclasses.replace(base, relation=relation)


def _even(bits: str) -> Recipe:
    """The default with one width for all channels, and one for all inputs."""
    return _with(recipes.default(bits), allocation=None)


def _minmax(bits: str, *, power_of_two: bool = False) -> Recipe:
    return recipes.minmax(bits, ranges=Ranges.PER_STEP, power_of_two=power_of_two)


def _feedback(bits: str) -> Recipe:
    return recipes.dmq(bits, rounding=RoundingMethod.FEEDBACK)


def _without_votes(bits: str) -> Recipe:
    recipe = _even(bits)
    return _with(recipe, config=dataclasses.replace(recipe.config, power_of_two=None))


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, **changes)


def custom(loaders: Path, model: str, samples: int, trajectories: int, images: int, folder: Path) -> Subject:
    """A model of a loaders file, with its authors' sampler."""
    module = load_module(loaders)
    net, run = getattr(module, model)(), samplers(module)[model]

    def recorded(select: Selection, seed: int) -> CalibrationSet:
        name = f"{model}-{samples}-{trajectories}{_suffix(select)}{_seeded(seed)}.safetensors"
        return _recorded(folder / name, lambda: record(net, run, trajectories, samples, first_seed(seed), select))

    states = _recorded(
        folder / f"{model}-states.safetensors", lambda: spread(record(net, run, 8, 10_000, 2000), TIMESTEPS)
    )

    def draw(denoiser: nn.Module) -> Tensor:
        return torch.cat([run(denoiser, 4, seed) for seed in range(0, images, 4)])

    return Subject(net, recorded, states, draw)


def demo(samples: int, trajectories: int, images: int) -> Subject:
    """The bundled demo pipeline."""
    pipeline = load_pipeline("demo")

    @functools.cache
    def recorded(select: Selection, seed: int) -> CalibrationSet:
        given = {"num_samples": samples, "trajectories": trajectories, "select": select}
        return record_pipeline(pipeline, steps=STEPS, seed=first_seed(seed), **given)

    states = held_out_states(pipeline, steps=STEPS, seed=2000, timesteps=TIMESTEPS)
    return Subject(pipeline.unet, recorded, states, lambda net: images_of(pipeline, net, range(images), steps=STEPS))


def first_seed(seed: int) -> int:
    """First trajectory of the calibration samples of a run, away from those of other runs and the held-out ones."""
    return 1000 + 10_000 * seed


def _seeded(seed: int) -> str:
    return f"-seed{seed}" if seed else ""


def _suffix(select: Selection) -> str:
    """Tells files of different selections apart."""
    if select == EVEN:
        return ""
    return f"-{select.method.value}-{hashlib.sha256(repr(select).encode()).hexdigest()[:8]}"


def _recorded(file: Path, make: Callable[[], CalibrationSet]) -> CalibrationSet:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        make().save(file)
    return CalibrationSet.load(file)


def measure(
    subject: Subject, recipe: Recipe, expected: Tensor, batch_size: int, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """Quantize and compare: both measures, time and memory; and the images drawn."""
    samples = subject.samples(recipe.select, seed)
    started = time.monotonic()
    prepared = dmq_ao.prepare(subject.net, recipe, samples.example())
    report = dmq_ao.calibrate(prepared, samples, batch_size=batch_size, seed=seed)
    quantized = dmq_ao.convert(prepared)
    seconds = time.monotonic() - started
    errors = one_step_error(subject.net, quantized, by_timestep(subject.states))
    drawn = subject.images(quantized)
    result = {
        "one_step_error": errors.mean,
        "errors_by_timestep": errors.to_dict(),
        **image_fidelity(drawn, expected, data_range=1.0),
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "mean_bits": quantized.mean_bits,
        "samples": report.samples,
        "distillation_steps": None if report.distillation is None else report.distillation.steps,
        "recipe": quantized.recipe.to_dict(),
        **provenance(recipe),
    }
    return result, drawn


def run(
    subject: Subject, folder: Path, widths: Iterable[str], chosen: Iterable[str], seeds: Iterable[int], batch_size: int
) -> None:
    """Measure what is not in ``folder`` yet, one file a variant, width and seed."""
    expected: Tensor | None = None
    for bits, seed, name in itertools.product(widths, seeds, chosen):
        file = folder / bits / file_name(name, seed)
        if file.exists():
            continue
        if expected is None:
            with torch.no_grad():
                expected = subject.images(subject.net)
            _keep_images(expected, folder / FLOAT)
        result = {"model": folder.name, "bits": bits, "variant": name, "seed": seed}
        result |= {"date": str(datetime.date.today()), "machine": machine()}
        found, drawn = measure(subject, variants()[name](bits), expected, batch_size, seed)
        result |= found
        file.parent.mkdir(parents=True, exist_ok=True)
        _keep_images(drawn, file.with_suffix(IMAGES))
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, file)
        psnr = f"PSNR {result['psnr_db']:.2f} dB (std {result['psnr_std_db']:.2f})"
        what = f"{folder.name} {bits} {name}{_seeded(seed)}"
        print(f"{what}: one-step {result['one_step_error']:.4f}, {psnr}, {result['seconds']:.0f} s", flush=True)


def _keep_images(drawn: Tensor, file: Path) -> None:
    """The first of a result's images, as bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": drawn[:SHOWN].clamp(0, 1).mul(255).round().byte().contiguous()}, file)


def pictures(results: list[dict[str, Any]], folder: Path) -> None:
    """A grid of images for each model and width, float first; of the results whose images are still there."""
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in results):
        rows = {"float": folder / model / FLOAT}
        for r in results:
            if (r["model"], r["bits"], r["seed"]) == (model, bits, 0):
                rows[textwrap.fill(r["variant"], 24)] = (
                    folder / model / bits / file_name(r["variant"], 0)
                ).with_suffix(IMAGES)
        there = {name: load_file(file)["images"].float() / 255 for name, file in rows.items() if file.exists()}
        if len(there) > 1:
            (folder / f"{model}-{bits}.png").write_bytes(image_grid(there))


def file_name(variant: str, seed: int) -> str:
    """Of a result."""
    return f"{variant.replace(' ', '_').replace(',', '')}{_seeded(seed)}.json"


def collect(folder: Path) -> list[dict[str, Any]]:
    """All results under a folder, by model, width and the order of the variants."""
    order = list(variants())
    found = [json.loads(file.read_text()) for file in folder.glob("*/*/*.json")]
    places = ((r["model"], -int(r["bits"][1]), r["bits"], order.index(r["variant"]), r["seed"]) for r in found)
    return [r for _, r in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table for each model and width."""
    lines = ["# What each ingredient brings", ""]
    machines = sorted({f"{r['machine']['cpu']}, torch {r['machine']['torch']}, {r['date']}" for r in results})
    lines += [f"Measured by `examples/ablation.py` on {'; '.join(machines)}.", ""]
    lines += [
        "Seconds include other work of the machine; peak is that of the process so far, earlier rows included.",
        "",
    ]
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in results):
        rows = over_seeds([r for r in results if (r["model"], r["bits"]) == (model, bits)])
        base = next((r["one_step_error"] for r in rows if r["variant"] == "min-max per step"), None)
        lines += [f"## {model}, {bits.upper()}", ""]
        lines += [
            "| variant | one-step error | of min-max | PSNR dB (std) | samples | s | peak GiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            share = "-" if base is None else f"{r['one_step_error'] / base:.2f}"
            peak = "-" if r["peak_rss_bytes"] is None else f"{r['peak_rss_bytes'] / 2**30:.1f}"
            psnr = f"{r['psnr_db']:.2f} ({r['psnr_std_db']:.2f})"
            steps = _distillation_steps(r)
            name = r["variant"] + (f" ({steps} steps)" if steps else "")
            error = f"{r['one_step_error']:.4f}" + r["spread"]
            cost = f"{r['samples']} | {r['seconds']:.0f} | {peak}"
            lines.append(f"| {name} | {error} | {share} | {psnr} | {cost} |")
        lines.append("")
    return "\n".join(lines)


def _distillation_steps(result: dict[str, Any]) -> int | None:
    """Steps taken; results from before these were kept took those of their recipe."""
    distilled = result["recipe"]["distillation"]
    steps: int | None = result.get("distillation_steps", None if distilled is None else distilled["steps"])
    return steps


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means over its seeds, the standard deviation of the error in ``spread``."""
    found = []
    for variant in dict.fromkeys(r["variant"] for r in rows):
        same = [r for r in rows if r["variant"] == variant]
        measured = ("one_step_error", "psnr_db", "psnr_std_db", "seconds")
        errors = [r["one_step_error"] for r in same]
        spread = f" ± {statistics.stdev(errors):.4f} ({len(same)} seeds)" if len(same) > 1 else ""
        means = {key: statistics.fmean(r[key] for r in same) for key in measured}
        found.append({**same[0], **means, "spread": spread})
    return found


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """One-step error by timestep, a panel for each model and width."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((r["model"], r["bits"]) for r in results))
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(5 * columns, 3.6 * -(-len(panels) // columns)), squeeze=False
    )
    for axis, (model, bits) in zip(axes.flat, panels, strict=False):
        for r in results:
            if (r["model"], r["bits"], r["seed"]) == (model, bits, 0) and not r["variant"].startswith("default "):
                errors = r["errors_by_timestep"]
                axis.plot(errors["timesteps"], errors["errors"], label=r["variant"], marker=".", linewidth=1)
        axis.set(title=f"{model} {bits.upper()}", xlabel="timestep", ylabel="relative one-step error", yscale="log")
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo"], choices=("demo", "ddpm64", "flowvit", "dit"))
    parser.add_argument("--loaders", type=Path, help="Python file with the functions and samplers of other models")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8", "w4a6"])
    parser.add_argument("--variants", nargs="+", default=list(variants()), choices=list(variants()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration's trajectories and draws")
    parser.add_argument("--samples", type=int, default=160, help="calibration samples")
    parser.add_argument("--trajectories", type=int, default=32, help="trajectories they are taken from")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    if set(args.models) - {"demo"} and args.loaders is None:
        parser.error("--loaders is needed for models other than demo")
    for model in args.models:
        count = (args.samples, args.trajectories, args.images)
        subject = demo(*count) if model == "demo" else custom(args.loaders, model, *count, args.out / "recorded")
        run(subject, args.out / model, args.bits, args.variants, args.seeds, args.batch_size)
    results = collect(args.out)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(table(results) + "\n")
    plot(results, args.out / "errors.png")
    pictures(results, args.out)
    print(table(results))


if __name__ == "__main__":
    main()
