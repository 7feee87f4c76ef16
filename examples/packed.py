"""What 4-bit codes cost that stay packed in memory, and what they save: milliseconds and bytes beside the default.

    python examples/packed.py -o build/packed.json
    python examples/packed.py --folder out/ --mode max -o build/packed.json

``cifar-unet`` (random weights: neither time nor bytes depend on them) as W4A8 and, weight-only, as W4A16; or, with
``--folder``, a denoiser that ``dmq_ao.save`` wrote. All variants are compiled and called in turns on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dmq_ao
from dmq_ao.benchmarks.benchmark import first_rows, named_denoiser, noise
from dmq_ao.benchmarks.measure import compiled_latency
from dmq_ao.benchmarks.provenance import commit
from dmq_ao.evaluation import Latency, machine
from dmq_ao.pipelines.denoisers import load_denoiser

SCHEMES = ("w4a8", "w4a16")
Variants = dict[str, dmq_ao.QuantizedDenoiser]


def of_named(model: str, batch_size: int) -> tuple[Variants, Mapping[str, Any]]:
    """Each scheme as it is by default, and packed; and the arguments of a call."""
    denoiser, samples = named_denoiser(model)
    made = {}
    for bits in SCHEMES:
        prepared = dmq_ao.prepare(denoiser, dmq_ao.recipes.minmax(bits), samples.example())
        dmq_ao.calibrate(prepared, samples, progress=False)
        made[bits] = dmq_ao.convert(prepared)
        made[f"{bits} packed"] = dmq_ao.convert(prepared, packed=True)
        print(f"{bits}: converted", flush=True)
    return made, first_rows(samples, batch_size)


def of_folder(folder: Path, batch_size: int) -> tuple[Variants, Mapping[str, Any]]:
    """A saved denoiser as it is by default, and packed; and the arguments of a call."""
    made = {name: load_denoiser(folder, packed=packed) for name, packed in (("default", False), ("packed", True))}
    return made, noise(made["default"].signature, batch_size)


def rows_of(variants: Variants, times: Mapping[str, Latency]) -> dict[str, dict[str, Any]]:
    """Time, bytes and kernels by variant."""
    return {
        name: {
            **vars(times[name]),
            "graph_bytes": quantized.graph_bytes,
            "resident_bytes": quantized.resident_bytes,
            "kernels": quantized.kernel_counts,
        }
        for name, quantized in variants.items()
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a line for each variant."""
    lines = ["| | ms (p10 to p90) | graph MB | with records MB |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['median_ms']:.1f} ({row['p10_ms']:.1f} to {row['p90_ms']:.1f})"
            f" | {row['graph_bytes'] / 1e6:.1f} | {row['resident_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Quantize or load, time in turns, count bytes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar-unet", help="a name of dmq_ao.benchmark")
    parser.add_argument("--folder", type=Path, help="a saved diffusers denoiser instead")
    parser.add_argument("--mode", choices=("default", "max"), default="default", help="of dmq_ao.compile")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("-o", "--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.folder is None:
        variants, inputs = of_named(args.model, args.batch_size)
    else:
        variants, inputs = of_folder(args.folder, args.batch_size)
    times = compiled_latency(variants, inputs, mode=args.mode, repeats=args.repeats, progress=True)
    rows = rows_of(variants, times)
    print(table(rows))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        what = {"model": str(args.folder or args.model), "mode": args.mode, "batch_size": args.batch_size}
        report = {**what, "rows": rows, "machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
