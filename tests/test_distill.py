"""The last stage: better on samples it was not fitted to or as before, no interruption seen.

Codes stay, or move by what is merged into them; features count beside the output, where samples know their steps.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, assert_same_records, contents, graph_arguments, plain_samples, record, seeded, small
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao.algorithms import relations
from dmq_ao.algorithms.distillation import Student
from dmq_ao.algorithms.features import find_feature_node
from dmq_ao.algorithms.holdout import held_out
from dmq_ao.algorithms.relations import Relations, Watched
from dmq_ao.config import Distillation, InvalidFile, Recipe, Reduce, Relation
from dmq_ao.objectives import relation_error
from dmq_ao.quantizer.prepared import observers, state_of
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization import checkpoint as state

module = importlib.import_module("dmq_ao.algorithms.distillation")
STATE = "distillation.safetensors"
RECIPE = dataclasses.replace(
    small(dmq_ao.recipes.default("w3a6"), steps=2), distillation=Distillation(steps=24, lr=1e-2, checks=4)
)
BEFORE = dataclasses.replace(RECIPE, distillation=None)
LOW_RANK = {"rank": 4, "lr_rank": 0.1}
RELATED = {"relation": Relation(weight=10.0)}
VARIANTS = {"low rank": LOW_RANK, "relations": RELATED, "both": LOW_RANK | RELATED}
VARIED = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


class Normed(nn.Module):
    """Norms, an embedding table, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.layer = nn.LayerNorm(8)
        self.tokens = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.group(self.first(x)) + self.table(t // 100)[:, :, None, None]
        h = nn.functional.silu(self.conv(nn.functional.silu(h)))
        h = self.tokens(self.layer(h.flatten(2).transpose(1, 2))).transpose(1, 2).reshape(h.shape)
        return self.last(h)


pytestmark = pytest.mark.usefixtures("captures_are_shared")


BOTH = pytest.mark.parametrize("model", [Plain, Normed], indirect=True)


@dataclasses.dataclass
class Outcome:
    prepared: GraphModule
    denoiser: dmq_ao.QuantizedDenoiser
    report: dmq_ao.CalibrationReport


def calibrated(model: nn.Module, samples: dmq_ao.CalibrationSet, recipe: Recipe = RECIPE, **given: Any) -> Outcome:
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    report = dmq_ao.calibrate(prepared, samples, progress=False, batch_size=5, **given)
    return Outcome(prepared, dmq_ao.convert(prepared, "reference"), report)


@pytest.fixture(scope="module")
def distilled(model: nn.Module, samples: dmq_ao.CalibrationSet) -> Outcome:
    return calibrated(model, samples)


@pytest.fixture(scope="module")
def before(model: nn.Module, samples: dmq_ao.CalibrationSet) -> Outcome:
    return calibrated(model, samples, BEFORE)


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert_same_records(left.denoiser, right.denoiser)
    assert left.report.distillation == right.report.distillation
    tuned, other = state_of(left.prepared).tuned, state_of(right.prepared).tuned
    assert tuned.keys() == other.keys()
    for name in tuned:
        assert torch.equal(tuned[name], other[name]), name


def error_on_held_out(denoiser: nn.Module, model: nn.Module, samples: dmq_ao.CalibrationSet) -> float:
    held = held_out(len(samples), torch.Generator().manual_seed(0)).nonzero()[:, 0]
    errors = []
    with torch.no_grad():
        for inputs in samples.select(held).batches(1):
            actual, expected = denoiser(**inputs).double(), model(**inputs).double()
            errors.append(float((actual - expected).norm() / expected.norm()))
    return sum(errors) / len(errors)


# --- what it is worth --------------------------------------------------------


@BOTH
def test_held_out_samples_are_closer_and_the_report_says_how_much(
    distilled: Outcome, before: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    report = distilled.report.distillation
    assert report is not None
    assert report.steps == 24
    assert report.after < report.before
    assert error_on_held_out(before.denoiser, model, samples) == pytest.approx(report.before, rel=1e-3)
    assert error_on_held_out(distilled.denoiser, model, samples) == pytest.approx(report.after, rel=1e-3)


@pytest.mark.parametrize("lr", [1.0, 1e3])
def test_a_start_that_is_not_bettered_is_kept(
    lr: float, before: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    recipe = dataclasses.replace(RECIPE, distillation=Distillation(steps=4, lr=lr, checks=1))
    kept = calibrated(model, samples, recipe)
    report = kept.report.distillation
    assert report is not None
    assert report.after == report.before
    with torch.no_grad():
        for inputs in samples.batches(8):
            assert torch.equal(kept.denoiser(**inputs), before.denoiser(**inputs))


@BOTH
def test_codes_and_inputs_stay(distilled: Outcome, before: Outcome) -> None:
    """Those of layers that multiply: tables are learned as floats, and rounded again.

    Codes of a channel whose scale learned its way below zero have changed their sign, and the scale with them.
    """
    moved = 0
    for name in observers(before.prepared):
        layer, other = distilled.denoiser.records[name], before.denoiser.records[name]
        assert bool((layer.weight.scale > 0).all())
        own, theirs = (
            one.codes.int() - one.zero_point.reshape(-1, *[1] * (one.codes.dim() - 1))
            for one in (layer.weight, other.weight)
        )
        mirrored = (own != theirs).flatten(1).any(1)
        assert torch.equal(own[mirrored], -theirs[mirrored])
        assert int(mirrored.sum()) <= 1
        assert torch.equal(layer.weight.zero_point[~mirrored], other.weight.zero_point[~mirrored])
        assert layer.activation is not None
        assert other.activation is not None
        assert torch.equal(layer.activation.scale, other.activation.scale)
        assert torch.equal(layer.activation.zero_point, other.activation.zero_point)
        moved += int((layer.weight.scale != other.weight.scale).sum())
    assert moved > 0


# --- what learns -------------------------------------------------------------


def test_what_stays_in_float_learns() -> None:
    model = seeded(Normed)
    outcome = calibrated(model, plain_samples(model), BEFORE)
    layers = {f"{name}|{what}" for name in ("conv", "tokens") for what in ("scale", "bias")}
    own = ("table.weight", "first.weight", "first.bias", "last.weight", "last.bias")
    norms = ("group.weight", "group.bias", "layer.weight", "layer.bias")
    student = Student(outcome.prepared)
    names = {name.replace("float|denoiser.", "float|") for name in student.parameters}
    assert names == layers | {f"float|{name}" for name in (*own, *norms)}
    for name, parameter in student.parameters.items():
        assert parameter.requires_grad, name
        assert parameter.is_leaf, name
        assert parameter.dtype is torch.float32, name


class Choosing(Normed):
    """A layer whose output only chooses rows of a table, so that no gradient comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(8, 10)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        words = self.choose(self.first(x).mean((2, 3))).argmax(-1)
        return super().forward(x, t) + self.last(self.table(words)[:, :, None, None])


def test_a_layer_without_a_gradient_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Choosing)
    samples = plain_samples(model)
    whole, before = calibrated(model, samples), calibrated(model, samples, BEFORE)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "advance", _interrupted(11))
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, samples, state_dir=tmp_path)
    assert_same_outcome(calibrated(model, samples, state_dir=tmp_path), whole)
    own, theirs = (one.denoiser.records["choose"].weight for one in (whole, before))
    assert torch.equal(own.codes, theirs.codes)
    assert torch.equal(own.scale, theirs.scale)


def test_a_layer_without_any_bias_gets_none() -> None:
    model = seeded(Normed)
    recipe = dataclasses.replace(RECIPE, bias_correction=False)
    outcome = calibrated(model, plain_samples(model), recipe)
    assert outcome.denoiser.records["conv"].bias is None
    assert outcome.denoiser.records["tokens"].bias is not None


@BOTH
def test_the_student_is_the_quantized_denoiser(before: Outcome, samples: dmq_ao.CalibrationSet) -> None:
    student = Student(before.prepared)
    for inputs in samples.batches(6):
        predicted = student.predict(graph_arguments(before.prepared, inputs))
        assert predicted.requires_grad
        torch.testing.assert_close(predicted.detach(), before.denoiser(**inputs), rtol=1e-5, atol=1e-5)


@BOTH
def test_every_parameter_has_a_gradient_and_the_model_none(
    before: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    student = Student(before.prepared)
    inputs = next(iter(samples.batches(16)))
    student.predict(graph_arguments(before.prepared, inputs)).square().sum().backward()
    for name, parameter in student.parameters.items():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name
    assert all(parameter.grad is None for parameter in model.parameters())


@BOTH
def test_the_callers_model_is_untouched(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    kept = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    learns = [parameter.requires_grad for parameter in model.parameters()]
    outcome = calibrated(model, samples)
    assert state_of(outcome.prepared).tuned
    with torch.no_grad():
        outcome.denoiser(**samples.example())
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == kept[name][0]
        assert torch.equal(tensor, kept[name][1]), name
    assert [parameter.requires_grad for parameter in model.parameters()] == learns
    assert all(parameter.grad is None for parameter in model.parameters())


class Told(Plain):
    """Reads a table that all samples share."""

    def forward(self, x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return super().forward(x + table.sum(0)[None, :, None, None], t)


@pytest.mark.parametrize("rows", [5, 16])
def test_an_argument_that_all_samples_share(rows: int) -> None:
    model, table = seeded(Told), torch.randn(rows, 3)
    generator = torch.Generator().manual_seed(0)
    samples = record(
        model, lambda step: model(torch.randn(4, 3, 8, 8, generator=generator), torch.full((4,), step), table)
    )
    assert "table" in samples.shared
    report = calibrated(model, samples).report.distillation
    expected = error_on_held_out(calibrated(model, samples, BEFORE).denoiser, model, samples)
    assert report is not None
    assert report.before == pytest.approx(expected, rel=1e-3)


# --- again -------------------------------------------------------------------


def test_calibrating_again_starts_clean(
    distilled: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = calibrated(model, samples)
    dmq_ao.calibrate(outcome.prepared, samples, progress=False, batch_size=5)
    again = dataclasses.replace(outcome, denoiser=dmq_ao.convert(outcome.prepared, "reference"))
    assert_same_outcome(again, distilled)
    monkeypatch.setattr(module._Run, "advance", _interrupted(0))
    with pytest.raises(KeyboardInterrupt):
        dmq_ao.calibrate(outcome.prepared, samples, progress=False, batch_size=5)
    assert not state_of(outcome.prepared).tuned
    for weight, _ in observers(outcome.prepared).values():
        weight.start()
    assert not any("tuned" in str(key) for key in outcome.prepared.meta)


def test_another_seed_learns_another_state(
    distilled: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    other = calibrated(model, samples, seed=1)
    assert other.report.distillation != distilled.report.distillation


def _interrupted(count: int) -> Callable[[Any], float]:
    advance, done = module._Run.advance, []

    def one(self: Any) -> float:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(self.step)
        return float(advance(self))

    return one


@pytest.mark.parametrize("count", [0, 9, 11, 23])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    count: int,
    distilled: Outcome,
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "advance", _interrupted(count))
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, samples, state_dir=tmp_path)
    saved = count // 10 * 10
    assert (tmp_path / STATE).exists() == (saved > 0)
    monkeypatch.setattr(module._Run, "advance", _interrupted(24 - saved))
    outcome = calibrated(model, samples, state_dir=tmp_path)
    assert outcome.report.resumed
    assert_same_outcome(outcome, distilled)
    monkeypatch.setattr(module._Run, "advance", _interrupted(0))
    assert_same_outcome(calibrated(model, samples, state_dir=tmp_path), distilled)
    dmq_ao.save(outcome.denoiser, tmp_path / "one")
    dmq_ao.save(distilled.denoiser, tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_the_state_is_written(
    at: int,
    distilled: Outcome,
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
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

    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, samples, state_dir=tmp_path)
    assert_same_outcome(calibrated(model, samples, state_dir=tmp_path), distilled)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("keep", [0.0, 0.99])
def test_a_damaged_state_is_named(
    keep: float, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    calibrated(model, samples, state_dir=tmp_path)
    data = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidFile, match="not a state of distillation .*; delete it to start again") as caught:
        calibrated(model, samples, state_dir=tmp_path)
    assert str(tmp_path / STATE) in str(caught.value)


def test_a_state_of_another_run_is_refused(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    calibrated(model, samples, state_dir=tmp_path)
    calibrated(model, samples, seed=1, state_dir=tmp_path / "other")
    (tmp_path / "other" / STATE).replace(tmp_path / STATE)
    with pytest.raises(ValueError, match="belongs to another run: .* delete the folder to start again, or give") as e:
        calibrated(model, samples, state_dir=tmp_path)
    assert str(tmp_path / STATE) in str(e.value)


@pytest.mark.parametrize(
    "given", [{"steps": 0}, {"batch_size": 0}, {"checks": 0}, {"lr": 0.0}, {"rank": -1}, {"lr_rank": 0.0}]
)
def test_what_is_no_distillation(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        Distillation(**given)


# --- codes that move, features that count ------------------------------------


def with_stage(**changes: Any) -> Recipe:
    assert RECIPE.distillation is not None
    return dataclasses.replace(RECIPE, distillation=dataclasses.replace(RECIPE.distillation, **changes))


@pytest.fixture(scope="module")
def windows(model: nn.Module) -> dmq_ao.CalibrationSet:
    """What ``samples`` are, with their trajectories."""
    return plain_samples(model, window=2)


@BOTH
def test_codes_move_and_held_out_samples_are_closer(
    before: Outcome, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    outcome = calibrated(model, samples, with_stage(**LOW_RANK))
    report = outcome.report.distillation
    assert report is not None
    assert report.after < report.before
    assert error_on_held_out(outcome.denoiser, model, samples) == pytest.approx(report.after, rel=1e-3)
    moved = 0
    for name, layer in outcome.denoiser.records.items():
        other = before.denoiser.records[name]
        assert layer.weight.codes.shape == other.weight.codes.shape
        assert layer.weight.codes.dtype is other.weight.codes.dtype
        assert torch.equal(layer.weight.zero_point, other.weight.zero_point)
        moved += int((layer.weight.codes != other.weight.codes).sum())
    assert moved > 0


@BOTH
def test_codes_start_where_they_were_bit_for_bit(before: Outcome, samples: dmq_ao.CalibrationSet) -> None:
    arguments = graph_arguments(before.prepared, samples.example(6))
    fixed, free = Student(before.prepared), Student(before.prepared, rank=4)
    results = [student.predict(arguments) for student in (fixed, free)]
    assert torch.equal(*(result.detach() for result in results))
    for result in results:
        result.square().sum().backward()
    for name, parameter in fixed.parameters.items():
        assert torch.equal(parameter.grad, free.parameters[name].grad), name  # type: ignore[arg-type]
    factors = free.parameters.keys() - fixed.parameters.keys()
    assert {name.rpartition("|")[2] for name in factors} == {"up", "down"}
    for name in factors:
        assert bool(free.parameters[name].grad.any()) == name.endswith("up"), name  # type: ignore[union-attr]


def moved_student(prepared: GraphModule, size: float) -> Student:
    student = Student(prepared, rank=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.parameters.items():
        if name.endswith("|up"):
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return student


@BOTH
def test_the_converted_denoiser_is_the_student_whose_codes_moved(
    model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    prepared = calibrated(model, samples, BEFORE).prepared
    arguments = graph_arguments(prepared, samples.example(6))
    student = moved_student(prepared, 3.0)
    predicted = student.predict(arguments).detach()
    assert not torch.allclose(predicted, Student(prepared).predict(arguments), rtol=0.05)
    student.settle(student.parameters)
    denoiser = dmq_ao.convert(prepared, "reference")
    torch.testing.assert_close(predicted, denoiser(**samples.example(6)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predicted, Student(prepared).predict(arguments).detach(), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("term", ["output", "relations"])
def test_each_term_has_a_gradient_in_the_student_and_none_in_the_teacher(
    term: str, before: Outcome, model: nn.Module, windows: dmq_ao.CalibrationSet
) -> None:
    student = moved_student(before.prepared, 0.5)
    if term == "output":
        arguments = graph_arguments(before.prepared, windows.example(16))
        student.predict(arguments).square().sum().backward()
    else:
        relation, features = related(before.prepared, windows, student)
        chosen = torch.arange(16)
        relation.error(chosen, features(chosen), features).sum().backward()
    # What comes after the features is no part of their relations.
    late = ("last.weight", "last.bias")
    for name, parameter in student.parameters.items():
        if term == "relations" and name.endswith(late):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), name
    assert all(parameter.grad is None for parameter in model.parameters())


def related(
    prepared: GraphModule, samples: dmq_ao.CalibrationSet, student: Student, held: Tensor | None = None, **given: Any
) -> tuple[Relations, Callable[[Tensor], Tensor]]:
    """The relation term over ``samples``, and the student's features of some of them."""
    whole = GraphSamples.of(prepared, samples)
    config = Relation(**given)
    watched = Watched(config, *find_feature_node(prepared, config.tap), samples.earlier(config.window))
    nothing = torch.zeros(len(samples), dtype=torch.bool)
    term = Relations(prepared, watched, whole, nothing if held is None else held, 5)
    return term, lambda chosen: student.predict_with(whole.batch(chosen).arguments, term.node)[1]


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_term_by_hand(window: int, kept_bytes: int, before: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "KEPT_BYTES", kept_bytes)
    model = seeded(Plain)
    samples = plain_samples(model, window=max(window, 2))
    student = Student(before.prepared)
    given = {"weight": 7.0, "window": window, "temperature": 0.3, "tap": "tokens", "reduce": Reduce.SUM}
    term, features = related(before.prepared, samples, student, **given)
    found = term.error(torch.arange(16), features(torch.arange(16)), features)
    seen: list[Tensor] = []
    handle = model.tokens.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    [inputs] = samples.batches(16)
    model(**inputs)
    handle.remove()
    assert samples.trajectory is not None
    ours, expected = features(torch.arange(16)).detach(), torch.zeros(16)
    for row in range(16):
        same = samples.trajectory == samples.trajectory[row]
        steps = [samples.step[row] - back for back in range(window)]
        members = [int(i) for step in steps for i in (same & (samples.step == step)).nonzero()[:, 0]]
        if len(members) == window:
            pair = [x[members].mean(0, keepdim=True) for x in (ours, seen[0])]
            expected[row] = 7 * relation_error(*pair, ch_axis=2, temperature=0.3, reduce=Reduce.SUM)[0]
    assert int((expected > 0).sum()) == 4 * (len(STEPS) + 1 - window)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-6)


def test_windows_hold_no_held_out_sample(before: Outcome, windows: dmq_ao.CalibrationSet) -> None:
    earlier = windows.earlier(2)[:, 0]
    held = torch.zeros(16, dtype=torch.bool)
    held[earlier.max()] = True
    term, features = related(before.prepared, windows, Student(before.prepared), held)
    counts = term.error(torch.arange(16), features(torch.arange(16)), features) > 0
    assert torch.equal(counts, (earlier >= 0) & ~held & ~held[earlier])
    with pytest.raises(ValueError, match="each window of 16 samples holds a sample that is held out"):
        related(before.prepared, windows, Student(before.prepared), torch.ones(16, dtype=torch.bool))


def test_relations_are_learned(before: Outcome, model: nn.Module, windows: dmq_ao.CalibrationSet) -> None:
    outcome = calibrated(model, windows, with_stage(**RELATED))
    report = outcome.report.distillation
    assert report is not None
    assert report.after < report.before
    without = calibrated(model, windows, RECIPE)
    assert without.report.distillation != report

    def error(prepared: GraphModule) -> float:
        student, chosen = Student(prepared), torch.arange(16)
        for target, tensor in state_of(prepared).tuned.items():
            student.parameters[f"float|{target}"].data = tensor
        term, features = related(prepared, windows, student)
        with torch.no_grad():
            return float(term.error(chosen, features(chosen), features).sum())

    assert error(outcome.prepared) < error(without.prepared)
    assert error(outcome.prepared) < error(before.prepared)


@pytest.mark.parametrize(
    ("relation", "message"),
    [
        (Relation(), r"no 2 rows of the samples .* record with select=Selection\(window=2\)"),
        (Relation(window=1, tap="token"), r"tap 'token' is no module of Plain; close ones are \['tokens', "),
    ],
)
def test_what_cannot_be_related_is_refused_before_anything_is_learned(
    relation: Relation, message: str, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(seeded(Plain), samples, with_stage(relation=relation), state_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_window_of_one_needs_no_trajectories(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    report = calibrated(model, samples, with_stage(relation=Relation(window=1))).report.distillation
    assert report is not None
    assert report.after < report.before


@VARIED
@pytest.mark.parametrize("count", [pytest.param(9, marks=pytest.mark.slow), 11])
def test_an_interrupted_run_of_any_kind_ends_the_same(
    count: int,
    variant: dict[str, Any],
    model: nn.Module,
    windows: dmq_ao.CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = with_stage(**variant)
    uninterrupted = calibrated(model, windows, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "advance", _interrupted(count))
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, windows, recipe, state_dir=tmp_path)
    outcome = calibrated(model, windows, recipe, state_dir=tmp_path)
    assert_same_outcome(outcome, uninterrupted)
    dmq_ao.save(outcome.denoiser, tmp_path / "one")
    dmq_ao.save(uninterrupted.denoiser, tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@VARIED
def test_recipes_of_any_kind_are_read_as_they_were_written(variant: dict[str, Any]) -> None:
    recipe = with_stage(**variant)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0.0}, "weight and temperature must be positive, got 0.0 and 1.0"),
        ({"temperature": float("inf")}, "weight and temperature must be positive, got 100.0 and inf"),
        ({"window": 0}, "window must be 1 or more, got 0"),
    ],
)
def test_what_is_no_relation(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relation(**given)


def test_many_samples_take_more_steps() -> None:
    config = Distillation(steps=20, passes=2, batch_size=4)
    assert [config.steps_of(samples) for samples in (1, 40, 41, 400)] == [20, 20, 21, 200]
    assert Distillation(steps=20).steps_of(10_000) == 20
