"""Ours and others in one run: every row measured, failures kept in their rows, errors against the float denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain, flow, plain_samples, seeded
from torch import Tensor

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks.benchmark import first_rows, run_benchmark
from dmq_ao.benchmarks.named import NAMED, NamedDenoiser
from dmq_ao.benchmarks.peer_benchmark import Case, Ours, Padded, side_by_side, stored_bytes
from dmq_ao.benchmarks.peer_table import peer_rows
from dmq_ao.benchmarks.peers import COMPILED_FP32, PEERS, Artifact, Peer
from dmq_ao.evaluation import folder_bytes
from tests.integer_sums import EXACT


class Renamed(Plain):
    """With the names of diffusers, and a label."""

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample + label[:, None, None, None], timestep)


def noise(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"sample": torch.randn(rows, 3, 8, 8, generator=generator), "label": torch.ones(rows, dtype=torch.int64)}


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers take seconds, and have tests of their own."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


@pytest.fixture
def _failing_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that fail where they can: building, and at another timestep than that of the first call."""

    def failing(*_: Any) -> Artifact:
        raise RuntimeError("no such operator\nat line 3")

    def stubborn(net: torch.nn.Module, inputs: Any, calibration: Any) -> Artifact:
        def call(**given: Any) -> Tensor:
            if not torch.equal(given["t"], inputs["t"]):
                raise ValueError
            return torch.zeros(4, 3, 8, 8)

        print("progress")
        return Artifact(10, lambda: call)

    monkeypatch.setitem(PEERS, "failing", Peer(failing))
    monkeypatch.setitem(PEERS, "stubborn", Peer(stubborn))


@pytest.mark.usefixtures("_failing_peers")
def test_all_are_measured_and_failures_stay_in_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    case = Case(net, first_rows(samples, 4), samples, samples, 4)
    quantized, _ = flow(net, recipes.minmax("w8a8"), samples, "auto")
    ours = {"dmq_ao W8A8": Ours(quantized, "default", 1.5)}
    said: list[str] = []
    report = side_by_side(case, ["torch fp32", "torch bf16", "failing", "stubborn"], ours, repeats=2, say=said.append)
    rows = report["rows"]
    assert rows["failing"] == {"failed": "RuntimeError: no such operator"}
    assert rows["stubborn"] == {"failed": "ValueError: "}
    assert "failing: RuntimeError: no such operator" in said
    timed = {name: row for name, row in rows.items() if "failed" not in row}
    assert list(timed) == ["dmq_ao W8A8", "torch fp32", "torch bf16"]
    for row in timed.values():
        assert row["repeats"] == 2
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["compile_seconds"] > 0
    assert rows["torch fp32"]["one_step_error"] == 0
    assert 0 < rows["torch bf16"]["one_step_error"] < 0.02
    assert 0 < rows["dmq_ao W8A8"]["one_step_error"] < 0.05
    assert rows["dmq_ao W8A8"]["build_seconds"] == 1.5
    assert rows["dmq_ao W8A8"]["mean_bits"] == quantized.mean_bits
    assert report["macs"] == (rows["dmq_ao W8A8"]["macs"] if EXACT else None)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "progress\n")  # stdout is for the result


def test_weights_only_has_a_row_without_integer_work() -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    case = Case(net, first_rows(samples, 4), samples, samples, 4)
    quantized, _ = flow(net, recipes.minmax("w4a16"), samples, "auto")
    report = side_by_side(case, [], {"dmq_ao W4A16": Ours(quantized, "default", 0.0)}, repeats=1, say=lambda _: None)
    row = report["rows"]["dmq_ao W4A16"]
    assert (row["integer"], row["macs"], report["macs"], report["int8_peak"]) == (False, 0, None, None)


def test_the_stored_size_is_that_of_the_folder(tmp_path: Path) -> None:
    net = seeded(Plain)
    quantized, _ = flow(net, recipes.minmax("w4a8"), plain_samples(net))
    dmq_ao.save(quantized, tmp_path)
    assert stored_bytes(quantized) == folder_bytes(tmp_path)


def test_calls_of_one_size_take_any_number_of_rows() -> None:
    sizes = []

    def call(x: Tensor, extra: dict[str, Tensor], scale: float) -> tuple[Tensor]:
        sizes.append(len(x))
        return (x * scale + extra["y"][:, None],)

    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5.0)
    result = Padded(call, 3)(x=x, extra={"y": y}, scale=2.0)
    assert sizes == [3, 3]
    assert torch.equal(result, 2 * x + y[:, None])


def test_calibration_calls_have_the_size_of_the_call() -> None:
    net = seeded(Plain)
    samples = plain_samples(net)  # 16 rows
    sizes = {
        size: [len(call["x"]) for call in Case(net, {}, samples, samples, size).calibration()] for size in (4, 6, 20)
    }
    assert sizes == {4: [4] * 4, 6: [6] * 2, 20: [20]}


def test_a_benchmark_with_peers_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "tiny", NamedDenoiser(lambda: seeded(Renamed), noise, batch_size=2, samples=4))
    report = run_benchmark("tiny", "w8a8", repeats=1, peers=["torch fp32"], say=lambda _: None)
    assert list(report["rows"]) == ["dmq_ao W8A8", COMPILED_FP32, "torch fp32"]
    assert (report["model"], report["batch_size"], report["mode"]) == ("tiny", 2, "default")
    assert report["recipe"]["config"]["weight"]["bits"] == 8
    assert not {"latency_ms", "speedup", "compile_seconds"} & report.keys()


def test_a_benchmark_without_peers_times_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "tiny", NamedDenoiser(lambda: seeded(Renamed), noise, batch_size=3, samples=4))
    report = run_benchmark("tiny", "w4a16", repeats=1, say=lambda _: None)
    assert report["latency_ms"].keys() == report["compile_seconds"].keys() == {"float", "quantized"}
    assert report["batch_size"] == 3
    assert "rows" not in report


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Artifact:
        raise AssertionError("it was built")

    monkeypatch.setitem(PEERS, "absent", Peer(never, ("no_one", "no_two")))
    model = Plain()
    samples = plain_samples(model)
    case = Case(model, first_rows(samples, 4), samples, samples, 4)
    said: list[str] = []
    report = side_by_side(case, ["torch fp32", "absent"], {}, repeats=1, say=said.append)
    assert report["rows"]["absent"] == {"failed": "not installed: pip install no_one no_two"}
    assert report["rows"]["torch fp32"]["median_ms"] > 0
    assert "absent: not installed: pip install no_one no_two" in said
    assert peer_rows(report)[-1][:2] == ["absent", "not installed: pip install no_one no_two"]
