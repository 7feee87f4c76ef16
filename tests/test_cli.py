"""The command line: every command on the bundled denoiser, what it prints where, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

pytest.importorskip("typer")

from command_line import document, failure, run

from dmq_ao import recipes
from dmq_ao.api import compile as api_compile
from dmq_ao.backends import AUTO
from dmq_ao.backends.onednn import cpu, self_test
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.benchmarks import benchmark, demo, peers
from dmq_ao.benchmarks.named import NAMED
from dmq_ao.benchmarks.peers import PEERS, Peer, chosen_peers
from dmq_ao.cli import doctor, measure, options, quantize
from dmq_ao.cli import output as cli_output
from dmq_ao.config import BitAllocation, InvalidFile, Ranges, Recipe, SelectMethod
from dmq_ao.observers import ALL_OBSERVERS
from dmq_ao.pipelines import adapter, ptq
from dmq_ao.pipelines.adapter import demo_folder
from tests.integer_sums import EXACT

COMMANDS = ("quantize", "sample", "compare", "inspect", "benchmark", "doctor", "demo")
QUICK = ("--steps", "4", "--samples", "8")


@pytest.fixture(scope="module", autouse=True)
def one_demo(captures_are_shared: None) -> Iterator[None]:
    """Every command loads the bundled denoiser; what it loads is captured once, for it is the same module."""
    load, loaded = adapter.load_pipeline, []

    def load_pipeline(source: str | Path, **options: Any) -> Any:
        pipeline = load(source, **options)
        if str(source) == "demo" and pipeline.device.type == "cpu" and pipeline.dtype == torch.float32:
            loaded.append(pipeline.unet)
            pipeline.unet = loaded[0]
        return pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "load_pipeline", load_pipeline)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A quantized demo pipeline and the report of the command that made it."""
    out = tmp_path_factory.mktemp("made") / "w4a8"
    return out, document("quantize", "demo", "-o", out, *QUICK, "--power-of-two", "--keep-float", "mid_block.*to_q")


def test_quantize_reports_what_it_did(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    kept = {layer["name"]: layer["why"] for layer in report["layers"] if layer["status"] == "float"}
    assert kept["mid_block.attentions.0.to_q"] == "override 'mid_block.*to_q'"
    assert report["kept_layers"] == len(kept)
    assert report["quantized_layers"] + len(kept) == len(report["layers"])
    assert 4 < report["mean_bits"] < 8
    assert report["file_bytes"] == sum(file.stat().st_size for file in (out / "unet").iterdir())
    assert report["recipe"]["num_samples"] == 8
    assert report["calibration"]["samples"] == 8


def test_quantize_writes_a_pipeline_with_its_report(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    assert {path.name for path in out.iterdir()} == {"model_index.json", "report.json", "scheduler", "unet"}
    written = json.loads((out / "report.json").read_text())
    assert written["layers"] == report["layers"]
    assert written["calibration"]["votes"]


def test_mean_bits_change_the_mean_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Recipe] = []

    def stop(pipeline: object, recipe: Recipe, **given: object) -> None:
        chosen.append(recipe)
        raise ValueError("far enough")

    monkeypatch.setattr(ptq, "prepare_pipeline", stop)
    for name in ("mpq_dm", "default", "minmax"):
        failure(2, "quantize", "demo", "--dry-run", "--recipe", name, "--bits", "w4a8", "--mean-bits", "2.5")
        own = recipes.ALL_RECIPES[name]("w4a8").allocation or BitAllocation()
        assert chosen[-1].allocation == dataclasses.replace(own, mean_bits=2.5)
    assert chosen[0].allocation != chosen[1].allocation  # mpq_dm shares out at any gain


def test_dry_run_predicts_bits_and_writes_nothing(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    options = ("--power-of-two", "--keep-float", "mid_block.*to_q", "--dry-run")
    predicted = document("quantize", "demo", "-o", tmp_path / "out", *QUICK, *options)
    assert list(tmp_path.iterdir()) == []
    assert predicted["mean_bits"] == pytest.approx(made[1]["mean_bits"], rel=1e-3)
    assert predicted["file_bytes"] < made[1]["file_bytes"]
    plan = [{key: layer[key] for key in ("name", "status", "weight_bits", "why")} for layer in made[1]["layers"]]
    assert [{key: layer[key] for key in plan[0]} for layer in predicted["layers"]] == plan


def test_embeddings_are_quantized_on_request() -> None:
    floats, integers = (document("quantize", "demo", *QUICK, "--dry-run", *given) for given in ((), ("--embeddings",)))
    assert integers["mean_bits"] < floats["mean_bits"]
    widths = {layer["name"]: layer["weight_bits"] for layer in integers["layers"]}
    assert (widths["time_embedding.linear_1"], widths["conv_in"]) == (8, 32)


def test_bits_are_searched_shown_edited_and_given_back(tmp_path: Path) -> None:
    report = document("quantize", "demo", "-o", tmp_path / "out", *QUICK, "--bits", "w4a8", "--mean-bits", "2.5")
    plan = tmp_path / "out" / "bit_plan.json"
    assert report["calibration"]["bits"]["mean_bits"] == pytest.approx(2.5, abs=0.02)
    predicted = document("quantize", "demo", *QUICK, "--bits", "w4a8", "--mean-bits", "2.5", "--dry-run")
    assert predicted["mean_bits"] == pytest.approx(report["mean_bits"], rel=0.02)
    shown = document("inspect", plan)
    assert shown["layers"] == report["calibration"]["bits"]["layers"]
    text = run("inspect", plan).stdout
    assert "mid_block.attentions.0.to_q" in text
    assert "decided by error_gain" in text
    assert "bits in the mean of the layers named here" in text
    again = document("quantize", "demo", "-o", tmp_path / "again", *QUICK, "--bits", "w4a8", "--bit-plan", plan)
    assert again["mean_bits"] == pytest.approx(report["mean_bits"], rel=0.01)
    bits = [[row["weight_bits"] for row in one["layers"]] for one in (report, again)]
    assert bits[0] == bits[1]


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    result = run("quantize", "demo", "-o", tmp_path / "out", *QUICK, "--bit-plan", tmp_path / "plan.json")
    assert result.exit_code == 1
    assert "not a bit plan" in result.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_shows_every_layer(made: tuple[Path, dict[str, Any]]) -> None:
    out, report = made
    found = document("inspect", out / "unet")
    assert found["layers"] == report["layers"]
    assert {key: found[key] for key in ("mean_bits", "kernels", "file_bytes", "float_bytes")} == {
        key: report[key] for key in ("mean_bits", "kernels", "file_bytes", "float_bytes")
    }


@pytest.mark.parametrize("everything", [True, False])
def test_inspect_prints_a_table(
    made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    out, report = made
    monkeypatch.setattr(ptq, "describe_folder", lambda folder, backend: report)
    result = run("inspect", out, *(["--all"] if everything else []))
    assert (result.exit_code, result.stderr) == (0, "")
    table, totals = result.stdout.split("\n\n")
    shown = [line.split()[0] for line in table.splitlines()[1:]]
    names = [layer["name"] for layer in report["layers"]]
    if everything:
        assert shown == names
    else:
        assert len(shown) - 1 == report["kept_layers"] + 10  # the noisiest, and a line that says how many are hidden
        assert f"({len(names) - len(shown) + 1} layers more" in table
    assert f"{report['quantized_layers']} of {len(names)} quantized (minmax w4a8, power-of-two)" in totals


def test_sample_draws_a_grid_from_a_quantized_folder(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    grid = tmp_path / "new" / "grid.png"
    found = document("sample", made[0], "-o", grid, "--num", 9, "--steps", 2, "--seed", 5)
    assert found["files"] == [str(grid)]
    assert found["seeds"] == list(range(5, 14))
    assert grid.read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_is_loaded_on_a_device_whole(made: tuple[Path, dict[str, Any]]) -> None:
    from dmq_ao.pipelines.adapter import load_pipeline

    for source in (made[0], "demo"):
        pipeline = load_pipeline(source, backend="reference", device="meta")
        assert (pipeline.device, pipeline.unet.device) == (torch.device("meta"),) * 2


def test_sample_wants_a_device_that_is_there(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = run("sample", made[0], "-o", tmp_path / "grid.png", "--device", "cuda:77")
    assert result.exit_code == 1
    assert "device 'cuda:77' is unavailable" in result.stderr
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("command", ["quantize", "compare"])
def test_other_commands_want_one_too(command: str, made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, rest = tmp_path / "out", [made[0]] if command == "compare" else []
    result = run(command, "demo", *rest, "-o", out, "--device", "cuda:77")
    assert result.exit_code == 1
    assert "device 'cuda:77' is unavailable" in result.stderr
    assert not out.exists()


def test_sample_keeps_codes_packed_when_asked(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    names = ("plain.png", "packed.png")
    for name, more in zip(names, ((), ("--packed",)), strict=True):
        document("sample", made[0], "-o", tmp_path / name, "--num", 1, "--steps", 2, *more)
    plain, packed = ((tmp_path / name).read_bytes() for name in names)
    assert plain == packed


def test_sample_writes_a_picture_a_seed(tmp_path: Path) -> None:
    result = run("sample", "demo", "-o", tmp_path / "pictures", "--num", 2, "--steps", 2, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"2 pictures in {tmp_path / 'pictures'}\n"
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["seed_3.png", "seed_4.png"]


def test_compare_measures_and_writes_a_page(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = made
    result = run("compare", "demo", out, "-o", tmp_path / "report", "--images", 2, "--steps", 4)
    assert result.exit_code == 0, result.stderr
    assert "float" in result.stdout
    assert out.name in result.stdout
    assert {"report.json", "report.html", "grid.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
    (row,) = json.loads((tmp_path / "report" / "report.json").read_text())["variants"]
    assert 0 < row["one_step_error"] < 0.5
    assert 10 < row["psnr_db"] < 60
    assert row["size_ratio"] == pytest.approx(report["float_bytes"] / report["file_bytes"])
    assert len(row["errors_by_timestep"]["timesteps"]) == 4


def test_doctor_finds_this_machine_in_order() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    assert torch.__version__ in result.stdout
    found = document("doctor")
    assert found["healthy"]
    assert {row["subject"] for row in found["findings"]} >= {"python", "torch", "torchao", "diffusers", "cpu", "cuda"}


def test_doctor_fails_on_what_is_broken_and_not_on_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_kernels", lambda: False)
    slow = run("doctor")
    assert slow.exit_code == 0
    assert "no oneDNN int8 operators" in slow.stdout
    monkeypatch.setitem(doctor.TESTED, "no-such-package", ((1, 0), None))
    broken = run("doctor")
    assert broken.exit_code == 1
    assert "FAIL  no-such-package  not installed" in broken.stdout


def test_doctor_says_when_a_version_is_outside_of_the_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.TESTED, "torch", ((3, 0), (3, 2)))
    (found,) = [row for row in doctor.examine()["findings"] if row["subject"] == "torch"]
    assert found["level"] == "note"
    assert "outside of the tested 3.0 to 3.1" in found["text"]


@pytest.mark.skipif(not EXACT, reason="no exact int8 kernels on this machine")
def test_doctor_notices_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_misses", lambda *args: "makes 1 of 2 sums that are not those of its integers")
    self_test.sums.cache_clear()
    try:
        assert not doctor.examine()["healthy"]
    finally:
        self_test.sums.cache_clear()


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_demo(folder: Path, **options: Any) -> dict[str, Any]:
        options.pop("say")("working")
        assert options == {"backend": "reference", "mode": "max", "images": 3, "with_latency": False}
        return {"title": "demo", "variants": [{"name": "W4A8"}]}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = run("demo", "-o", tmp_path, "--backend", "reference", "--mode", "max", "--images", 3, "--no-latency")
    assert result.exit_code == 0, result.stderr
    assert "W4A8" in result.stdout
    assert str(tmp_path / "report.html") in result.stdout
    assert result.stderr == "working\n"


@pytest.mark.slow
def test_demo_writes_its_report(tmp_path: Path) -> None:
    assert len(document("demo", "-o", tmp_path, "--images", 2, "--no-latency")["variants"]) == 4
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_benchmark_times_both(made: tuple[Path, dict[str, Any]], quantized: bool) -> None:
    model = made[0] if quantized else "demo"
    found = document("benchmark", model, "--repeats", 2, "--batch-size", 2, "--threads", 1)
    assert found["speedup"] > 0
    assert found["latency_ms"].keys() == found["compile_seconds"].keys() == {"float", "quantized"}
    assert found["machine"]["threads"] == 1
    assert f"is {found['speedup']:.2f}x as fast as float32" in cli_output.benchmark_text(found)


def test_benchmark_tells_compile_time_of_both() -> None:
    times = {"median_ms": 2.0, "p10_ms": 1.0, "p90_ms": 3.0, "repeats": 7}
    report = {
        "recipe": recipes.minmax("w4a8").to_dict(),
        "mode": "max",
        "batch_size": 3,
        "latency_ms": {"float": times, "quantized": times},
        "compile_seconds": {"float": 12.34, "quantized": 56.78},
        "speedup": 1.5,
        "kernels": {"onednn int8 linear": 2},
    }
    lines = cli_output.benchmark_text({**report, "machine": {}}).splitlines()
    assert lines[0].split() == ["median", "ms", "p10", "p90", "compile", "s"]
    assert lines[1].split() == ["float", "2.00", "1.00", "3.00", "12.3"]
    assert lines[2].split() == ["quantized", "2.00", "1.00", "3.00", "56.8"]
    assert "minmax w4a8) is 1.50x as fast as float32, both compiled (mode max); batch 3, 7 calls" in lines[4]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        pytest.param((), [], id="none"),
        pytest.param(("--peers",), list(PEERS), id="all"),
        pytest.param(("--peer", "torch FP32"), ["torch fp32"], id="a name"),
        pytest.param(
            ("--peers", "--peer", "onnx*", "--peer", "torch bf16*"),
            ["torch bf16", "torch bf16 compiled", "ONNX Runtime int8"],
            id="patterns",
        ),
    ],
)
def test_benchmark_passes_its_peers_on(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], chosen: list[str]
) -> None:
    row = {"median_ms": 2.0, "p10_ms": 1.0, "p90_ms": 3.0, "repeats": 7, "compile_seconds": 4.0}

    def run_benchmark(model: str, bits: str, *, peers: list[str], batch_size: int | None, **_: Any) -> dict[str, Any]:
        assert (model, bits, batch_size) == ("dit-s-2", "w8a8", None)
        rows = {name: row for name in ("dmq_ao W8A8", *peers)}
        return {"model": model, "batch_size": 4, "rows": rows, "kernels": {}, "machine": {}}

    monkeypatch.setattr(benchmark, "run_benchmark", run_benchmark)
    arguments = ("benchmark", "dit-s-2", "--bits", "w8a8", *options)
    assert list(document(*arguments)["rows"]) == ["dmq_ao W8A8", *chosen]
    text = run(*arguments).stdout
    assert all(f"\n{name} " in text for name in chosen)
    assert "dit-s-2, batch 4, 7 calls of each in turns" in text


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "OpenVINO fp32", Peer(peers.openvino, ("no_such_package",)))
    monkeypatch.setattr(benchmark, "named_denoiser", lambda name: pytest.fail("built the denoiser"))
    error = failure(1, "benchmark", "cifar-unet", "--peer", "openvino fp32")
    assert error.startswith("error: unavailable: 'OpenVINO fp32' need no_such_package; install with: pip install")
    assert 'pip install "dmq_ao[bench]"' in error


def test_an_unknown_peer_is_a_usage_error() -> None:
    assert "'tensorrt*' matches no peer; the peers are 'torch fp32'," in failure(
        2, "benchmark", "cifar-unet", "--peer", "tensorrt*"
    )


def test_peers_want_float_weights(made: tuple[Path, dict[str, Any]]) -> None:
    error = failure(1, "benchmark", made[0], "--peer", "torch fp32")
    assert f"{made[0]} has no float weights" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(("--bits", "w9a8"), "bits must look like 'w4a8'", id="bits"),
        pytest.param(("--backend", "tpu"), "'tpu' is not one of 'auto', 'onednn', 'cuda', 'reference'", id="backend"),
        pytest.param(
            ("--recipe", "magic"), "the recipes are ['default', 'dmq', 'eda_dm', 'minmax', 'mpq_dm']", id="recipe"
        ),
        pytest.param(("--prompt", "a fox"), "does not take a prompt", id="prompt"),
        pytest.param(("--steps", "0"), "--steps", id="steps"),
        pytest.param((*QUICK, "--keep-float", "nothing*"), "'nothing*' matches no layer", id="pattern"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in failure(2, "quantize", "demo", "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_wanted() -> None:
    assert "required, unless --dry-run is given" in failure(2, "quantize", "demo")


def test_a_recipe_keeps_what_it_decides_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.ALL_RECIPES, "fixed", lambda bits: recipes.minmax(bits))
    words = failure(2, "quantize", "demo", "--dry-run", "--recipe", "fixed", "--ranges", "dynamic")
    assert "recipe 'fixed' sets ranges itself" in words


def test_a_taken_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "open_pipeline", lambda *args: pytest.fail("loaded the pipeline"))
    (tmp_path / "mine.txt").write_text("mine")
    error = failure(1, "quantize", "demo", "-o", tmp_path)
    assert error == f"error: {tmp_path} exists and is not an empty folder; give another one, or remove it first"


@pytest.mark.parametrize("command", ["quantize", "sample", "benchmark", "compare"])
@pytest.mark.parametrize("model", ["no/such/folder", "nosuch"])
def test_an_unknown_model_is_one_line(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, command: str, model: str
) -> None:
    more = {"compare": (made[0],), "benchmark": ()}.get(command, ("-o", tmp_path / "out"))
    error = failure(1, command, model, *more)
    assert error == (
        f"error: {model}: no such folder; give a diffusers pipeline folder, a .safetensors checkpoint, a Hub"
        " id or 'demo'"
    )


@pytest.mark.parametrize("command", ["inspect", "compare"])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({}, "config.json is missing", id="empty"),
        pytest.param({"config.json": "{}"}, "no quantization_config of dmq_ao in it", id="float"),
        pytest.param({"config.json": "{"}, "not JSON", id="truncated"),
        pytest.param({"model_index.json": "{}"}, "a pipeline without a unet or transformer", id="no denoiser"),
    ],
)
def test_a_foreign_folder_is_one_line(tmp_path: Path, command: str, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    error = failure(1, command, *(["demo"] if command == "compare" else []), tmp_path)
    assert error.startswith("error: ")
    assert str(tmp_path) in error
    assert words in error


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path: Path) -> None:
    assert "has no model_index.json" in failure(1, "sample", tmp_path, "-o", tmp_path / "x.png")


def test_a_float_denoiser_cannot_be_inspected() -> None:
    assert "this is a float model" in failure(1, "inspect", demo_folder())


def test_debug_shows_where_it_failed(tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--debug")
    assert isinstance(result.exception, InvalidFile)


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert failure(130, "doctor") == "interrupted"


def test_samples_are_selected_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(
        "dmq_ao.pipelines.ptq.prepare_pipeline", lambda pipeline, recipe, **given: chosen.append(recipe)
    )
    monkeypatch.setattr(ptq, "forecast", lambda *given: {})
    monkeypatch.setattr("dmq_ao.cli.output.forecast_text", lambda report: "")
    for option in ((), ("--select", "tdac")):
        run("quantize", "demo", "--dry-run", *option)
    assert [recipe.select.method.value for recipe in chosen] == ["uniform", "tdac"]
    assert "'best' is not one of 'uniform', 'normal', 'tdac'" in failure(2, "quantize", "demo", "--select", "best")


def test_choices_are_those_of_the_library() -> None:
    assert [item.value for item in options.BackendName] == [AUTO, *ALL_BACKENDS]
    assert {item.value for item in options.ObserverName} == set(ALL_OBSERVERS)
    assert {item.value for item in options.CompileMode} == set(get_args(api_compile.Mode))


def test_the_help_names_what_the_library_has() -> None:
    """Recipes, denoisers and peers are taken by name, and new ones without a change of the command line."""
    arguments = {
        name: get_args(hint) for name, hint in get_type_hints(quantize.quantize_command, include_extras=True).items()
    }
    assert arguments["recipe"][1].help == f"Method: {', '.join(recipes.ALL_RECIPES)}."
    hints = get_type_hints(measure.benchmark_command, include_extras=True)
    named = re.findall(r"`([\w-]+)`", get_args(hints["model"])[1].help)
    assert set(named) - {"quantize"} == set(NAMED)
    assert chosen_peers(["*"]) == list(PEERS)
    assert [one for one in SelectMethod if one.value not in failure(2, "quantize", "demo", "--select", "?")] == []
    assert [one for one in Ranges if one.value not in failure(2, "quantize", "demo", "--ranges", "?")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_and_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n  Examples:\n    dmq-ao {command}" in result.stdout
    assert "--format" in result.stdout


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = "import sys; from dmq_ao.cli import main; sys.argv = ['dmq-ao', '--help']\ntry: main()\nfinally:"
    done = python(f"{code} assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_without_typer_it_says_what_to_install() -> None:
    done = python("import sys; sys.modules['typer'] = None; from dmq_ao.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr == 'error: the command line needs typer; install it with: pip install "dmq_ao[cli]"\n'


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
