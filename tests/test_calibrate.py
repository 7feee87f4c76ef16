"""Calibration: what it refuses, what it reports, and that no interruption changes its outcome by a bit."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, assert_same_records, flow, graph_arguments, plain_samples, record, seeded
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph
from dmq_ao.config import InvalidFile, Ranges, Recipe
from dmq_ao.samples.graph_samples import Batch, GraphSamples
from dmq_ao.serialization import checkpoint as state

module = importlib.import_module("dmq_ao.algorithms.ranges")
RECIPE = dmq_ao.recipes.minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True, observer="mse")
STATE = "calibration.safetensors"
BATCH = 5  # of 16 samples: four batches a pass, the last one short
BATCHES = 8  # of the two passes


pytestmark = pytest.mark.usefixtures("captures_are_shared")


@pytest.fixture
def prepare(model: nn.Module, samples: dmq_ao.CalibrationSet) -> Callable[..., GraphModule]:
    """A new prepared graph, as a new process would make it."""
    return lambda recipe=RECIPE: dmq_ao.prepare(model, recipe, samples.example(), backend="reference")


@dataclasses.dataclass
class Outcome:
    denoiser: dmq_ao.QuantizedDenoiser
    report: dmq_ao.CalibrationReport


def calibrate(prepared: GraphModule, samples: dmq_ao.CalibrationSet, **given: Any) -> Outcome:
    report = dmq_ao.calibrate(prepared, samples, progress=False, **{"batch_size": BATCH, **given})
    return Outcome(dmq_ao.convert(prepared, "reference"), report)


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert_same_records(left.denoiser, right.denoiser)
    assert left.report.sqnr_db == right.report.sqnr_db
    assert left.report.votes == right.report.votes


@pytest.fixture(scope="module")
def uninterrupted(model: nn.Module, samples: dmq_ao.CalibrationSet) -> Outcome:
    outcome = calibrate(dmq_ao.prepare(model, RECIPE, samples.example(), backend="reference"), samples)
    assert any(
        record.activation.exponents.any() for record in outcome.denoiser.records.values() if ".part" in record.name
    )
    return outcome


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Interrupt the run when it takes one more batch than ``count``; None lets it run."""
    batches = GraphSamples.batches

    def stop(count: int | None, error: type[BaseException] = KeyboardInterrupt) -> None:
        left = [math.inf if count is None else count]

        def interrupted(self: GraphSamples, size: int) -> Iterator[Batch]:
            for batch in batches(self, size):
                if left[0] <= 0:
                    raise error
                left[0] -= 1
                yield batch

        monkeypatch.setattr(GraphSamples, "batches", interrupted)

    return stop


# --- interruptions -----------------------------------------------------------


@pytest.mark.parametrize("save_every", [-1.0, 1e9], ids=["saved at every batch", "saved at every pass"])
@pytest.mark.parametrize("count", range(BATCHES))
def test_an_interrupted_run_goes_on_and_ends_the_same(
    count: int,
    save_every: float,
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    uninterrupted: Outcome,
    stop_after: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_SECONDS", save_every)
    stop_after(count)
    with pytest.raises(KeyboardInterrupt):
        calibrate(prepare(), samples, state_dir=tmp_path)
    saved = count if save_every < 0 else count // 4 * 4
    assert (tmp_path / STATE).exists() == (saved > 0)
    watched: list[int] = []
    watch = module.ActivationObserver.forward
    monkeypatch.setattr(
        module.ActivationObserver, "forward", lambda self, x, t=None: (watched.append(len(x)), watch(self, x, t))[1]
    )
    stop_after(None)
    outcome = calibrate(prepare(), samples, state_dir=tmp_path)
    assert outcome.report.resumed == (saved > 0)
    layers = len(outcome.denoiser.records)
    assert len(watched) == layers * (BATCHES - saved + 1)  # what was left, and once to measure
    assert_same_outcome(outcome, uninterrupted)


def test_a_run_may_be_interrupted_at_every_batch(
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    uninterrupted: Outcome,
    stop_after: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_SECONDS", -1.0)
    for done in range(BATCHES - 1):
        stop_after(done % 4 + 1)  # those of the pass that are done are taken again, and skipped
        with pytest.raises(KeyboardInterrupt):
            calibrate(prepare(), samples, state_dir=tmp_path)
    stop_after(4, RuntimeError)  # the last one, and those of its pass before it
    assert_same_outcome(calibrate(prepare(), samples, state_dir=tmp_path), uninterrupted)


@pytest.mark.parametrize("at", range(1, BATCHES + 3))
def test_a_kill_while_the_state_is_written(
    at: int,
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    uninterrupted: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path)
        if len(written) == at:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    monkeypatch.setattr(module, "SAVE_EVERY_SECONDS", -1.0)
    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        calibrate(prepare(), samples, state_dir=tmp_path)
    outcome = calibrate(prepare(), samples, state_dir=tmp_path)
    assert outcome.report.resumed == (at > 1)
    assert_same_outcome(outcome, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("ranges", list(Ranges))
def test_every_observer_resumes(
    observer: str,
    ranges: Ranges,
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    stop_after: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = dmq_ao.recipes.minmax("w8a8", ranges=ranges, power_of_two=True, observer=observer)
    expected = calibrate(prepare(recipe), samples)
    monkeypatch.setattr(module, "SAVE_EVERY_SECONDS", -1.0)
    for count in (2, 3):
        stop_after(count)
        with pytest.raises(KeyboardInterrupt):
            calibrate(prepare(recipe), samples, state_dir=tmp_path)
    stop_after(None)
    outcome = calibrate(prepare(recipe), samples, state_dir=tmp_path)
    assert outcome.report.resumed
    assert_same_outcome(outcome, expected)


def test_a_finished_run_is_not_run_again(
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    uninterrupted: Outcome,
    stop_after: Callable[..., None],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a" / "b"
    first = calibrate(prepare(), samples, state_dir=folder)
    assert not first.report.resumed
    stop_after(0, RuntimeError)
    again = calibrate(prepare(), samples, state_dir=str(folder))
    assert again.report.resumed
    assert_same_outcome(again, first)
    assert_same_outcome(again, uninterrupted)


@pytest.mark.parametrize(
    ("recipe", "batch_size", "seed", "shift"),
    [
        (dmq_ao.recipes.minmax("w4a6", ranges=Ranges.PER_STEP, power_of_two=True), BATCH, 0, 0),
        (RECIPE, BATCH + 1, 0, 0),
        (RECIPE, BATCH, 1, 0),
        (RECIPE, BATCH, 0, 1),
    ],
    ids=["other recipe", "other batch size", "other samples", "other weights"],
)
def test_the_state_of_another_run_is_refused(
    recipe: Recipe,
    batch_size: int,
    seed: int,
    shift: int,
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    tmp_path: Path,
) -> None:
    calibrate(prepare(), samples, state_dir=tmp_path)
    before = (tmp_path / STATE).read_bytes()
    other = seeded(Plain)
    with torch.no_grad():
        other.merge.weight += shift
    given = plain_samples(other, seed=seed) if seed else samples
    prepared = dmq_ao.prepare(other, recipe, samples.example())
    with pytest.raises(ValueError, match="belongs to another run: .* delete the folder to start again, or give") as e:
        calibrate(prepared, given, state_dir=tmp_path, batch_size=batch_size)
    assert str(tmp_path / STATE) in str(e.value)
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_state_is_refused(
    keep: float, prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    calibrate(prepare(), samples, state_dir=tmp_path)
    data = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidFile, match="not a calibration state .* delete it to start again") as caught:
        calibrate(prepare(), samples, state_dir=tmp_path)
    assert str(tmp_path / STATE) in str(caught.value)


def test_a_foreign_file_in_the_place_of_the_state(
    prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / STATE)
    with pytest.raises(InvalidFile, match="not a calibration state"):
        calibrate(prepare(), samples, state_dir=tmp_path)


def test_a_state_dir_that_cannot_be_is_refused_before_the_work(
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    stop_after: Callable[..., None],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    stop_after(0, RuntimeError)
    with pytest.raises(FileExistsError):
        calibrate(prepare(), samples, state_dir=tmp_path / "file")


# --- refusals ----------------------------------------------------------------


def test_what_is_not_prepared(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    with pytest.raises(TypeError, match="calibrate takes what dmq_ao.prepare returned, got Plain"):
        dmq_ao.calibrate(model, samples)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="calibrate takes what dmq_ao.prepare returned, got GraphModule"):
        dmq_ao.calibrate(graph.capture(model, samples.example()), samples)


@pytest.mark.parametrize("other", [[], [{"x": torch.zeros(2)}], None, {}])
def test_what_is_no_calibration_set(other: Any, prepare: Callable[..., GraphModule]) -> None:
    with pytest.raises(TypeError, match="calibrate takes a CalibrationSet, got .*; dmq_ao.record makes one from any"):
        dmq_ao.calibrate(prepare(), other)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_hold_something(
    batch_size: int, prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet
) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be 1 or more, got {batch_size}"):
        calibrate(prepare(), samples, batch_size=batch_size)


def test_samples_that_lack_an_argument(prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet) -> None:
    other = dataclasses.replace(samples, inputs={"image": samples.inputs["x"]})
    with pytest.raises(ValueError, match=r"the samples lack \['x'\], which .* takes; they hold \['image', 't'\]"):
        calibrate(prepare(), other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_name_their_layer(value: float, samples: dmq_ao.CalibrationSet) -> None:
    broken = seeded(Plain)
    with torch.no_grad():
        broken.tokens.bias[3] = value
    prepared = dmq_ao.prepare(broken, RECIPE, samples.example())
    with pytest.raises(ValueError, match="merge.part0: its input holds NaN or infinity; check the samples and the fl"):
        calibrate(prepared, samples)


# --- what is decided and reported --------------------------------------------


def test_calibrating_does_not_change_what_the_graph_computes(
    prepare: Callable[..., GraphModule], model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    prepared = prepare()
    inputs = next(iter(samples.batches(4)))
    with torch.no_grad():
        expected = prepared(*graph_arguments(prepared, inputs))
        torch.testing.assert_close(expected, model(**inputs))  # not bit by bit: a split layer sums in another order
        calibrate(prepared, samples)
        assert torch.equal(prepared(*graph_arguments(prepared, inputs)), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_the_batch_size_only_bounds_the_memory(
    batch_size: int,
    prepare: Callable[..., GraphModule],
    samples: dmq_ao.CalibrationSet,
    uninterrupted: Outcome,
) -> None:
    outcome = calibrate(prepare(), samples, batch_size=batch_size)
    for name, expected in uninterrupted.denoiser.records.items():
        actual = outcome.denoiser.records[name]
        assert torch.equal(actual.weight.codes, expected.weight.codes)
        torch.testing.assert_close(actual.activation.scale, expected.activation.scale, rtol=1e-5, atol=0)
        assert torch.equal(actual.activation.timesteps, expected.activation.timesteps)
        if expected.activation.exponents is not None:
            assert torch.equal(actual.activation.exponents, expected.activation.exponents)


def test_the_seed_chooses_what_noise_is_measured_on_and_nothing_else(
    prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet, uninterrupted: Outcome
) -> None:
    outcome = calibrate(prepare(), samples, seed=1)
    assert_same_records(outcome.denoiser, uninterrupted.denoiser)
    assert outcome.report.sqnr_db != uninterrupted.report.sqnr_db
    assert outcome.report.sqnr_db == calibrate(prepare(), samples, seed=1).report.sqnr_db


class Middle(nn.Module):
    """One quantized layer, between two that stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))) + t[:, None]


@pytest.mark.parametrize("scheme", ["w3a16", "w8a4", "w4a8"])
def test_the_reported_noise_is_that_of_the_integers(scheme: str) -> None:
    model = seeded(Middle)
    samples = record(model, lambda step: model(torch.randn(2, 6), torch.full((2,), step)), num_samples=8)
    denoiser, report = flow(model, dmq_ao.recipes.minmax(scheme), samples)
    layer = denoiser.records["middle"]
    with torch.no_grad():
        x = model.first(samples.inputs["x"]).double()
        expected = x @ model.middle.weight.double().T + model.middle.bias.double()
    weight = (layer.weight.codes.double() - layer.weight.zero_point) * layer.weight.scale.double()
    if layer.activation is not None:
        scale, zero_point = layer.activation.scale.double(), layer.activation.zero_point
        x = ((x / scale).round() + zero_point).clamp(0, 2**layer.activation.bits - 1)
        x = (x - zero_point) * scale
    actual = x @ weight.T + model.middle.bias.detach().double()
    by_hand = 10 * math.log10(float(expected.square().sum() / (actual - expected).square().sum()))
    assert report.sqnr_db == {"middle": pytest.approx(by_hand, abs=0.01)}


def test_static_ranges_hold_what_was_seen() -> None:
    model = seeded(Middle)
    samples = record(model, lambda step: model(torch.randn(2, 6), torch.full((2,), step)), num_samples=8)
    denoiser, _ = flow(model, dmq_ao.recipes.minmax("w8a8"), samples)
    seen = model.first(samples.inputs["x"]).detach()
    activation = denoiser.records["middle"].activation
    assert float(activation.scale) == pytest.approx(float(seen.max() - seen.min()) / 255)
    low = -float(activation.zero_point * activation.scale)
    assert low == pytest.approx(float(seen.min()), abs=float(activation.scale))


def test_the_report_is_plain_data(uninterrupted: Outcome) -> None:
    report = uninterrupted.report
    assert (report.samples, report.resumed) == (16, False)
    assert 0 < report.seconds < 60
    assert set(report.votes) == {"merge.part0", "merge.part1"}
    for vote in report.votes.values():
        assert sum(vote.channels.values()) == 16
        assert 0 <= vote.refused <= 16
        assert 0.25 <= vote.mean_agreement <= 1
    back = json.loads(json.dumps(report.to_dict()))
    measured = {"samples", "seconds", "resumed", "sqnr_db", "votes", "peak_bytes"}
    assert back.keys() == measured | {"layers", "blocks", "bits", "distillation"}
    assert (back["layers"], back["blocks"], back["bits"], back["distillation"]) == ({}, {}, None, None)
    assert back["peak_bytes"] is None or back["peak_bytes"] > 2**20
    assert back["votes"]["merge.part0"]["channels"] == {
        str(exponent): count for exponent, count in report.votes["merge.part0"].channels.items()
    }


def test_weights_alone_need_no_pass(
    prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet, stop_after: Callable[..., None]
) -> None:
    stop_after(0, RuntimeError)
    outcome = calibrate(prepare(dmq_ao.recipes.minmax("w4a16")), samples)
    assert set(outcome.report.sqnr_db) == {"conv", "tokens", "merge.part0", "merge.part1"}


def test_the_progress_bar_shows_both_passes_or_nothing(
    prepare: Callable[..., GraphModule], samples: dmq_ao.CalibrationSet, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare()
    capfd.readouterr()
    dmq_ao.calibrate(prepared, samples, progress=False, batch_size=BATCH)
    assert capfd.readouterr() == ("", "")
    dmq_ao.calibrate(prepared, samples, progress=True, batch_size=BATCH)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"{BATCHES}/{BATCHES}" in err
    assert "votes" in err


def test_steps_of_the_table_are_those_of_the_sampler(uninterrupted: Outcome) -> None:
    for layer in uninterrupted.denoiser.records.values():
        assert layer.activation.timesteps.tolist() == sorted(STEPS, reverse=True)
        assert len(set(layer.activation.scale.tolist())) == len(STEPS)
