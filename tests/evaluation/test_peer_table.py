"""The table of a benchmark: ratios and shares by hand, slowest first, failures last."""

from __future__ import annotations

from typing import Any

import pytest

from dmq_ao.benchmarks.peer_table import peak_share, peer_notes, peer_rows

MIB = 2**20


def row(ms: float, **more: Any) -> dict[str, Any]:
    return {"median_ms": ms, "p10_ms": ms - 1, "p90_ms": ms + 2, "repeats": 5, **more}


REPORT: dict[str, Any] = {
    "rows": {
        "dmq_ao W8A8": row(
            20.0,
            file_bytes=2 * MIB,
            one_step_error=0.02,
            build_seconds=3.0,
            compile_seconds=4.0,
            integer=True,
            macs=6e9,
        ),
        "OpenVINO NNCF int8": row(40.0, integer=True),
        "ONNX Runtime int8": {"failed": "RuntimeError: no"},
        "torch fp32 compiled": row(80.0, integer=False),
        "OpenVINO fp32": row(60.0, integer=False),
    },
    "macs": 6e9,
    "int8_peak": 1e12,
}


def columns(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Cells by row and heading."""
    heading, *rows = peer_rows(report)
    return {cells[0]: dict(zip(heading, cells, strict=True)) for cells in rows}


def test_rows_stand_slowest_first_and_failures_last() -> None:
    table = columns(REPORT)
    assert list(table) == [
        "torch fp32 compiled", "OpenVINO fp32", "OpenVINO NNCF int8", "dmq_ao W8A8", "ONNX Runtime int8"
    ]  # fmt: skip
    assert table["ONNX Runtime int8"]["ms (p10 to p90)"] == "failed: RuntimeError: no"


def test_figures_are_those_of_the_report() -> None:
    ours = columns(REPORT)["dmq_ao W8A8"]
    assert ours == {
        "": "dmq_ao W8A8",
        "ms (p10 to p90)": "20.0 (19.0 to 22.0)",
        "compiled fp32 / this": "4.00",
        "fastest OpenVINO / this": "2.00",
        "one-step error": "0.0200",
        "file MiB": "2.0",
        "quantize s": "3.0",
        "compile s": "4.0",
        "int8 peak": "30%",
    }


def test_other_integer_rows_are_given_the_same_work() -> None:
    assert peak_share(REPORT["rows"]["OpenVINO NNCF int8"], REPORT) == pytest.approx(0.15)
    assert peak_share(REPORT["rows"]["OpenVINO fp32"], REPORT) is None
    assert peak_share(REPORT["rows"]["dmq_ao W8A8"], {**REPORT, "int8_peak": None}) is None
    assert "int8 rows are given ours with the fewest, 6 G a call" in peer_notes(REPORT)[-1]
    assert len(peer_notes({**REPORT, "int8_peak": None})) == len(peer_notes(REPORT)) - 1


def test_what_was_not_measured_is_a_dash() -> None:
    table = columns({**REPORT, "rows": {"dmq_ao W8A8": row(20.0)}})
    assert set(table["dmq_ao W8A8"].values()) == {"dmq_ao W8A8", "20.0 (19.0 to 22.0)", "–"}


def test_footprints_have_columns_where_there_are_any() -> None:
    loaded = row(20.0, load_seconds=1.25, peak_rss_bytes=300 * MIB, rss_ratio=0.345)
    table = columns({**REPORT, "rows": {**REPORT["rows"], "dmq_ao W8A8": loaded}})
    ours = table["dmq_ao W8A8"]
    assert (ours["load to output s"], ours["peak RSS MiB"], ours["RSS / float"]) == ("1.25", "300", "0.34")
    assert table["OpenVINO fp32"]["peak RSS MiB"] == "–"
    assert len(set(map(len, peer_rows({**REPORT, "rows": REPORT["rows"] | {"a": loaded}})))) == 1
