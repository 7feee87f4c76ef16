"""The benchmark example: rows of ours, footprints in the rows they belong to, and a Markdown table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from plain import Plain, plain_samples, seeded

from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.peer_benchmark import Case

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import benchmark

        yield benchmark
    for name in ("benchmark", "ablation", "footprint", "quantize_custom_module"):
        sys.modules.pop(name, None)


def test_ours_are_the_schemes_to_compare(example: ModuleType) -> None:
    found = {
        name: (recipe().config.weight.bits, recipe().config.activation.bits, mode)
        for name, (recipe, mode) in example.OURS.items()
    }
    assert found == {
        "dmq_ao W8A8": (8, 8, "default"),
        "dmq_ao W4A16": (4, 16, "default"),
        "dmq_ao W8A8, max": (8, 8, "max"),
        "dmq_ao W4A8+PTS, max": (4, 8, "max"),
    }


def test_a_run_is_a_table(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def footprints(model: str, loaders: Any, net: Any, inputs: Any, ours: dict[str, Any], repeats: int) -> Any:
        figures = {"load_seconds": 1.5, "peak_rss_bytes": 2**20, "net_rss_bytes": 2**19, "file_bytes": 7}
        return {name: {**figures, "rss_ratio": 0.25, "net_ratio": 0.125} for name in ("float32", *ours)}

    monkeypatch.setattr(example.footprint, "measure", footprints)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setitem(example.OURS, "again", example.OURS["dmq_ao W8A8"])
    net = seeded(Plain)
    samples = plain_samples(net)
    case = Case(net, first_rows(samples, 4), samples, samples, 4)
    args = argparse.Namespace(
        loaders=None, ours=["dmq_ao W8A8", "again"], peers=["torch fp32"], repeats=1, footprint=True
    )
    report = example.run("plain", case, args)
    assert list(report["rows"]) == ["dmq_ao W8A8", "again", "torch fp32"]
    assert all(row["rss_ratio"] == 0.25 and row["file_bytes"] > 7 for row in report["rows"].values())
    assert report["rows"]["again"]["build_seconds"] == report["rows"]["dmq_ao W8A8"]["build_seconds"]
    json.dumps(report)
    lines = example.table(report).splitlines()
    assert lines[0] == "## plain, batch 4"
    assert lines[5].startswith("|---|---|")
    assert len({line.count("|") for line in lines[4:]}) == 1
    assert {line.split(" | ")[0] for line in lines[6:]} == {"| dmq_ao W8A8", "| again", "| torch fp32"}


def test_without_a_gpu_nothing_is_claimed(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", "-o", str(tmp_path / "out")])
    example.main()
    assert capsys.readouterr().out == "nothing measured: no CUDA device\n"
    assert not (tmp_path / "out").exists()


def test_samples_for_a_denoiser_in_bfloat16(example: ModuleType) -> None:
    samples = plain_samples(seeded(Plain))
    narrow = example.bfloat16_samples(samples)
    assert narrow.inputs["x"].dtype == torch.bfloat16
    assert torch.equal(narrow.timestep, samples.timestep)
    assert example.narrowed(seeded(Plain))(**narrow.example(2)).dtype == torch.bfloat16


def test_a_model_of_no_file_wants_a_name(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing is loaded by --loaders FILE"):
        example.case_of("nothing", None, tmp_path)


LOADERS = """
import torch
from plain import Plain, seeded

STEPS = (900, 600, 300, 0)


def ddpm64():
    return seeded(Plain)


@torch.no_grad()
def sample_ddpm64(net, n, steps, seed):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step in STEPS:
        x = x - 0.1 * net(x, torch.full((n,), step))
    return x
"""


def test_a_model_of_a_loaders_file(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "loaders.py").write_text(LOADERS)
    case = example.case_of("ddpm64", tmp_path / "loaders.py", tmp_path)
    assert (case.batch_size, len(case.inputs["x"])) == (4, 4)
    assert len(case.samples) == 32 * 4  # every step of every trajectory: fewer than the 160 asked for
    assert case.states.step.unique().numel() == 4
    # The first trajectories of calibration and of the held-out states have seeds of their own.
    held = {tuple(row.flatten()[:4].tolist()) for row in case.states.inputs["x"][case.states.step == 0]}
    assert not held & {tuple(row.flatten()[:4].tolist()) for row in case.samples.inputs["x"]}
    assert {path.name for path in (tmp_path / "recorded").iterdir()} == {
        "ddpm64-160-32.safetensors",
        "ddpm64-states.safetensors",
    }
