"""The footprint example: the same outputs from disk, memory of processes of their own, ratios to float32."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from plain import flow, plain_samples
from torch import nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.evaluation import rss_bytes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LOADERS = f"""
import sys
sys.path.append({str(ROOT / "tests")!r})
from plain import Plain, seeded

def tiny():
    return seeded(Plain)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

Made = tuple[nn.Module, dmq_ao.QuantizedDenoiser, dict[str, Any], Path]


@pytest.fixture(scope="module")
def footprint() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import footprint

        yield footprint
    for name in ("footprint", "quantize_custom_module", "loaders"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(footprint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A denoiser of a loaders file, quantized; a call, and the file."""
    file = tmp_path_factory.mktemp("loaders") / "loaders.py"
    file.write_text(LOADERS)
    net = footprint.load_module(file).tiny()
    samples = plain_samples(net)
    return net, flow(net, recipes.minmax("w4a8"), samples, "auto")[0], first_rows(samples, 2), file


def test_both_come_back_from_disk_as_they_were(footprint: ModuleType, made: Made, tmp_path: Path) -> None:
    net, quantized, inputs, file = made
    spec = {"model": "tiny", "loaders": str(file), "class": "Plain", "folder": str(tmp_path)}
    dmq_ao.save(quantized, tmp_path)
    footprint.save_file(dict(net.state_dict()), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(footprint._float(spec)(**inputs), net(**inputs))
        assert torch.equal(dmq_ao.load(tmp_path)(**inputs), quantized(**inputs))


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "processes"])
def test_every_variant_is_loaded_and_compared(
    footprint: ModuleType, made: Made, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    net, quantized, inputs, file = made
    if not processes:  # they import torch anew, which takes seconds
        monkeypatch.setattr(footprint, "_run", footprint.load)
        monkeypatch.setattr(footprint, "rss_bytes", lambda: 2**20)  # this process has the room already
    rows = footprint.measure("tiny", file, net, inputs, {"dmq_ao W4A8": quantized}, repeats=1)
    assert list(rows) == ["float32", "dmq_ao W4A8"]
    for row in rows.values():
        assert 0 < row["load_seconds"] < 60
        assert 0 < row["net_rss_bytes"] < row["peak_rss_bytes"]
        assert row["file_bytes"] > 0
    ours, plain = rows["dmq_ao W4A8"], rows["float32"]
    assert ours["rss_ratio"] == ours["peak_rss_bytes"] / plain["peak_rss_bytes"]
    assert (plain["rss_ratio"], plain["net_ratio"]) == (1, 1)
    text = footprint.table("tiny", rows)
    assert f"dmq_ao W4A8: {ours['load_seconds']:.1f} s from disk to the first output" in text
    assert f"peak RSS {ours['rss_ratio']:.2f} x float32's" in text
    json.dumps(rows)


def test_a_process_that_fails_says_why(footprint: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no such tensor")
    monkeypatch.setattr(footprint.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="loading out/ in a process of its own failed:\nno such tensor"):
        footprint._run({"folder": "out/"})


def test_an_architecture_takes_up_no_room(footprint: ModuleType) -> None:
    before = rss_bytes()
    with footprint.uninitialised():
        net = nn.Sequential(nn.Linear(8192, 8192), nn.Conv2d(512, 4096, 3), nn.GroupNorm(32, 4096))
    after = rss_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 16e6 < sum(4 * parameter.numel() for parameter in net.parameters())
    assert nn.Linear(4, 4).weight.abs().sum() > 0


def test_a_model_of_no_file_wants_a_name(footprint: ModuleType) -> None:
    with pytest.raises(SystemExit, match="give the model's --loaders FILE"):
        footprint.subject("nothing", None)
