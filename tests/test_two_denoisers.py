"""Pipelines of two denoisers: both are recorded in one run, quantized, written, read, measured and reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from two_denoisers import TinyWan22, tiny_wan

pytest.importorskip("typer")

from command_line import document, failure, run

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks import benchmark
from dmq_ao.config import MissingStatistics
from dmq_ao.pipelines import adapter, ptq
from dmq_ao.pipelines.adapter import load_pipeline, record_denoisers, record_pipeline, sample, save_pipeline
from dmq_ao.pipelines.denoisers import load_denoiser, load_denoisers
from dmq_ao.pipelines.seeds import calibration_seeds

NAMES = ("transformer", "transformer_2")
QUICK = ("--steps", 4, "--samples", 8, "--prompt", "a cat", "--bits", "w8a8")
DRAW = ("--steps", 4, "--prompt", "a cat")


@pytest.fixture(scope="module", autouse=True)
def _known_to_diffusers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "TinyWan22", TinyWan22, raising=False)
        yield


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "wan"
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with both denoisers quantized, and the report of the command that wrote it."""
    out = tmp_path_factory.mktemp("made") / "w8a8"
    return out, document("quantize", float_folder, "-o", out, *QUICK)


def test_each_denoiser_is_recorded_at_its_own_steps() -> None:
    samples = record_denoisers(tiny_wan(), num_samples=8, steps=4, prompt="a cat")
    assert list(samples) == list(NAMES)
    assert samples["transformer"].timesteps.tolist() == [1000.0, 667.0]
    assert samples["transformer_2"].timesteps.tolist() == [334.0, 1.0]
    assert [len(one) for one in samples.values()] == [8, 8]
    again = record_denoisers(tiny_wan(), num_samples=8, steps=4, prompt="a cat")
    assert [one.digest() for one in again.values()] == [one.digest() for one in samples.values()]


@pytest.mark.parametrize("select", ["normal", "tdac"])
def test_uneven_shares_leave_no_denoiser_without_its_steps(select: str) -> None:
    samples = record_denoisers(tiny_wan(), num_samples=6, steps=8, prompt="a cat", select=select)
    assert [len(one) for one in samples.values()] == [6, 6]
    assert [len(one.timesteps) for one in samples.values()] == [4, 4]


def test_the_report_is_of_both(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    parts = report["denoisers"]
    assert list(parts) == list(NAMES)
    for key in ("file_bytes", "float_bytes", "quantized_layers", "kept_layers"):
        assert report[key] == sum(part[key] for part in parts.values())
    assert report["mean_bits"] == pytest.approx(sum(part["mean_bits"] for part in parts.values()) / 2)
    assert [part["calibration"]["samples"] for part in parts.values()] == [8, 8]
    first, second = (part["calibration"]["sqnr_db"] for part in parts.values())
    assert first.keys() == second.keys()
    assert first != second
    names = [layer["name"] for layer in report["layers"]]
    assert len(set(names)) == len(names) == 2 * len(parts["transformer"]["layers"])
    assert {name.partition(".")[0] for name in names} == set(NAMES)
    for name in NAMES:
        assert parts[name]["file_bytes"] == sum(file.stat().st_size for file in (out / name).iterdir())
    written = json.loads((out / "report.json").read_text())
    assert written["layers"] == report["layers"]
    assert calibration_seeds(out) == (range(4),)  # twice as many: each denoiser has half of the steps


def test_both_are_loaded_as_they_were_saved(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = made
    pipeline = load_pipeline(out)
    for name in NAMES:
        assert isinstance(getattr(pipeline, name), dmq_ao.QuantizedDenoiser)
    assert pipeline.config.boundary_ratio == 0.5
    images = sample(pipeline, [5, 6], steps=4, prompt="a cat")
    floats = sample(tiny_wan(), [5, 6], steps=4, prompt="a cat")
    assert 0 < float((images - floats).abs().max()) < 0.1
    save_pipeline(pipeline, tmp_path / "again")
    assert torch.equal(sample(load_pipeline(tmp_path / "again"), [5, 6], steps=4, prompt="a cat"), images)
    for name in NAMES:
        for file in (out / name).iterdir():
            assert (tmp_path / "again" / name / file.name).read_bytes() == file.read_bytes()


def test_the_two_differ_where_their_weights_do(made: tuple[Path, dict[str, Any]]) -> None:
    first, second = load_denoisers(made[0]).values()
    layer = next(iter(first.records))
    assert not torch.equal(first.records[layer].weight.codes, second.records[layer].weight.codes)
    assert isinstance(load_denoiser(made[0] / "transformer_2"), dmq_ao.QuantizedDenoiser)
    with pytest.raises(ValueError, match="has 2 denoisers, transformer and transformer_2, and one is wanted here"):
        load_denoiser(made[0])


def test_one_of_the_two(float_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    report = document("quantize", float_folder, "-o", out, *QUICK, "--denoiser", "transformer_2")
    assert "denoisers" not in report
    pipeline = load_pipeline(out)
    assert isinstance(pipeline.transformer, diffusers.WanTransformer3DModel)
    assert isinstance(pipeline.transformer_2, dmq_ao.QuantizedDenoiser)
    assert torch.equal(pipeline.transformer.proj_out.weight, tiny_wan().transformer.proj_out.weight)
    assert list(load_denoisers(out)) == ["transformer_2"]
    compared = document("compare", float_folder, out, "--images", 1, *DRAW)
    kept = sum(p.numel() * 4 for p in pipeline.transformer.parameters())
    assert compared["variants"][0]["file_bytes"] == report["file_bytes"] + kept


def test_an_unknown_name_is_refused_with_those_that_are(float_folder: Path, tmp_path: Path) -> None:
    words = failure(2, "quantize", float_folder, "-o", tmp_path / "out", *QUICK, "--denoiser", "unet")
    assert "no denoiser 'unet'; its denoisers are ['transformer', 'transformer_2']" in words


def test_compare_and_sample_use_both(made: tuple[Path, dict[str, Any]], float_folder: Path, tmp_path: Path) -> None:
    out, report = made
    compared = document("compare", float_folder, out, "--images", 2, *DRAW)
    [row] = compared["variants"]
    assert row["errors_by_timestep"]["timesteps"] == [1000.0, 667.0, 334.0, 1.0]
    assert row["file_bytes"] == report["file_bytes"]
    assert row["mean_bits"] == pytest.approx(report["mean_bits"])
    assert compared["float"]["file_bytes"] == report["float_bytes"]
    assert row["psnr_db"] > 20
    alone = document("compare", float_folder, out / "transformer", "--images", 1, *DRAW)
    assert alone["variants"][0]["errors_by_timestep"]["timesteps"] == [1000.0, 667.0]
    files = document("sample", out, "-o", tmp_path / "v", "--num", 1, *DRAW)["files"]
    assert len(files) == 1


def test_compare_wants_to_know_which_is_which(
    made: tuple[Path, dict[str, Any]], float_folder: Path, tmp_path: Path
) -> None:
    (made[0] / "transformer").rename(tmp_path / "mine")
    try:
        words = failure(1, "compare", float_folder, tmp_path / "mine", "--images", 1, "--prompt", "a cat")
    finally:
        (tmp_path / "mine").rename(made[0] / "transformer")
    assert (
        "mine holds mine, and TinyWan22 has transformer and transformer_2; give the whole quantized pipeline" in words
    )


def test_inspect_and_verify_look_at_both(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    shown = document("inspect", out)
    assert shown["layers"] == report["layers"]
    assert shown["file_bytes"] == report["file_bytes"]
    assert list(shown["denoisers"]) == list(NAMES)
    assert f"{report['quantized_layers']} of {len(report['layers'])} quantized" in run("inspect", out).stdout
    whole, first, second = (document("verify", path) for path in (out, out / "transformer", out / "transformer_2"))
    assert whole["layers"] == first["layers"] + second["layers"]
    assert whole["denoiser"] == f"{out / 'transformer'} and {out / 'transformer_2'}"


def test_a_dry_run_predicts_both(made: tuple[Path, dict[str, Any]], float_folder: Path) -> None:
    predicted = document("quantize", float_folder, *QUICK, "--dry-run")
    most = predicted["mean_bits"]  # ranges for all of the sampler's steps, of which each denoiser has half
    assert made[1]["mean_bits"] < most < 1.15 * made[1]["mean_bits"]
    assert [row["name"] for row in predicted["layers"]] == [row["name"] for row in made[1]["layers"]]


def test_benchmark_says_which_it_times(made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    asked: list[Path] = []
    monkeypatch.setattr(benchmark, "_stored_denoiser", lambda folder, *rest: asked.append(folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark.run_benchmark(str(made[0]), say=lines.append)
    assert asked == [made[0] / "transformer"]
    assert lines == ["transformer is timed, and not transformer_2"]


def test_quantize_takes_samples_by_name() -> None:
    pipeline = tiny_wan()
    samples = record_denoisers(pipeline, num_samples=4, steps=4, prompt="a cat")
    with pytest.raises(
        TypeError, match="has the denoisers transformer and transformer_2, and quantize got samples of"
    ):
        dmq_ao.quantize(pipeline, recipes.minmax("w8a8"), samples["transformer"])
    with pytest.raises(ValueError, match=r"samples must be of the denoisers of TinyWan22, .* got \['unet'\]"):
        dmq_ao.quantize(pipeline, recipes.minmax("w8a8"), {"unet": samples["transformer"]})
    with pytest.raises(ValueError, match=r"samples must be of the denoisers of TinyWan22, .* got \[\]"):
        dmq_ao.quantize(pipeline, recipes.minmax("w8a8"), {})
    with pytest.raises(TypeError, match="quantize takes a CalibrationSet, got dict"):
        dmq_ao.quantize(pipeline, recipes.minmax("w8a8"), {"transformer": []})  # type: ignore[dict-item]
    before = pipeline.transformer
    reports = dmq_ao.quantize(pipeline, recipes.minmax("w8a8"), samples, progress=False)
    assert list(reports) == list(NAMES)
    assert isinstance(pipeline.transformer, dmq_ao.QuantizedDenoiser)
    assert isinstance(pipeline.transformer_2, dmq_ao.QuantizedDenoiser)
    assert before is not pipeline.transformer
    with pytest.raises(TypeError, match="already quantized; record from the float pipeline"):
        record_denoisers(pipeline, num_samples=4, steps=4, prompt="a cat")


def test_state_and_bits_of_each_have_places_of_their_own(tmp_path: Path) -> None:
    pipeline, recipe = tiny_wan(), recipes.mpq_dm("w4a8")
    recipe = dmq_ao.Recipe.from_dict(
        {**recipes.minmax("w4a8").to_dict(), "allocation": recipe.to_dict()["allocation"]}
    )
    prepared = ptq.prepare_pipeline(pipeline, recipe, prompt="a cat", steps=4)
    how = {"recording": ptq.Recording(steps=4, prompt="a cat"), "progress": False}
    ptq.quantize_pipeline(pipeline, prepared, recipe, tmp_path / "out", state_dir=tmp_path / "state", **how)
    assert {path.name for path in (tmp_path / "state").iterdir()} == set(NAMES)
    plans = [dmq_ao.BitPlan.load(tmp_path / "out" / f"bit_plan_{name}.json") for name in NAMES]
    assert plans[0].summary() != plans[1].summary()
    with pytest.raises(ValueError, match=r"one plan of bits is for one denoiser, got transformer and .* --denoiser"):
        ptq.quantize_pipeline(pipeline, prepared, recipe, tmp_path / "other", bits=plans[0], **how)


def test_a_denoiser_that_is_never_called_is_named() -> None:
    pipeline = tiny_wan(boundary_ratio=None)
    with pytest.raises(MissingStatistics, match="did not call its transformer_2 in 4 steps; take more steps, or set"):
        record_denoisers(pipeline, num_samples=4, steps=4, prompt="a cat")
    pipeline.transformer_2 = None
    assert len(record_pipeline(pipeline, num_samples=4, steps=4, prompt="a cat")) == 4


def test_examples_take_more_steps_where_two_leave_one_out() -> None:
    pipeline = tiny_wan(0.7, diffusers.DDIMScheduler())  # 500 and 0 in two steps; 666 at most in three; 750 in four
    prepared = ptq.prepare_pipeline(pipeline, recipes.minmax("w8a8"), prompt="a cat", steps=4)
    assert list(prepared) == list(NAMES)
    with pytest.raises(MissingStatistics, match="did not call its transformer in 3 steps"):
        ptq.prepare_pipeline(pipeline, recipes.minmax("w8a8"), prompt="a cat", steps=3)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_one_of_them_is_a_pipeline_of_one(name: str, tmp_path: Path) -> None:
    pipeline = tiny_wan(boundary_ratio=None if name == "transformer" else 2.0)
    setattr(pipeline, "transformer_2" if name == "transformer" else "transformer", None)
    report = dmq_ao.quantize(
        pipeline, recipes.minmax("w8a8"), record_pipeline(pipeline, num_samples=4, steps=4, prompt="a"), progress=False
    )
    assert report.samples == 4
    save_pipeline(pipeline, tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out")
    assert isinstance(getattr(loaded, name), dmq_ao.QuantizedDenoiser)


def test_a_pipeline_of_two_has_no_samples_of_one() -> None:
    with pytest.raises(
        ValueError, match="TinyWan22 has 2 denoisers, transformer and transformer_2, and one is wanted"
    ):
        record_pipeline(tiny_wan(), num_samples=4, steps=4, prompt="a cat")


def test_a_float_pipeline_is_not_written_as_quantized(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="save takes what dmq_ao.convert or dmq_ao.load returned"):
        save_pipeline(tiny_wan(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_both_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_wan()
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    adapter.compile_denoiser(pipeline)
    assert compiled == [pipeline.transformer, pipeline.transformer_2]
