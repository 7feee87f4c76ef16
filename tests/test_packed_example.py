"""The packed example: variants of a tiny denoiser, their bytes, and the table of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from plain import Plain, plain_samples, seeded

from dmq_ao.evaluation import Latency

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, whose named denoiser is a tiny one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import packed

    model = seeded(Plain)
    monkeypatch.setattr(packed, "named_denoiser", lambda name: (model, plain_samples(model)))
    yield packed
    sys.modules.pop("packed", None)


def test_every_variant_has_its_bytes(packed: ModuleType) -> None:
    variants, inputs = packed.of_named("tiny", 3)
    assert list(variants) == ["w4a8", "w4a8 packed", "w4a16", "w4a16 packed"]
    assert all(len(value) == 3 for value in inputs.values())
    times = {name: Latency(1.0, 0.5, 2.0, 5) for name in variants}
    rows = packed.rows_of(variants, times)
    for bits in ("w4a8", "w4a16"):
        assert rows[f"{bits} packed"]["resident_bytes"] < rows[bits]["resident_bytes"]
        assert all("unpacked per call" in name for name in rows[f"{bits} packed"]["kernels"])
    lines = packed.table(rows).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| w4a8 | 1.0 (0.5 to 2.0) | 0.0 |")


@pytest.mark.slow
def test_the_example_writes_what_it_measured(
    packed: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "packed.json"
    monkeypatch.setattr(sys, "argv", ["packed.py", "--repeats", "2", "--batch-size", "2", "-o", str(out)])
    packed.main()
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 4
    assert all(row["median_ms"] > 0 for row in report["rows"].values())
