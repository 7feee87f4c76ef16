"""The figures of a report as rows of text, and as an aligned table for the terminal."""

import math
from collections.abc import Mapping
from typing import Any

FLOAT_ROW = "float"
"""Name of the teacher's row, in the tables and among the pictures."""

DASH = "–"
COLUMNS = ("", "size", "smaller", "mean bits", "one-step error", "PSNR dB", "latency", "faster")


def render_table(report: Mapping[str, Any]) -> str:
    """The figures as aligned plain text: the float model, then each variant, then the machine.

    Raises:
        ValueError: the report lacks a title or variants, or their names are missing or not distinct.
    """
    rows = [list(COLUMNS), *(cells(entry) for entry in entries_of(report))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    machine = machine_line(report)
    return "\n".join([*lines, "", machine] if machine else lines)


def entries_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The float model and the variants as rows of one table.

    Raises:
        ValueError: for a report without a title or variants, or whose names are missing or not distinct.
    """
    missing = [key for key in ("title", "variants") if not report.get(key)]
    if missing:
        raise ValueError(f"report: expected 'title' and at least one of 'variants', got no {' and no '.join(missing)}")
    names = [variant.get("name") for variant in report["variants"]]
    if not all(names) or len({FLOAT_ROW, *names}) != len(names) + 1:
        raise ValueError(f"report: expected variants with distinct names other than {FLOAT_ROW!r}, got {names}")
    teacher = dict(report.get("float") or {})
    same = {"size_ratio": 1.0, "speedup": None if teacher.get("latency_ms") is None else 1.0}
    return [{**same, **teacher, "name": FLOAT_ROW}, *(dict(variant) for variant in report["variants"])]


def cells(entry: Mapping[str, Any]) -> list[str]:
    """One row of the table: a text for each of ``COLUMNS``."""
    return [
        str(entry["name"]),
        size_text(entry.get("file_bytes")),
        _smaller(entry.get("size_ratio")),
        number(entry.get("mean_bits"), ".2f"),
        number(entry.get("one_step_error"), ".3g"),
        _psnr(entry),
        number(entry.get("latency_ms"), ".2f", " ms"),
        number(entry.get("speedup"), ".2f", "×"),
    ]


def _smaller(ratio: float | None) -> str:
    """How many times smaller; of what grew, how many times larger."""
    return number(ratio, ".2f", "×") if ratio is None or ratio >= 1 else number(1 / ratio, ".2f", "× larger")


def number(value: float | str | None, form: str, unit: str = "") -> str:
    """A number in the format ``form``; a dash for None and NaN, a sign for infinity, also from their JSON strings."""
    if value is None or math.isnan(float(value)):
        return DASH
    if math.isinf(float(value)):
        return "∞" if float(value) > 0 else "-∞"
    return format(float(value), form) + unit


def size_text(count: float | None) -> str:
    """Bytes in decimal units, as disks and downloads count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count is not None and count >= size:
            return number(count / size, ".2f", f" {unit}")
    return number(count, ".0f", " B")


def _psnr(entry: Mapping[str, Any]) -> str:
    mean, spread = number(entry.get("psnr_db"), ".2f"), number(entry.get("psnr_std_db"), ".2f")
    return mean if DASH in (mean, spread) else f"{mean} ± {spread}"


def machine_line(report: Mapping[str, Any]) -> str:
    """The machine of a report in one line; empty without one."""
    machine = report.get("machine") or {}
    parts = (
        machine.get("gpu"),
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['threads']} threads" if machine.get("threads") else None,
        f"torch {machine['torch']}" if machine.get("torch") else None,
        machine.get("capability"),
        "VNNI" if machine.get("vnni") else None,
    )
    return " · ".join(str(part) for part in parts if part)
