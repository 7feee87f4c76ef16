"""Ours and the peers, in one process on one machine: milliseconds in interleaved rounds, and the error beside them.

    pip install -e ".[bench]"
    python examples/benchmark.py --models cifar-unet -o build/benchmark
    python examples/benchmark.py --loaders MODELS/loaders.py --models ddpm64 flowvit -o build/benchmark

All are given the same calibration samples, the same call and as many threads as the machine has cores. Errors are
relative to the float denoiser, on states of trajectories that nobody was calibrated on (``cifar-unet`` has random
weights: noise stands for states, and only speed is of interest). A peer that fails is
reported with its error. Writes ``<model>.json`` and ``<model>.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation import custom
from peers import PEERS, Call, Inputs, Plain
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmark import NAMED, first_rows, named_denoiser
from dmq_ao.calibration import CalibrationSet
from dmq_ao.config import Ranges, Recipe
from dmq_ao.evaluation import latency, machine, one_step_error, peak_rss_bytes
from dmq_ao.measure import by_timestep, float_bytes

OURS: dict[str, tuple[Callable[[], Recipe], str]] = {
    "dmq_ao W8A8": (lambda: recipes.minmax("w8a8", ranges=Ranges.PER_STEP), "default"),
    "dmq_ao W8A8, max": (lambda: recipes.minmax("w8a8", ranges=Ranges.PER_STEP), "max"),
    "dmq_ao W4A8+PTS, max": (lambda: recipes.minmax("w4a8", power_of_two=True, ranges=Ranges.PER_STEP), "max"),
}
BATCH = {"flowvit": 64}
SAMPLES = {"flowvit": (800, 400)}  # calibration samples, trajectories they come from
BASE = "torch fp32 compiled"


@dataclass(frozen=True)
class Case:
    """A denoiser, one call of it, calibration samples and held-out states."""

    net: nn.Module
    inputs: Inputs
    samples: CalibrationSet
    states: CalibrationSet
    batch_size: int

    def calibration(self) -> list[Inputs]:
        """The samples as calls of the benchmark's shape."""
        whole = len(self.samples) // self.batch_size * self.batch_size
        rows = torch.arange(max(whole, self.batch_size)) % len(self.samples)
        return list(self.samples.select(rows).batches(self.batch_size))


class Padded(nn.Module):
    """A call of fixed batch size as a module that takes any."""

    def __init__(self, call: Call, size: int) -> None:
        super().__init__()
        self.call, self.size = call, size

    def forward(self, **inputs: Any) -> Tensor:
        """Denoise, ``size`` rows at a time; the last rows are repeated to fill up."""
        count = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1)
        parts = [
            self._part(inputs, torch.arange(start, start + self.size) % count) for start in range(0, count, self.size)
        ]
        return torch.cat(parts)[:count]

    def _part(self, inputs: Inputs, rows: Tensor) -> Tensor:
        chosen = {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        result = self.call(**chosen)
        return (result if isinstance(result, Tensor) else result[0]).float().clone()


def case_of(model: str, loaders: Path | None, folder: Path) -> Case:
    """What to measure with."""
    size = BATCH.get(model, 4)
    if model in NAMED:
        net, samples = named_denoiser(model)
        states = samples
    else:
        if loaders is None:
            raise SystemExit(f"{model} is loaded by --loaders FILE; without one there are {sorted(NAMED)}")
        subject = custom(loaders, model, *SAMPLES.get(model, (160, 32)), 0, folder / "recorded")
        net, samples, states = subject.net, subject.samples, subject.states
    return Case(net, first_rows(samples, size), samples, states, size)


def ours(case: Case, names: Sequence[str], report: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Call]]:
    """Our variants, quantized here."""
    made: dict[str, dmq_ao.QuantizedDenoiser] = {}
    for name in names:
        recipe, mode = OURS[name][0](), OURS[name][1]
        key = json.dumps(recipe.to_dict(), sort_keys=True)
        if key not in made:
            prepared = dmq_ao.prepare(case.net, recipe, case.samples.example())
            dmq_ao.calibrate(prepared, case.samples)
            made[key] = dmq_ao.convert(prepared)
        report[name] = {"kernels": made[key].kernel_counts, "mean_bits": made[key].mean_bits}
        yield name, torch.no_grad()(dmq_ao.compile(made[key], mode))


def built(case: Case, peers: Sequence[str], mine: Sequence[str]) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """Calls by name, warmed up, and what is known of each."""
    calls: dict[str, Call] = {}
    report: dict[str, dict[str, Any]] = {}
    calibration = case.calibration()
    for name in peers:
        started = time.perf_counter()
        try:
            call = PEERS[name](case.net, case.inputs, calibration)
            call(**case.inputs)
        except Exception as error:  # a peer that cannot is a result, not a failure of ours
            report[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            print(f"{name}: {report[name]['failed']}", flush=True)
            continue
        calls[name] = call
        report[name] = {"first_call_s": time.perf_counter() - started}
        print(f"{name}: ready in {report[name]['first_call_s']:.0f} s", flush=True)
    for name, call in ours(case, mine, report):
        started = time.perf_counter()
        call(**case.inputs)
        calls[name] = call
        report[name]["first_call_s"] = time.perf_counter() - started
        print(f"{name}: ready in {report[name]['first_call_s']:.0f} s", flush=True)
    gc.collect()
    return calls, report


def measure(case: Case, peers: Sequence[str], mine: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds, ratios and errors by name."""
    calls, report = built(case, peers, mine)
    bound = {name: (lambda call=call: call(**case.inputs)) for name, call in calls.items()}
    teacher = torch.no_grad()(Plain(case.net))
    for name, timed in latency(bound, repeats=repeats, progress=True).items():
        report[name] |= vars(timed)
    for name, call in calls.items():
        student = Padded(call, case.batch_size)
        report[name]["one_step_error"] = one_step_error(
            Padded(teacher, case.batch_size), student, by_timestep(case.states)
        ).mean
    return report


def table(model: str, batch: int, rows: Mapping[str, Mapping[str, Any]], where: Mapping[str, Any], date: str) -> str:
    """Markdown, fastest last."""
    timed = {name: row for name, row in rows.items() if "median_ms" in row}
    base = timed.get(BASE, {}).get("median_ms")
    rival = min((row["median_ms"] for name, row in timed.items() if name.startswith("OpenVINO")), default=None)
    lines = [
        f"## {model}, batch {batch}",
        "",
        f"`examples/benchmark.py`, {where['cores']} cores of {where['cpu']}, torch {where['torch']}, {date}. ms are"
        " medians of interleaved calls.",
        "",
        "| | ms (p10 to p90) | compiled fp32 / this | fastest OpenVINO / this | one-step error | first call s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(timed.items(), key=lambda item: -item[1]["median_ms"]):
        ms = row["median_ms"]
        lines.append(
            f"| {name} | {ms:.1f} ({row['p10_ms']:.1f} to {row['p90_ms']:.1f}) | {_ratio(base, ms)}"
            f" | {_ratio(rival, ms)} | {row['one_step_error']:.4f} | {row['first_call_s']:.0f} |"
        )
    lines += [f"| {name} | failed: {row['failed']} | | | | |" for name, row in rows.items() if "failed" in row]
    return "\n".join(lines) + "\n"


def _ratio(base: float | None, ms: float) -> str:
    return "-" if base is None else f"{base / ms:.2f}"


def main() -> None:
    """Build, time, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=Path, help="Python file with the models' functions and samplers")
    parser.add_argument("--models", nargs="+", default=["cifar-unet"])
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--ours", nargs="*", choices=sorted(OURS), default=list(OURS), metavar="OURS")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        case = case_of(model, args.loaders, args.out)
        rows = measure(case, args.peers, args.ours, args.repeats)
        date, where = time.strftime("%Y-%m-%d"), machine()
        result = {"model": model, "batch_size": case.batch_size, "date": date, "machine": where, "rows": rows}
        result |= {"float_bytes": float_bytes(case.net), "peak_rss_bytes": peak_rss_bytes()}
        (args.out / f"{model}.json").write_text(json.dumps(result, indent=2) + "\n")
        text = table(model, case.batch_size, rows, where, date)
        (args.out / f"{model}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
