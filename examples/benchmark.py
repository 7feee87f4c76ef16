"""Ours and the peers, in one process on one machine: milliseconds in interleaved rounds, and the error beside them.

    pip install -e ".[bench]"
    python examples/benchmark.py --models cifar-unet dit-s-2 --footprint -o build/benchmark
    python examples/benchmark.py --loaders MODELS/loaders.py --models ddpm64 flowvit -o build/benchmark
    python examples/benchmark.py --models sd15-unet --peers 'torch *' 'OpenVINO NNCF int8' -o build/benchmark
    python examples/benchmark.py --device cuda --models sd15-unet dit-xl-2 --batch-size 8 -o build/benchmark-cuda

All are given the same calibration samples, the same call and as many threads as torch. Errors are relative to the
float denoiser, on states of trajectories that nobody was calibrated on (models without files have random weights:
noise stands for states, and only speed is of interest). A peer that fails is reported with its error. All stay in
memory until the end: of a large model, choose peers that fit together. ``--footprint`` adds memory and seconds of
loading, by ``examples/footprint.py``. ``--device cuda`` runs ours in bfloat16 against compiled bfloat16 and torchao on
a GPU, timed by its own clock; without a GPU it says so, and measures nothing. Writes ``<model>.json`` and
``<model>.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import footprint
import torch
from ablation import EVEN, custom

import dmq_ao
from dmq_ao import recipes
from dmq_ao.api.compile import Mode
from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.cuda_peers import CUDA_PEERS
from dmq_ao.benchmarks.named import NAMED, named_denoiser
from dmq_ao.benchmarks.peer_benchmark import Case, Ours, peers_on, side_by_side
from dmq_ao.benchmarks.peer_table import peer_notes, peer_rows
from dmq_ao.benchmarks.peers import PEERS, check_installed, chosen_peers, narrowed
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.config import Ranges, Recipe
from dmq_ao.evaluation import machine, peak_rss_bytes
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.graph.arguments import flatten_inputs, moved_inputs
from dmq_ao.samples import CalibrationSet

CPU = torch.device("cpu")
OURS: dict[str, tuple[Callable[[], Recipe], Mode]] = {
    "dmq_ao W8A8": (lambda: recipes.minmax("w8a8", ranges=Ranges.PER_STEP), "default"),
    "dmq_ao W4A16": (lambda: recipes.minmax("w4a16"), "default"),
    "dmq_ao W8A8, max": (lambda: recipes.minmax("w8a8", ranges=Ranges.PER_STEP), "max"),
    "dmq_ao W4A8+PTS, max": (lambda: recipes.minmax("w4a8", power_of_two=True, ranges=Ranges.PER_STEP), "max"),
}
CUDA: dict[str, tuple[Callable[[], Recipe], Mode]] = {
    "dmq_ao W8A8": (lambda: recipes.minmax("w8a8", ranges=Ranges.PER_STEP), "max"),
    "dmq_ao W8A8, linears float8": (lambda: recipes.minmax("w8a8-fp8", ranges=Ranges.PER_STEP), "max"),
    "dmq_ao W4A8+PTS": (lambda: recipes.minmax("w4a8", power_of_two=True, ranges=Ranges.PER_STEP), "max"),
}
BATCH = {"flowvit": 64}
SAMPLES = {"flowvit": (800, 400)}  # calibration samples, trajectories they come from


def case_of(
    model: str, loaders: Path | None, folder: Path, device: torch.device = CPU, batch_size: int | None = None
) -> Case:
    """What to measure with."""
    if model in NAMED:
        net, samples = named_denoiser(model)
        size = batch_size or NAMED[model].batch_size
        return Case(net.to(device), first_rows(samples, size), samples, samples, size)
    if loaders is None:
        raise SystemExit(f"{model} is loaded by --loaders FILE; without one there are {sorted(NAMED)}")
    size = batch_size or BATCH.get(model, 4)
    subject = custom(loaders, model, *SAMPLES.get(model, (160, 32)), 0, folder / "recorded")
    samples = subject.samples(EVEN, 0)
    return Case(subject.net.to(device), first_rows(samples, size), samples, subject.states, size)


def ours(case: Case, names: Sequence[str]) -> dict[str, Ours]:
    """Our variants, quantized here; those that differ only in how they are compiled share their integers."""
    made: dict[str, Ours] = {}
    variants: dict[str, Ours] = {}
    known, backend, net, samples = OURS, "auto", case.net, case.samples
    if case.device != CPU:
        known, backend, net, samples = CUDA, "cuda", narrowed(case.net), bfloat16_samples(case.samples)
    for name in names:
        recipe, mode = known[name][0](), known[name][1]
        key = json.dumps(recipe.to_dict(), sort_keys=True)
        if key not in made:
            started = time.perf_counter()
            prepared = dmq_ao.prepare(net, recipe, samples.example(), backend=backend)
            dmq_ao.calibrate(prepared, samples, batch_size=min(case.batch_size, 8))
            made[key] = Ours(dmq_ao.convert(prepared, backend), mode, time.perf_counter() - started)
        variants[name] = Ours(made[key].denoiser, mode, made[key].build_seconds)
    return variants


def bfloat16_samples(samples: CalibrationSet) -> CalibrationSet:
    """The samples for a denoiser in bfloat16."""
    inputs, shared = (
        flatten_inputs(moved_inputs(values, floats=torch.bfloat16)) for values in (samples.inputs, samples.shared)
    )
    return dataclasses.replace(samples, inputs=inputs, shared=shared)


def loading(model: str, loaders: Path | None, case: Case, variants: Mapping[str, Ours]) -> dict[str, dict[str, Any]]:
    """Figures of ``examples/footprint.py`` by the names of the rows; eager calls, so that modes are one."""
    names = {one.denoiser: name for name, one in variants.items()}
    distinct = {name: denoiser for denoiser, name in names.items()}
    found = footprint.measure(model, loaders, case.net, case.inputs, distinct, repeats=3)
    print(footprint.table(model, found), flush=True)
    return {
        "torch fp32": found[footprint.FLOAT],
        **{name: found[names[one.denoiser]] for name, one in variants.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown, fastest last."""
    where = report["machine"]
    heading, *rows = peer_rows(report)
    notes = ". ".join(peer_notes(report))
    return "\n".join(
        [
            f"## {report['model']}, batch {report['batch_size']}",
            "",
            f"`examples/benchmark.py`, {report.get('device') or _processor(where)}, torch {where['torch']},"
            f" {report['date']}. {notes}.",
            "",
            _line(heading),
            _line(["---"] * len(heading)).replace(" ", ""),
            *map(_line, rows),
            "",
        ]
    )


def _processor(where: Mapping[str, Any]) -> str:
    return f"{where['cores']} cores of {where['cpu']}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def run(model: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The report of one model."""
    variants = ours(case, args.ours)
    loaded = loading(model, args.loaders, case, variants) if args.footprint else {}
    report = side_by_side(case, args.peers, variants, repeats=args.repeats, progress=True)
    for name, figures in loaded.items():
        if name in report["rows"]:
            report["rows"][name] = {**figures, **report["rows"][name]}
    where = machine()
    return {
        "model": model,
        "batch_size": case.batch_size,
        "date": time.strftime("%Y-%m-%d"),
        "machine": where,
        **provenance({name: {**OURS, **CUDA}[name][0]() for name in args.ours}),
        "device": None if case.device == CPU else where["gpu"],
        **report,
        "float_bytes": float_bytes(case.net),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> None:
    """Build, time, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=Path, help="Python file with the models' functions and samplers")
    parser.add_argument("--models", nargs="+", default=["cifar-unet"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peers", nargs="*", default=["*"], metavar="PATTERN", help=f"of {', '.join([*PEERS, *CUDA_PEERS])}"
    )
    parser.add_argument("--ours", nargs="*", choices=sorted({*OURS, *CUDA}), metavar="OURS")
    parser.add_argument("--batch-size", type=int, help="rows of a call; each model has its own otherwise")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--footprint", action="store_true", help="memory and seconds of loading, in fresh processes")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and (why := cuda.why_not_here(device) if torch.cuda.is_available() else "no CUDA device"):
        print(f"nothing measured: {why}")
        return
    if args.device == "cuda" and args.footprint:
        parser.error("--footprint measures a CPU's memory; on a GPU the table has its own column")
    args.ours = args.ours or list(OURS if args.device == "cpu" else CUDA)
    known = peers_on(device)
    args.peers = chosen_peers(args.peers, known)
    check_installed(args.peers, known)  # of some: one that lacks its own packages has a row
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        report = run(model, case_of(model, args.loaders, args.out, device, args.batch_size), args)
        (args.out / f"{model}.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / f"{model}.md").write_text(table(report))
        print(table(report), flush=True)


if __name__ == "__main__":
    main()
