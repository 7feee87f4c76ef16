"""What choosing bits channel by channel brings at equal mean bits: weight error and output error, scheme by scheme.

    python examples/allocation.py --models demo --bits w3a16 w4a16 -o build/allocation
    python examples/allocation.py --loaders MODELS/loaders.py --models ddpm64 -o build/allocation

Weights are rounded to nearest on grids of least error, with scales in closed form, and nothing is learned: what
differs is only which output channel has how many bits. The weight error is relative, of all quantized weights; the
one-step error is that of ``ablation.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from ablation import EVEN, Subject, custom, demo
from torch import Tensor

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks.measure import by_timestep
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.config import BitAllocation, ChannelScaling, Ranges, Recipe, Scope, Scorer
from dmq_ao.evaluation import machine, one_step_error
from dmq_ao.graph import layer_nodes
from dmq_ao.quantizer.prepared import float_weight, observers

SCHEMES: dict[str, BitAllocation | None] = {
    "uniform": None,
    "kurtosis, none or a tenth moved (published code)": BitAllocation(
        scorer=Scorer.KURTOSIS, scope=Scope.LAYER, groups=1
    ),
    "kurtosis, up to half moved (paper)": BitAllocation(scorer=Scorer.KURTOSIS, scope=Scope.LAYER),
    "error gain, each layer": BitAllocation(scope=Scope.LAYER),
    "error gain, whole model": BitAllocation(least_gain=1.0),
}


def recipe_of(bits: str) -> Recipe:
    """Nearest rounding after scales in closed form."""
    base = recipes.minmax(bits, ranges=Ranges.PER_STEP, observer="mse")
    return dataclasses.replace(base, scaling=ChannelScaling(steps=0))


def measure(subject: Subject, bits: str, allocation: BitAllocation | None) -> dict[str, Any]:
    """Quantize, and compare weights and outputs with the float denoiser's."""
    samples, started = subject.samples(EVEN, 0), time.monotonic()
    prepared = dmq_ao.prepare(subject.net, recipe_of(bits), samples.example())
    plan = None if allocation is None else dmq_ao.search_bits(prepared, samples, allocation=allocation)
    searched = time.monotonic() - started
    dmq_ao.calibrate(prepared, samples, bits=plan)
    quantized = dmq_ao.convert(prepared, "reference")
    noise, signal = 0.0, 0.0
    for name, node in layer_nodes(prepared).items():
        if name not in observers(prepared):
            continue
        weight, record = float_weight(prepared, node).double(), quantized.records[name]
        noise += float((_unscaled(record.weight.dequantize().double(), record) - weight).square().sum())
        signal += float(weight.square().sum())
    return {
        "weight_error": (noise / signal) ** 0.5,
        "one_step_error": one_step_error(subject.net, quantized, by_timestep(subject.states)).mean,
        "mean_bits_of_codes": _code_bits(quantized),
        "mean_bits": quantized.mean_bits,
        "search_seconds": 0.0 if plan is None else searched,
    }


def _unscaled(weight: Tensor, record: Any) -> Tensor:
    scale = None if record.activation is None else record.activation.channel_scale
    if scale is None:
        return weight
    assert weight.shape[1] == len(scale), "grouped convolutions are not measured here"
    return weight / scale.double().reshape(1, -1, *[1] * (weight.dim() - 2))


def _code_bits(quantized: dmq_ao.QuantizedDenoiser) -> float:
    weights = [record.weight for record in quantized.records.values()]
    return sum(w.mean_bits * w.codes.numel() for w in weights) / sum(w.codes.numel() for w in weights)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | bits | scheme | weight error | one-step error | mean bits of codes | of all weights |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        errors = f"{r['weight_error']:.4f} | {r['one_step_error']:.4f}"
        means = f"{r['mean_bits_of_codes']:.3f} | {r['mean_bits']:.3f}"
        lines.append(f"| {r['model']} | {r['bits'].upper()} | {r['scheme']} | {errors} | {means} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every scheme, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo"], choices=("demo", "ddpm64", "flowvit", "dit"))
    parser.add_argument("--loaders", type=Path, help="as for ablation.py")
    parser.add_argument("--bits", nargs="+", default=["w3a16", "w4a16"])
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for results.json and table.md")
    args = parser.parse_args()
    if set(args.models) - {"demo"} and args.loaders is None:
        parser.error("--loaders is needed for models other than demo")
    results = []
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        count = (args.samples, args.trajectories, 4)
        subject = demo(*count) if model == "demo" else custom(args.loaders, model, *count, args.out / "recorded")
        for bits in args.bits:
            for scheme, allocation in SCHEMES.items():
                with torch.no_grad():
                    found = measure(subject, bits, allocation)
                results.append({"model": model, "bits": bits, "scheme": scheme, **found})
                print(f"{model} {bits} {scheme}: {found}", flush=True)
    report = {"date": str(datetime.date.today()), "machine": machine(), "results": results}
    report |= provenance({bits: recipe_of(bits) for bits in args.bits})
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
