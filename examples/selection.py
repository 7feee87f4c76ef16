"""What choosing calibration samples costs: seconds of collection, uniform against the other selections, interleaved.

    python examples/selection.py --loaders MODELS/loaders.py --models ddpm64 -o build/selection

``evaluations`` are rows that the denoiser was run on: a trajectory that has given its share is left early. Ratios are
to uniform collection. Writes ``<model>.json`` and ``<model>.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quantize_custom_module import Sampler, load_module, record, samplers
from torch import nn

from dmq_ao.benchmarks.provenance import commit
from dmq_ao.config import SelectMethod
from dmq_ao.evaluation import machine, peak_rss_bytes

UNIFORM = SelectMethod.UNIFORM.value


def collect(net: nn.Module, run: Sampler, trajectories: int, samples: int, method: str) -> dict[str, Any]:
    """One collection: its seconds, evaluations, samples a timestep and MiB kept."""
    rows = 0

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = net.register_forward_pre_hook(count)
    started = time.monotonic()
    found = record(net, run, trajectories, samples, seed=1000, select=method)
    seconds = time.monotonic() - started
    handle.remove()
    return {
        "seconds": seconds,
        "evaluations": rows,
        "samples": len(found),
        "counts": torch.bincount(found.step, minlength=len(found.timesteps)).tolist(),
        "kept_mib": sum(value.nbytes for value in found.inputs.values()) / 2**20,
    }


def measure(net: nn.Module, run: Sampler, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each method's collection with the median of its seconds, in interleaved rounds."""
    seconds: dict[str, list[float]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(args.repeats):
        for method in (UNIFORM, *args.methods):
            found[method] = collect(net, run, args.trajectories, args.samples, method)
            seconds[method].append(found[method]["seconds"])
            print(f"{method}: {seconds[method][-1]:.1f} s", flush=True)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    return {
        method: {**one, "seconds": medians[method], "ratio": medians[method] / medians[UNIFORM]}
        for method, one in found.items()
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row a method."""
    where = report["machine"]
    lines = [
        f"## {report['model']}, {report['trajectories']} trajectories",
        "",
        f"`examples/selection.py`, {where['cores']} cores of {where['cpu']}, torch {where['torch']},"
        f" {report['date']}.",
        "",
        "| selection | s | of uniform | evaluations | samples | MiB kept | samples of each timestep |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, one in report["methods"].items():
        cells = [method, f"{one['seconds']:.1f}", f"{one['ratio']:.2f}", str(one["evaluations"]), str(one["samples"])]
        cells += [f"{one['kept_mib']:.1f}", " ".join(map(str, one["counts"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Collect, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=Path, required=True, help="Python file with the functions and samplers")
    parser.add_argument("--models", nargs="+", default=["ddpm64"], choices=("ddpm64", "flowvit", "dit"))
    parser.add_argument("--methods", nargs="+", default=["tdac"], choices=("tdac", "normal"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    module = load_module(args.loaders)
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        report = {
            "model": model,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "commit": commit(),  # nothing is quantized: there is no recipe
            "trajectories": args.trajectories,
            "methods": measure(getattr(module, model)(), samplers(module)[model], args),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        (args.out / f"{model}.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / f"{model}.md").write_text(table(report))
        print(table(report), flush=True)


if __name__ == "__main__":
    main()
