"""The CUDA kernels by themselves: milliseconds, share of the GPU's int8 peak, and bfloat16, product by product.

    python examples/cuda_kernels.py -o build/cuda_kernels
    python examples/cuda_kernels.py --tune -o build/cuda_kernels

Products are those of SD1.5 at batch 8 and of a DiT-XL/2, and one of 4096 each way. ``--tune`` first times tiles for
each and keeps the best in ``backends/cuda/cuda_tiles.json``, under the name of the GPU, where the library looks.
Without a GPU it says so, and measures nothing. Writes ``kernels.json`` and ``kernels.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda import tiles as cuda_tiles
from dmq_ao.backends.cuda.tiles import Shape, Tile
from dmq_ao.backends.cuda.weights import LANES, kernel_weight
from dmq_ao.benchmarks.provenance import commit
from dmq_ao.benchmarks.roofline import int8_peak
from dmq_ao.evaluation import cuda_ms, latency, machine
from dmq_ao.records import WeightRecord

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Product:
    """A layer's shape: of a linear where ``side`` is 0 (``rows`` tokens), else of images of ``side`` pixels a side."""

    rows: int
    inputs: int
    outputs: int
    side: int = 0
    kernel: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        if not self.side:
            return f"linear {self.rows} x {self.inputs} -> {self.outputs}"
        size = f"conv {self.kernel}x{self.kernel}, {self.rows} of {self.side}x{self.side}"
        return f"{size}, {self.inputs} -> {self.outputs}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates; taps on padding count."""
        return self.rows * max(1, self.side) ** 2 * self.inputs * self.outputs * self.kernel**2

    def shape(self, bits: int) -> Shape:
        """What its tile depends on."""
        row_bytes = -(-self.inputs * bits // (8 * LANES)) * LANES
        return Shape(self.rows * max(1, self.side) ** 2, self.outputs, row_bytes, self.kernel**2, bits)


PRODUCTS = (
    Product(4096, 4096, 4096),
    Product(8, 320, 320, side=64, kernel=3),
    Product(8, 640, 640, side=32, kernel=3),
    Product(8, 1280, 1280, side=16, kernel=3),
    Product(8, 1280, 1280, side=8, kernel=3),
    Product(8 * 4096, 320, 2560),
    Product(8 * 4096, 1280, 320),
    Product(8 * 1024, 640, 1920),
    Product(1024, 1152, 3456),
    Product(1024, 1152, 4608),
    Product(1024, 4608, 1152),
)
BITS = (8, 4)


def integer_call(product: Product, bits: int, device: torch.device) -> Callable[[], Tensor]:
    """One of our products on random codes, without arguments."""
    generator = torch.Generator().manual_seed(0)
    taps = (product.kernel, product.kernel) if product.side else ()
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (product.outputs, product.inputs, *taps), generator=generator).to(torch.int8)
    zeros = torch.zeros(product.outputs, 1, dtype=torch.int32)
    weight = kernel_weight(WeightRecord(bits, True, codes, torch.ones(product.outputs, 1), zeros), None)
    size = (
        (product.rows, product.inputs, product.side, product.side) if product.side else (product.rows, product.inputs)
    )
    x = torch.randint(-128, 128, size, generator=generator).to(torch.int8).to(device)
    tensors = (torch.ones(1), torch.full((1,), 128, dtype=torch.int32), weight.packed, weight.widths, weight.order)
    rest = (weight.middle, weight.shifts, weight.sums, torch.full((product.outputs,), 1e-4), None, None)
    args = [_on(device, value) for value in (*tensors, *rest)]
    if not product.side:
        return partial(cuda_ops.cuda_linear, x, *args, torch.bfloat16)
    around = [product.kernel // 2] * 2
    geometry = ([product.kernel] * 2, [1, 1], around, [1, 1])
    return partial(
        cuda_ops.cuda_conv, x.contiguous(memory_format=torch.channels_last), *args, *geometry, torch.bfloat16
    )


def bfloat16_call(product: Product, device: torch.device) -> Callable[[], Tensor]:
    """The same product in bfloat16, by PyTorch."""
    taps = (product.kernel, product.kernel) if product.side else ()
    half = {"device": device, "dtype": torch.bfloat16}
    weight = torch.randn(product.outputs, product.inputs, *taps, **half)
    if not product.side:
        return partial(torch.nn.functional.linear, torch.randn(product.rows, product.inputs, **half), weight)
    x = torch.randn(product.rows, product.inputs, product.side, product.side, **half)
    last = torch.channels_last
    x, weight = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    return partial(torch.nn.functional.conv2d, x, weight, padding=product.kernel // 2)


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def candidates(shape: Shape) -> Iterator[Tile]:
    """Tiles worth timing for a product."""
    for rows, outs, lanes, warps, stages in itertools.product(
        (32, 64, 128, 256), (64, 128), (64, 128), (4, 8), (3, 4)
    ):
        big = rows * outs
        if rows > 2 * shape.rows or big > 128 * 256 or (big > 128 * 128 and warps == 4) or lanes > shape.row_bytes:
            continue
        programs = math.ceil(shape.rows / rows) * math.ceil(shape.outs / outs)
        for parts in (1, 2, 4, 8):
            if parts == 1 or programs * parts <= 264:  # two for each multiprocessor: more are there without
                yield Tile(rows, outs, lanes, parts, warps, stages)


def tuned(call: Callable[[], Tensor], shape: Shape, clock: Clock, repeats: int = 5) -> tuple[Tile, float]:
    """The fastest tile, and its milliseconds; those that a GPU has no room for are passed over."""
    best: tuple[Tile, float] | None = None
    for tile in candidates(shape):
        with mock.patch.object(cuda_tiles, "tile_for", return_value=tile):
            try:
                found = latency({"": call}, repeats=repeats, warmup=1, clock=clock)[""].median_ms
            except Exception as error:  # Triton has classes of its own for it, which move from release to release
                if "resource" not in f"{type(error).__name__} {error}".lower():
                    raise
                continue
        if best is None or found < best[1]:
            best = tile, found
    if best is None:
        raise RuntimeError(f"no tile fits this GPU for {shape}")
    return best


def tune(products: Sequence[Product], device: torch.device, name: str, clock: Clock) -> dict[str, list[int]]:
    """Time tiles for every product, and keep the best where the library looks."""
    found: dict[str, list[int]] = {}
    work = list(itertools.product(products, BITS))
    for product, bits in tqdm(work, desc="tune", unit="product"):
        shape = product.shape(bits)
        tile, _ = tuned(integer_call(product, bits, device), shape, clock)
        found[cuda_tiles.key(shape)] = list(tile)
    file = cuda_tiles.TILE_FILE
    known = json.loads(file.read_text()) if file.exists() else {}
    known[name] = {**known.get(name, {}), **found}
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    os.replace(partial_file, file)
    cuda_tiles.forget_tiles()
    return found


def measure(
    products: Sequence[Product], device: torch.device, clock: Clock, repeats: int = 20
) -> list[dict[str, Any]]:
    """A row for each product: milliseconds of ours by bits of the weight, and of bfloat16, in turns."""
    rows = []
    for product in tqdm(products, desc="measure", unit="product"):
        calls = {f"{bits}-bit": integer_call(product, bits, device) for bits in BITS}
        times = latency({**calls, "bfloat16": bfloat16_call(product, device)}, repeats=repeats, clock=clock)
        ms = {name: timed.median_ms for name, timed in times.items()}
        rows.append({"product": product.name, "macs": product.macs, "ms": ms})
    return rows


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    peak = report["int8_peak"]
    lines = [
        f"`examples/cuda_kernels.py`, {report['device']}, torch {report['machine']['torch']}, {report['date']}. int8"
        f" peak measured as {peak / 1e12:.0f} T multiply-accumulates a second.",
        "",
        "| | bfloat16 ms | 8-bit ms | of peak | faster | 4-bit ms | of peak | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        base = row["ms"]["bfloat16"]
        cells = [f"{base:.3f}"]
        for ms in (row["ms"]["8-bit"], row["ms"]["4-bit"]):
            cells += [f"{ms:.3f}", f"{row['macs'] / (ms / 1e3) / peak:.0%}", f"{base / ms:.2f}"]
        lines.append(f"| {row['product']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Tune if asked, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time tiles first, and keep the best for the library")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda")
    if why := cuda.why_not_here(device) if torch.cuda.is_available() else "no CUDA device":
        print(f"nothing measured: {why}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name()
    tiles = tune(PRODUCTS, device, name, cuda_ms) if args.tune else {}
    report = {
        "device": name,
        "machine": machine(),
        "commit": commit(),  # products alone: there is no recipe
        "date": time.strftime("%Y-%m-%d"),
        "int8_peak": int8_peak(device=device),
        "tiles": tiles,
        "rows": measure(PRODUCTS, device, cuda_ms),
    }
    (args.out / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "kernels.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
