"""What scales, exponents, ranges per step, mixed widths and two-byte inputs cost at run time, against plain W4A8.

    python examples/overhead.py -o build/overhead.json

The UNet of DDPM on CIFAR-10 with random weights (speed does not depend on them), batch 4, all variants compiled and
called in turns. The scales are those of the closed form: how they were learned does not change what they cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

import dmq_ao
from dmq_ao.benchmarks.benchmark import named_denoiser
from dmq_ao.benchmarks.measure import compiled_latency
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.config import BitAllocation, ChannelScaling, Override, Recipe
from dmq_ao.evaluation import machine

PLAIN = "plain W4A8"
WIDE = ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2")


def variants() -> dict[str, Recipe]:
    """Recipes by name; the first is what the others are compared with."""
    plain = dmq_ao.recipes.minmax("w4a8")
    dmq = dmq_ao.recipes.dmq("w4a8")
    scaled = dataclasses.replace(
        dmq,
        scaling=ChannelScaling(steps=0, positions=4),
        rounding=None,
        config=dataclasses.replace(dmq.config, weight=plain.config.weight),
    )
    inputs = dataclasses.replace(scaled.config.activation, bits=12)
    wide = tuple(Override(name, activation=inputs) for name in WIDE)
    return {
        PLAIN: plain,
        "+ scales, exponents, ranges per step": scaled,
        "+ a width for each channel": dataclasses.replace(scaled, allocation=BitAllocation()),
        "+ 12-bit inputs of two layers": dataclasses.replace(
            scaled, config=dataclasses.replace(scaled.config, overrides=wide)
        ),
    }


def main() -> None:
    """Quantize every variant, time them in turns, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("-o", "--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    denoiser, samples = named_denoiser("cifar-unet")
    quantized = {}
    for name, recipe in variants().items():
        prepared = dmq_ao.prepare(denoiser, recipe, samples.example())
        dmq_ao.calibrate(prepared, samples)
        quantized[name] = dmq_ao.convert(prepared)
        print(f"{name}: {quantized[name].kernel_counts}")
    rows = torch.arange(args.batch_size) % 2  # one timestep, as a sampler calls
    times = compiled_latency(
        quantized, next(samples.select(rows).batches(args.batch_size)), repeats=args.repeats, progress=True
    )
    ratios = {name: timed.median_ms / times[PLAIN].median_ms for name, timed in times.items()}
    for name, timed in times.items():
        print(f"{name:40s} {timed.median_ms:7.2f} ms  {ratios[name]:.3f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        latency = {name: vars(timed) for name, timed in times.items()}
        report = {"machine": machine(), "latency_ms": latency, "ratio": ratios, **provenance(variants())}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
