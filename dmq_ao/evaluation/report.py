"""The report of a quantization run: one table for the terminal, one self-contained page, the pictures beside them.

A report is a plain dict, as ``json`` reads and writes it::

    {"title": str, "model": str, "machine": {...},            # machine: as cost.machine() gives it
     "protocol": {...},                                       # optional: scheduler, steps, seeds ... shown as they are
     "float": {"file_bytes": int, "latency_ms": float | None},
     "variants": [{
        "name": str, "file_bytes": int, "size_ratio": float, "mean_bits": float, "one_step_error": float,
        "errors_by_timestep": {"timesteps": [...], "errors": [...]},
        "psnr_db": float, "psnr_std_db": float, "latency_ms": float | None, "speedup": float | None,
        "kernels": {"onednn int8 convolution": 30, ...},
        "layers": [{"name", "kind", "status", "weight_bits", "activation_bits", "kernel", "sqnr_db", "why"}],
        "kept_float": [{"name", "why"}]}]}

Only ``title``, ``variants`` and their names must be there: what is missing or None shows as a dash.
Pictures are ``{name: [N, C, H, W] in 0..1}`` with a row named ``float`` and the same seed in each column.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmq_ao.evaluation import pictures
from dmq_ao.evaluation.page import render_html
from dmq_ao.evaluation.table import entries_of


def write_report(
    report: Mapping[str, Any], images: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> dict[str, Path]:
    """Write ``report.json``, ``report.html``, ``grid.png`` and ``error_by_timestep.png``, each whole or not at all.

    Everything is rendered before the first file is written. Numbers that JSON does not know become the strings
    ``"inf"``, ``"-inf"`` and ``"nan"``, which the other functions here read. Without images there is no grid; without
    errors by timestep, or without matplotlib, no plot.

    Args:
        report: see the module's docstring.
        images: rows of the picture grid, ``[N, C, H, W]`` in 0..1; may be empty.
        folder: made if it is not there.

    Returns:
        The path of each file that was written, by its name.

    Raises:
        ValueError: as ``render_html``.
        TypeError: as ``render_html``, or the report holds what JSON cannot.
    """
    entries = entries_of(report)
    files = {
        "report.json": json.dumps(json_ready(report), indent=2, ensure_ascii=False, allow_nan=False).encode(),
        "report.html": render_html(report, images).encode(),
    }
    if images:
        rows, captions = pictures.in_order(entries, images), pictures.captions_of(entries)
        files["grid.png"] = pictures.image_grid({f"{name}\n{captions[name]}": row for name, row in rows.items()})
    curves = pictures.curves_of(entries)
    if curves and pictures.can_plot():
        files["error_by_timestep.png"] = pictures.error_plot(curves, "png", dark=False)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return {name: write_whole(target / name, content) for name, content in files.items()}


def json_ready(value: Any) -> Any:
    """The same value with strings for the numbers that JSON does not know: infinities and NaN."""
    if isinstance(value, Mapping):
        return {key: json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all: a reader sees the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
