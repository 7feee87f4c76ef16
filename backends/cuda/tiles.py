"""How a product is cut into tiles for the GPU: what was measured on that GPU where there is a record, else a rule.

``cuda_tiles.json`` holds the measured ones, by name of the device and shape of the product;
``examples/cuda_kernels.py --tune`` writes it. Any choice gives the same sums.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from dmq_ao.backends.cuda.weights import LANES

TILE_FILE = Path(__file__).with_name("cuda_tiles.json")
_FEW_STEPS = 4  # a part of a sum should have as many steps, or its start and its atomic additions cost more than it
_MOST_PARTS = 8


class Tile(NamedTuple):
    """One program's share, and how it runs.

    Attributes:
        rows: of the input: pixels or tokens; a power of two of at least 16.
        outs: output channels; a power of two of at least 16.
        lanes: bytes of a row of packed codes per step; a power of two of at least 32.
        parts: programs that share one sum.
        warps: per program.
        stages: of the software pipeline.
    """

    rows: int
    outs: int
    lanes: int
    parts: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What a choice depends on: rows of the input, outputs, bytes of a tap's codes, taps, and bits of a code."""

    rows: int
    outs: int
    row_bytes: int
    taps: int
    bits: int


@functools.cache
def tile_for(shape: Shape, device: torch.device) -> Tile:
    """The tile for a product on a device."""
    name, multiprocessors = _device_facts(device)
    measured = _measured_tiles().get(name, {}).get(key(shape))
    return Tile(*measured) if measured is not None else rule(shape, multiprocessors)


def key(shape: Shape) -> str:
    """Name of a shape in the file: rows go by powers of two, for batches and resolutions differ."""
    return "x".join(map(str, shape._replace(rows=_power(shape.rows))))


def rule(shape: Shape, multiprocessors: int) -> Tile:
    """Large tiles where there are enough of them for every multiprocessor; then sums in parts."""
    outs = 128 if shape.outs > 64 else 64
    rows = min(128, max(16, _power(shape.rows)))
    while rows > 32 and _programs(shape, rows, outs) < multiprocessors:
        rows //= 2
    lanes = 128 if shape.bits == 8 and shape.row_bytes >= 128 else LANES if shape.row_bytes < 64 else 64
    steps = shape.taps * -(-shape.row_bytes // lanes)
    splits = multiprocessors // max(1, _programs(shape, rows, outs))
    parts = max(1, min(splits, steps // _FEW_STEPS, _MOST_PARTS))
    return Tile(rows, outs, lanes, parts, warps=8 if rows * outs >= 128 * 128 else 4, stages=3)


def _programs(shape: Shape, rows: int, outs: int) -> int:
    return -(-shape.rows // rows) * -(-shape.outs // outs)


def _power(rows: int) -> int:
    """The power of two that is at least ``rows``."""
    return 1 << max(0, rows - 1).bit_length()


def forget_tiles() -> None:
    """Read the file again at the next choice."""
    tile_for.cache_clear()
    _measured_tiles.cache_clear()


@functools.cache
def _device_facts(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@functools.cache
def _measured_tiles() -> dict[str, dict[str, list[int]]]:
    if not TILE_FILE.exists():
        return {}
    tiles: dict[str, dict[str, list[int]]] = json.loads(TILE_FILE.read_text(encoding="utf-8"))
    return tiles
