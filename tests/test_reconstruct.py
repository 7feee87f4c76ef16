"""Layer by layer to the same bytes: on two backends, from files, after any interruption."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import (
    Plain,
    assert_same_records,
    contents,
    flow,
    graph_arguments,
    plain_samples,
    record,
    relative,
    seeded,
    small,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao.algorithms.layerwise import units_of
from dmq_ao.algorithms.weights import WeightLearning
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.config import (
    ChannelScaling,
    Distillation,
    InvalidFile,
    Ranges,
    Recipe,
    Rounding,
    RoundingMethod,
    StepWeights,
)
from dmq_ao.quantizer.prepared import observers
from dmq_ao.serialization import checkpoint as state

minmax, dmq, default = dmq_ao.recipes.minmax, dmq_ao.recipes.dmq, dmq_ao.recipes.default
MODELS = ["plain", "tiny_unet2d"]
PUBLISHED = {"dmq": small(dmq("w4a8"), 4), "default": small(default("w4a8"), 4)}
LEARNING = {
    "static": small(dataclasses.replace(minmax("w8a8"), scaling=ChannelScaling(), bias_correction=True)),
    "dynamic": small(dataclasses.replace(minmax("w4a8", ranges=Ranges.DYNAMIC), scaling=ChannelScaling())),
    "weights only": small(dataclasses.replace(minmax("w4a16"), rounding=Rounding(), bias_correction=True)),
    "groups": small(dataclasses.replace(minmax("w4a8", group_size=8), rounding=Rounding())),
    "one layer": dataclasses.replace(minmax("w4a8"), scaling=ChannelScaling(("tokens",), steps=0)),
    "bias": dataclasses.replace(minmax("w4a8"), bias_correction=True),
    "float inputs": small(
        dataclasses.replace(
            minmax("w4a8"),
            rounding=Rounding(RoundingMethod.ADAROUND, propagate_error=False, step_weights=StepWeights(gamma=2.0)),
        )
    ),
}
HAS_ONEDNN = not ALL_BACKENDS["onednn"].unsupported({})
BACKENDS = ["onednn", "reference"] if HAS_ONEDNN else ["reference", "reference"]


pytestmark = pytest.mark.usefixtures("captures_are_shared")


@dataclasses.dataclass
class Given:
    """A model, samples of it, and what is prepared and calibrated by each published recipe."""

    model: nn.Module
    samples: dmq_ao.CalibrationSet
    prepared: dict[str, GraphModule]
    reports: dict[str, dmq_ao.CalibrationReport]


@pytest.fixture(scope="module")
def tables(request: pytest.FixtureRequest) -> Callable[[str], Given]:
    found: dict[str, Given] = {}

    def of(name: str) -> Given:
        if name not in found:
            if name == "plain":
                model = seeded(Plain)
                samples = plain_samples(model)
            else:
                model, example = request.getfixturevalue(name)
                samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}), 8)
            found[name] = Given(model, samples, {}, {})
        return found[name]

    return of


@pytest.fixture
def given(request: pytest.FixtureRequest, tables: Callable[[str], Given]) -> Given:
    return tables(request.param)


def calibrated(given: Given, recipe: str) -> GraphModule:
    if recipe not in given.prepared:
        given.prepared[recipe] = prepared = dmq_ao.prepare(given.model, PUBLISHED[recipe], given.samples.example())
        given.reports[recipe] = dmq_ao.calibrate(prepared, given.samples, progress=False)
    return given.prepared[recipe]


def output(denoiser: nn.Module, samples: dmq_ao.CalibrationSet) -> Tensor:
    with torch.no_grad():
        result = denoiser(**samples.example(4))
    return result if isinstance(result, Tensor) else result.sample


# --- the flow ----------------------------------------------------------------


@pytest.mark.parametrize("given", MODELS, indirect=True)
@pytest.mark.parametrize(("recipe", "backend"), list(zip(PUBLISHED, BACKENDS, strict=True)), ids=PUBLISHED)
def test_published_recipes_are_saved_and_loaded(backend: str, recipe: str, given: Given, tmp_path: Path) -> None:
    prepared = calibrated(given, recipe)
    saved, reference = (dmq_ao.convert(prepared, name) for name in (backend, "reference"))
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=given.model, backend=backend)
    assert_same_records(loaded, saved)
    assert_same_records(reference, saved)
    assert loaded.recipe == saved.recipe
    assert torch.equal(output(loaded, given.samples), output(saved, given.samples))
    noise = relative(output(reference, given.samples), output(given.model, given.samples))
    assert noise < 0.2
    # A code that falls on a tie may differ between the two, and the layers after it with it.
    assert relative(output(saved, given.samples), output(reference, given.samples)) < noise / 4
    layers = given.reports[recipe].layers
    assert layers.keys() == saved.records.keys()
    for name, layer in saved.records.items():
        assert layer.bias is not None
        assert layers[name].rounded_error <= layers[name].nearest_error
        gain = layers[name].scale_gain
        assert gain is not None
        assert gain <= 1
        assert (gain < 1) == (layer.activation is not None and layer.activation.channel_scale is not None)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "reference") for name in LEARNING] + [(n, "onednn") for n in ("static", "dynamic") if HAS_ONEDNN],
)
def test_every_part_of_a_recipe_works_alone(
    name: str, backend: str, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    recipe = LEARNING[name]
    saved, report = flow(model, recipe, samples, backend)
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=model, backend=backend)
    assert_same_records(loaded, saved)
    assert torch.equal(output(loaded, samples), output(saved, samples))
    assert relative(output(saved, samples), output(model, samples)) < 0.2
    assert report.layers.keys() == saved.records.keys()


def test_learning_comes_closer_than_rounding_to_nearest(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    errors = {
        recipe.name: relative(output(flow(model, recipe, samples)[0], samples), output(model, samples))
        for recipe in (minmax("w3a8", ranges=Ranges.PER_STEP), small(dmq("w3a8"), 60), small(default("w3a8"), 60))
    }
    assert errors["default"] < errors["dmq"] < errors["minmax"]


def test_what_the_graph_computes_is_not_changed(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, PUBLISHED["default"], samples.example(), backend="reference")
    arguments = graph_arguments(prepared, samples.example())
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = prepared(*arguments)
    dmq_ao.calibrate(prepared, samples, progress=False)
    dmq_ao.convert(prepared, "reference")
    with torch.no_grad():
        assert torch.equal(prepared(*arguments), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_a_scale_is_the_same_layer(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = dataclasses.replace(minmax("w8a8"), scaling=ChannelScaling(steps=4))
    saved, _ = flow(model, recipe, samples)
    weights, found = dict(model.named_parameters()), 0
    for name in ("conv", "tokens"):
        layer = saved.records[name]
        assert layer.activation is not None
        scale = layer.activation.channel_scale
        if scale is not None:
            found += 1
            folded = weights[f"{name}.weight"] * scale.reshape(1, -1, *[1] * (layer.weight.codes.dim() - 2))
            step = layer.weight.scale.reshape(-1, *[1] * (layer.weight.codes.dim() - 1))
            assert bool(((layer.weight.dequantize() - folded).abs() <= 0.5001 * step).all())
    assert found


def test_corrected_biases_take_the_mean_error_out(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    shifts = []
    for corrects in (True, False):
        recipe = dataclasses.replace(minmax("w3a8"), bias_correction=corrects, rounding=Rounding(positions=64))
        denoiser, _ = flow(model, recipe, samples)
        hidden: list[Tensor] = []
        for one in (denoiser, model):
            with torch.no_grad():
                hidden.append(torch.cat([one(**inputs).mean((0, 2, 3)) for inputs in samples.batches(16)]))
        shifts.append(float((hidden[0] - hidden[1]).norm()))
    assert shifts[0] < shifts[1]


# --- units -------------------------------------------------------------------


def test_parts_of_a_split_layer_are_one_unit(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, PUBLISHED["dmq"], samples.example(), backend="reference")
    units = units_of(prepared)
    assert [unit.layers for unit in units] == [("conv",), ("tokens",), ("merge.part0", "merge.part1")]
    assert [unit.index for unit in units] == [0, 1, 2]


class Far(Plain):
    """A part of the split layer reads what a layer far above reads."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.first(x)
        vector = self.time(t.to(x.dtype)[:, None] / 1000)
        h = nn.functional.silu(self.conv(skip) + vector[:, :, None, None])
        h = self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(skip.shape)
        return self.last(nn.functional.silu(self.merge(torch.cat([h, skip], 1))))


def test_a_part_that_shares_its_input_with_a_layer_above_is_decided_there(tmp_path: Path) -> None:
    model = seeded(Far)
    samples = plain_samples(model)
    recipe = dmq_ao.recipes.default("w8a8")
    prepared = dmq_ao.prepare(model, recipe, samples.example())
    layers = [set(unit.layers) for unit in units_of(prepared)]
    assert layers == [{"time"}, {"conv", "merge.part1"}, {"tokens"}, {"merge.part0"}]
    report = dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
    again = dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
    assert not report.resumed
    assert again.resumed
    assert set(report.layers) == set(again.layers) == {"time", "conv", "tokens", "merge.part0", "merge.part1"}


@pytest.mark.parametrize("given", ["tiny_unet2d"], indirect=True)
def test_siblings_are_one_unit_and_share_their_scale(given: Given) -> None:
    prepared = calibrated(given, "dmq")
    units = units_of(prepared)
    names = [name for unit in units for name in unit.layers]
    assert sorted(names) == sorted(observers(prepared))
    assert len(set(names)) == len(names)
    queries = [unit for unit in units if any(name.endswith("to_q") for name in unit.layers)]
    assert queries
    records = dmq_ao.convert(prepared, "reference").records
    scaled = 0
    for unit in queries:
        assert [name.rpartition(".")[2] for name in unit.layers] == ["to_q", "to_k", "to_v"]
        first, *others = (records[name].activation for name in unit.layers)
        assert first is not None
        for other in others:
            assert other is not None
            assert torch.equal(first.scale, other.scale)
            assert (first.channel_scale is None) == (other.channel_scale is None)
            if first.channel_scale is not None:
                assert torch.equal(first.channel_scale, other.channel_scale)
        scaled += first.channel_scale is not None
    assert scaled
    for unit in units:
        parts = [name for name in unit.layers if ".part" in name]
        assert not parts or parts == [f"{parts[0][:-1]}{i}" for i in range(len(parts))]
        assert len(parts) != 1
    assert any(".part" in name for name in names)


# --- the same bytes ----------------------------------------------------------


@pytest.fixture(scope="module", params=PUBLISHED)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return PUBLISHED[request.param]


def units_by(recipe: Recipe) -> list[list[str]]:
    """The layers that the recipe decides together, in order: embeddings too, unless they stay in float."""
    units = [["conv"], ["tokens"], ["merge.part0", "merge.part1"]]
    return units if "@embedding" in recipe.config.keep_float else [["time"], *units]


def run(model: nn.Module, recipe: Recipe, samples: dmq_ao.CalibrationSet, **options: Any) -> Any:
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    report = dmq_ao.calibrate(prepared, samples, progress=False, **options)
    return dmq_ao.convert(prepared, "reference"), report


def written(denoiser: dmq_ao.QuantizedDenoiser, folder: Path) -> dict[str, bytes]:
    dmq_ao.save(denoiser, folder)
    return contents(folder)


@pytest.fixture(scope="module")
def expected(
    recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    return written(run(model, recipe, samples)[0], tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("max_memory", [None, 0])
def test_two_runs_give_the_same_bytes(
    max_memory: int | None,
    recipe: Recipe,
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    torch.manual_seed(1234)
    denoiser, report = run(model, recipe, samples, max_memory=max_memory, state_dir=state)
    assert not report.resumed
    assert written(denoiser, tmp_path / "out") == expected
    files = {"distillation.safetensors"} if recipe.distillation else set()
    files |= {"sensitivity.safetensors"} if recipe.protection else set()
    files |= {"bits.safetensors"} if recipe.allocation else set()
    found = {name for name in contents(state) if name.endswith(".safetensors")}
    assert found == files | {f"units/{i:04d}.safetensors" for i in range(len(units_by(recipe)))}
    again, report = run(model, recipe, samples, state_dir=str(state))
    assert report.resumed
    assert written(again, tmp_path / "again") == expected


@pytest.mark.parametrize("count", range(3))
def test_an_interrupted_run_goes_on_and_ends_the_same(
    count: int,
    recipe: Recipe,
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[Path] = []

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.parent.name == "units":
            if len(saved) == count:
                path.write_bytes(b"half a file")
                raise KeyboardInterrupt
            saved.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", half)
        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, samples, state_dir=tmp_path / "state")
    decided: list[str] = []
    decide = WeightLearning.decide
    monkeypatch.setattr(
        WeightLearning,
        "decide",
        lambda self, name, *rest: (decided.append(name), decide(self, name, *rest))[1],
    )
    denoiser, report = run(model, recipe, samples, state_dir=tmp_path / "state")
    assert report.resumed == (count > 0)
    units = units_by(recipe)
    assert decided == sum(units[count:], [])
    assert set(report.votes) == {"merge.part0", "merge.part1"}
    assert report.layers.keys() == set(sum(units, []))
    assert written(denoiser, tmp_path / "out") == expected
    assert not list((tmp_path / "state").rglob("*.partial"))


def test_a_resumed_report_is_that_of_the_whole_run(
    recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    first = run(model, recipe, samples, state_dir=tmp_path)[1]
    again = run(model, recipe, samples, state_dir=tmp_path)[1]
    for name in ("sqnr_db", "votes", "layers", "distillation", "samples"):
        assert getattr(again, name) == getattr(first, name), name


def test_layers_whose_names_only_look_like_parts_are_units_of_their_own(samples: dmq_ao.CalibrationSet) -> None:
    class Nested(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"particle": self.conv, "partial": self.tokens})

    prepared = dmq_ao.prepare(seeded(Nested), LEARNING["bias"], samples.example(), backend="reference")
    units = [unit.layers for unit in units_of(prepared)]
    assert ("inner.particle",) in units
    assert ("inner.partial",) in units
    assert ("merge.part0", "merge.part1") in units


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_damaged_unit_is_named(
    keep: float, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    run(model, LEARNING["bias"], samples, state_dir=tmp_path)
    file = tmp_path / "units" / "0001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidFile, match="not a unit of a calibration .*; delete it to start again") as caught:
        run(model, LEARNING["bias"], samples, state_dir=tmp_path)
    assert str(file) in str(caught.value)
    file.unlink()
    assert run(model, LEARNING["bias"], samples, state_dir=tmp_path)[1].resumed


def test_a_foreign_file_in_the_place_of_a_unit(
    model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    (tmp_path / "units").mkdir()
    save_file({"weight": torch.zeros(3)}, tmp_path / "units" / "0000.safetensors", {"format": "pt"})
    with pytest.raises(InvalidFile, match="not a unit of a calibration"):
        run(model, LEARNING["bias"], samples, state_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"scaling": ChannelScaling(steps=0)}, {}),
        ({"rounding": Rounding()}, {}),
        ({"distillation": Distillation(steps=1)}, {}),
        ({"config": minmax("w3a8").config}, {}),
        ({}, {"seed": 1}),
        ({}, {"batch_size": 3}),
    ],
    ids=["scaling", "rounding", "distillation", "bits", "seed", "batch size"],
)
def test_the_units_of_another_run_are_refused(
    changes: dict[str, Any],
    options: dict[str, int],
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
    tmp_path: Path,
) -> None:
    run(model, LEARNING["bias"], samples, state_dir=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: .* delete the folder to start again, or give"):
        run(model, dataclasses.replace(LEARNING["bias"], **changes), samples, state_dir=tmp_path, **options)
    assert contents(tmp_path) == before


def test_other_weights_are_another_run(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    run(model, LEARNING["bias"], samples, state_dir=tmp_path)
    other = seeded(Plain)
    with torch.no_grad():
        other.merge.weight[15, 31] += 1
    with pytest.raises(ValueError, match="belongs to another run"):
        run(other, LEARNING["bias"], samples, state_dir=tmp_path)


@pytest.mark.parametrize("place", ["weight", "input"])
def test_what_is_not_finite_names_its_layer(place: str, samples: dmq_ao.CalibrationSet) -> None:
    broken = seeded(Plain)
    with torch.no_grad():
        (broken.tokens.weight if place == "weight" else broken.first.bias)[3] = float("nan")
    message = "tokens: its weight holds NaN" if place == "weight" else "conv: its input holds NaN"
    with pytest.raises(ValueError, match=message):
        run(broken, dataclasses.replace(minmax("w4a8"), bias_correction=True), samples)


@pytest.mark.parametrize("trials", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_the_same(trials: int, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(worker), str(tmp_path), str(trials), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    finished, kills, resumed = map(int, done.stdout.split())
    assert finished == trials
    assert kills >= trials
    assert resumed > 0
