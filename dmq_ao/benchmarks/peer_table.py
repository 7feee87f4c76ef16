"""A benchmark against other tools as rows of text: heading, cells, and the lines that explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dmq_ao.benchmarks.cuda_peers import COMPILED_BF16
from dmq_ao.benchmarks.peers import COMPILED_FP32, NOT_INSTALLED
from dmq_ao.evaluation.table import DASH, number

MIB = 2**20
PeerRow = Mapping[str, Any]
"""What ``side_by_side`` says of one tool, by the names of its docstring."""

# What a GPU, or a footprint in processes of their own, adds where it was measured: key of the row, heading, format.
FOOTPRINT = (
    ("device_bytes", "GPU MiB", ".0f", MIB),
    ("load_seconds", "load to output s", ".2f", 1),
    ("peak_rss_bytes", "peak RSS MiB", ".0f", MIB),
    ("rss_ratio", "RSS / float", ".2f", 1),
)


def peer_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A heading and one row a tool, slowest first, those that failed at the end.

    Args:
        report: of ``dmq_ao.peer_benchmark.side_by_side``, or with its keys among others. Rows may also have
            ``load_seconds``, ``peak_rss_bytes`` and ``rss_ratio``.
    """
    rows: Mapping[str, PeerRow] = report["rows"]
    timings = {name: row for name, row in rows.items() if "median_ms" in row}
    columns = _columns(report, timings)
    slowest_first = sorted(timings.items(), key=lambda item: -float(item[1]["median_ms"]))
    table = [["", *columns], *([name, *(cell(row) for cell in columns.values())] for name, row in slowest_first)]
    blank = [""] * (len(columns) - 1)
    return table + [[name, _failure(row["failed"]), *blank] for name, row in rows.items() if "failed" in row]


def _failure(text: str) -> str:
    return text if text.startswith(NOT_INSTALLED) else f"failed: {text}"


def peer_notes(report: Mapping[str, Any]) -> list[str]:
    """What the columns of ``peer_rows`` mean, a sentence each."""
    notes = [
        "ms are medians of interleaved calls, p10 to p90 beside them",
        "quantize s: export, calibrate, convert; compile s: with the first call",
    ]
    if report.get("macs") and report.get("int8_peak"):
        notes.append(
            f"int8 peak: integer multiply-accumulates of a call over what the machine does in that time, measured as"
            f" {report['int8_peak'] / 1e9:.0f} G/s; other tools' int8 rows are given ours with the fewest,"
            f" {report['macs'] / 1e9:.3g} G a call, though they may leave other layers in float"
        )
    return notes


def peak_share(row: PeerRow, report: Mapping[str, Any]) -> float | None:
    """How much of the machine's int8 peak a row reaches, 0..1; None where its products are not of integers."""
    macs, peak = row.get("macs") or report.get("macs"), report.get("int8_peak")
    if not (row.get("integer") and macs and peak):
        return None
    return float(macs / (row["median_ms"] / 1e3 * peak))


def _columns(report: Mapping[str, Any], timings: Mapping[str, PeerRow]) -> dict[str, Callable[[PeerRow], str]]:
    base = timings.get(COMPILED_FP32, {}).get("median_ms")
    half = timings.get(COMPILED_BF16, {}).get("median_ms")
    rival = min((row["median_ms"] for name, row in timings.items() if name.startswith("OpenVINO")), default=None)
    columns: dict[str, Callable[[PeerRow], str]] = {
        "ms (p10 to p90)": lambda row: f"{row['median_ms']:.1f} ({row['p10_ms']:.1f} to {row['p90_ms']:.1f})",
        **_on_gpu_or_cpu(half, base, rival),
        "one-step error": lambda row: number(row.get("one_step_error"), ".4f"),
        "file MiB": lambda row: _in_units(row, "file_bytes", ".1f", MIB),
        "quantize s": lambda row: number(row.get("build_seconds"), ".1f"),
        "compile s": lambda row: number(row.get("compile_seconds"), ".1f"),
        "int8 peak": lambda row: _percent(peak_share(row, report)),
    }
    for key, heading, form, unit in FOOTPRINT:
        if any(key in row for row in timings.values()):
            columns[heading] = lambda row, key=key, form=form, unit=unit: _in_units(row, key, form, unit)  # type: ignore
    return columns


def _on_gpu_or_cpu(half: float | None, base: float | None, rival: float | None) -> dict[str, Callable[[PeerRow], str]]:
    if half is not None:
        return {"compiled bf16 / this": lambda row: _ratio(half, row["median_ms"])}
    return {
        "compiled fp32 / this": lambda row: _ratio(base, row["median_ms"]),
        "fastest OpenVINO / this": lambda row: _ratio(rival, row["median_ms"]),
    }


def _in_units(row: PeerRow, key: str, form: str, unit: float) -> str:
    return number(None if row.get(key) is None else row[key] / unit, form)


def _ratio(other: float | None, ms: float) -> str:
    return number(None if other is None else other / ms, ".2f")


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.0%}"
