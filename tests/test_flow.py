"""The public words end to end, on tiny real denoisers: record, prepare, calibrate, convert, call."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, assert_same_records, flow, plain_samples, record, relative, seeded
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import dmq_ao
from dmq_ao import graph
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.config import MissingStatistics, Override, PowerOfTwo, Ranges, Recipe, TensorConfig
from dmq_ao.quantizer.prepared import Prepared, state_of

Inputs = dict[str, Any]
MODELS = ("tiny_unet2d", "tiny_unet2d_condition", "tiny_dit")
BACKENDS = [
    "reference",
    pytest.param(
        "onednn",
        marks=pytest.mark.skipif(
            bool(ALL_BACKENDS["onednn"].unsupported({})), reason="this PyTorch has no oneDNN int8 kernels"
        ),
    ),
]


pytestmark = pytest.mark.usefixtures("captures_are_shared")


class Blind(nn.Module):
    """Does not look at its timestep: what a timestep changes, its table of ranges changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)) + 0 * t[:, None])


class TextFirst(nn.Module):
    """A layer reads an argument that stands before the timestep, and one that stands after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.text, self.after, self.middle, self.last = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor, text: Tensor, t: Tensor, late: Tensor) -> Tensor:
        h = self.first(x) + self.text(text).mean(1) + self.after(late).mean(1) + t[:, None] / 1000
        return self.last(self.middle(h.relu()).relu())


@dataclasses.dataclass
class Quantized:
    """One of the tiny models, quantized to w8a8 with ranges per step and votes."""

    model: nn.Module
    example: Inputs
    samples: dmq_ao.CalibrationSet
    prepared: GraphModule
    report: dmq_ao.CalibrationReport
    by_backend: dict[str, dmq_ao.QuantizedDenoiser]
    before: dict[str, Tensor]
    output_before: Tensor


RECIPE = dmq_ao.recipes.minmax("w8a8", ranges=Ranges.PER_STEP, power_of_two=True)


@pytest.fixture(scope="module", params=MODELS)
def quantized(request: pytest.FixtureRequest) -> Quantized:
    model, example = request.getfixturevalue(request.param)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        output = model(**example).sample

    def call(step: int) -> None:
        torch.manual_seed(step)
        inputs = {name: torch.randn(4, *x.shape[1:]) if x.is_floating_point() else x for name, x in example.items()}
        labels = {"class_labels": torch.arange(4)} if "class_labels" in example else {}
        model(**inputs | labels | {"timestep": torch.tensor(step).expand(4)})

    samples = record(model, call)
    prepared = dmq_ao.prepare(model, RECIPE, samples.example())
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    on_cpu = ("reference", "onednn")
    names = [name for name in on_cpu if not ALL_BACKENDS[name].unsupported(state_of(prepared).plan)]
    by_backend = {name: dmq_ao.convert(prepared, name) for name in names}
    return Quantized(model, example, samples, prepared, report, by_backend, before, output)


# --- calls -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantized_denoiser_answers_as_the_original(quantized: Quantized, backend: str) -> None:
    denoiser = quantized.by_backend[backend]
    with torch.no_grad():
        expected = quantized.model(**quantized.example)
        actual = denoiser(**quantized.example)
    assert type(actual) is type(expected)
    assert actual.sample.dtype == expected.sample.dtype
    assert 0 < relative(actual.sample, expected.sample) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_of_calling_gives_the_same(quantized: Quantized, backend: str) -> None:
    denoiser, example = quantized.by_backend[backend], quantized.example
    names = [name for name in denoiser.signature.parameters if name in example]
    expected = denoiser(**example).sample
    assert torch.equal(denoiser(*[example[name] for name in names]).sample, expected)
    first, rest = names[0], {name: example[name] for name in names[1:]}
    assert torch.equal(denoiser(example[first], **rest).sample, expected)
    as_tuple = denoiser(**example, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected)
    assert torch.equal(denoiser(**example, return_dict=True).sample, expected)
    place = denoiser.signature.parameters.index("return_dict")
    before = [example.get(name) for name in denoiser.signature.parameters[:place]]
    assert type(denoiser(*before, False)) is tuple
    assert type(denoiser(*before, True)) is type(denoiser(**example))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("timestep", [600, torch.tensor(600), torch.tensor([600]), torch.tensor(600.0), 600.0])
def test_every_form_of_timestep_gives_the_same(quantized: Quantized, backend: str, timestep: Any) -> None:
    denoiser, example = quantized.by_backend[backend], quantized.example
    expected = denoiser(**example | {"timestep": torch.tensor([600, 600])}).sample
    assert torch.equal(denoiser(**example | {"timestep": timestep}).sample, expected)
    other = denoiser(**example | {"timestep": torch.tensor([0, 0])}).sample
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fractional_timestep_is_not_cut_off(quantized: Quantized, backend: str) -> None:
    denoiser, example = quantized.by_backend[backend], quantized.example
    with torch.no_grad():
        expected = quantized.model(**example | {"timestep": torch.tensor([600.25, 600.25])}).sample
        actual = denoiser(**example | {"timestep": 600.25}).sample
        whole = denoiser(**example | {"timestep": 600}).sample
    assert relative(actual, expected) < 0.1
    assert not torch.equal(actual, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_other_batches(quantized: Quantized, backend: str, batch: int) -> None:
    denoiser, example = quantized.by_backend[backend], quantized.example
    rows = [index % 2 for index in range(batch)]
    inputs = {name: value[rows] for name, value in example.items()}
    with torch.no_grad():
        whole, part = denoiser(**example).sample, denoiser(**inputs).sample
    # Kernels for another batch add in another order, and a last bit of float32 moves a code now and then.
    assert relative(part, whole[rows]) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_resolutions_and_token_counts(quantized: Quantized, backend: str) -> None:
    denoiser = quantized.by_backend[backend]
    torch.manual_seed(1)
    inputs = dict(quantized.example)
    name = denoiser.signature.batch
    inputs[name] = torch.randn(2, inputs[name].shape[1], 24, 16)
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"] = torch.randn(2, 11, 24)
    if type(quantized.model).__name__ == "DiTTransformer2DModel":  # its own code fixes the size
        with pytest.raises(ValueError, match=r"shapes .*\(2, 4, 24, 16\).* do not fit the exported graph"):
            denoiser(**inputs)
        return
    with torch.no_grad():
        expected = quantized.model(**inputs).sample
        assert relative(denoiser(**inputs).sample, expected) < 0.1


def test_wrong_calls_say_what_the_denoiser_takes(quantized: Quantized) -> None:
    denoiser, example = quantized.by_backend["reference"], quantized.example
    name = denoiser.signature.batch
    with pytest.raises(TypeError, match=rf"missing argument {name!r}; this quantized denoiser takes \['{name}', 't"):
        denoiser(**{key: value for key, value in example.items() if key != name})
    with pytest.raises(TypeError, match="argument 'extra' was not among the example inputs"):
        denoiser(**example, extra=torch.zeros(2))
    with pytest.raises(TypeError, match=rf"argument {name!r} must be torch.float32, got torch.bool"):
        denoiser(**example | {name: example[name] > 0})
    with pytest.raises(ValueError, match=r"do not fit the exported graph"):
        denoiser(**example | {name: torch.randn(2, 5, 16, 16)})


# --- what callers read -------------------------------------------------------


def test_attributes_are_those_of_the_original(quantized: Quantized) -> None:
    for denoiser in quantized.by_backend.values():
        assert denoiser.config == quantized.model.config
        assert denoiser.config.in_channels == quantized.model.config.in_channels
        assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
        assert not denoiser.training
        assert denoiser.eval() is denoiser
        assert not any(p.requires_grad for p in denoiser.parameters())
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = denoiser.no_such_thing


def test_submodules_that_pipelines_look_into_are_there(tiny_unet2d_condition: tuple[nn.Module, Inputs]) -> None:
    model, example = tiny_unet2d_condition
    prepared = dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a16"), example)
    denoiser = dmq_ao.convert(prepared, "reference")
    assert denoiser.time_embedding.linear_1.in_features == model.time_embedding.linear_1.in_features
    assert denoiser.conv_in.weight.is_meta
    assert denoiser.config.time_cond_proj_dim is None


def test_it_stays_in_its_dtype_and_on_its_device(quantized: Quantized) -> None:
    for denoiser in quantized.by_backend.values():
        assert denoiser.to("cpu") is denoiser
        assert denoiser.to(torch.float32) is denoiser
        with pytest.raises(TypeError, match="stays torch.float32 on cpu, asked for torch.float16"):
            denoiser.half()


def test_it_names_every_layer_of_the_original(quantized: Quantized) -> None:
    modules = set(dict(quantized.model.named_modules()))
    for denoiser in quantized.by_backend.values():
        whole = {name.partition(".part")[0].partition("#")[0] for name in denoiser.plan}
        assert whole <= modules
        assert set(denoiser.records) == {name for name, item in denoiser.plan.items() if item.weight is not None}
        assert set(denoiser.kernels) == set(denoiser.records)
        assert set(denoiser.records) == set(quantized.report.sqnr_db)
        assert set(graph.layer_nodes(quantized.prepared)) == set(denoiser.plan)
        assert all(denoiser.plan[name].why for name in set(denoiser.plan) - set(denoiser.records))


def test_split_layers_vote_each(quantized: Quantized) -> None:
    parts = [name for name in quantized.report.sqnr_db if ".part" in name]
    if type(quantized.model).__name__ == "DiTTransformer2DModel":
        assert parts == []
        assert quantized.report.votes == {}
        return
    assert len(parts) == 2 * sum(name.endswith(".part0") for name in parts) >= 6
    assert set(quantized.report.votes) == set(parts)
    for name in parts:
        exponents = quantized.by_backend["reference"].records[name].activation.exponents
        votes = quantized.report.votes[name]
        assert {int(e): int((exponents == e).sum()) for e in exponents.unique()} == votes.channels


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_float_weight_of_a_quantized_layer_is_kept(quantized: Quantized, backend: str) -> None:
    denoiser = quantized.by_backend[backend]
    kept = {f"{name}.weight" for name in denoiser.records}
    assert not kept & set(denoiser.float_tensors)
    held = [*denoiser.graph_module.parameters(), *denoiser.graph_module.buffers()]
    floats = {tuple(x.shape) for x in held if x.is_floating_point() and x.dim() > 1}
    whole = {tuple(record.weight.codes.shape) for record in denoiser.records.values()}
    originals = {tuple(x.shape) for x in denoiser.float_tensors.values()}
    assert not (whole - originals) & floats


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")
def test_onednn_runs_every_quantized_layer_on_integers(quantized: Quantized) -> None:
    kernels = quantized.by_backend["onednn"].kernels
    assert kernels
    assert all(kernel.is_integer for kernel in kernels.values())
    both = [quantized.by_backend[name](**quantized.example).sample for name in ("onednn", "reference")]
    assert relative(*both) < 0.05


# --- what is left alone ------------------------------------------------------


def test_the_denoiser_handed_in_is_not_changed(quantized: Quantized) -> None:
    model = quantized.model
    assert not model.training
    assert not model._forward_pre_hooks
    now = model.state_dict()
    assert now.keys() == quantized.before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in quantized.before.items())
    with torch.no_grad():
        assert torch.equal(model(**quantized.example).sample, quantized.output_before)


def test_one_prepared_graph_converts_again_and_again(quantized: Quantized) -> None:
    expected = quantized.by_backend["reference"](**quantized.example).sample
    again = dmq_ao.convert(quantized.prepared, "reference")
    assert torch.equal(again(**quantized.example).sample, expected)
    assert_same_records(again, quantized.by_backend["reference"])


def test_calibrating_again_starts_clean() -> None:
    model = seeded(Plain)
    first, second = plain_samples(model, seed=0), plain_samples(model, seed=1)
    recipe = dmq_ao.recipes.minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True)
    prepared = dmq_ao.prepare(model, recipe, first.example())
    one = dmq_ao.calibrate(prepared, first, progress=False)
    dmq_ao.convert(prepared, "reference")
    with torch.no_grad():
        model.conv.weight[0] *= 2  # the prepared graph reads the model's own weights
    two = dmq_ao.calibrate(prepared, second, progress=False)
    assert one.sqnr_db != two.sqnr_db
    fresh, report = flow(model, recipe, second)
    assert two.sqnr_db == report.sqnr_db
    assert_same_records(dmq_ao.convert(prepared, "reference"), fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bytes(backend: str, tmp_path: Path) -> None:
    recipe = dmq_ao.recipes.minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True, observer="mse")
    for seed, run in enumerate(("one", "two")):
        model = seeded(Plain)
        torch.manual_seed(seed)
        denoiser, _ = flow(model, recipe, plain_samples(model), backend)
        dmq_ao.save(denoiser, tmp_path / run)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()} for run in ("one", "two"))
    assert len(one) == 4
    assert one == two


def test_randomness_is_neither_used_nor_moved() -> None:
    model = seeded(Plain)
    samples = plain_samples(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flow(model, RECIPE, samples)
    assert torch.equal(torch.rand(3), expected)


# --- how good ----------------------------------------------------------------


def test_w8a8_layers_lose_little(quantized: Quantized) -> None:
    worst = min(quantized.report.sqnr_db, key=quantized.report.sqnr_db.__getitem__)
    assert quantized.report.sqnr_db[worst] > 30, worst


def test_w4a8_layers_lose_more_but_not_much(quantized: Quantized) -> None:
    recipe = dmq_ao.recipes.minmax("w4a8", ranges=Ranges.PER_STEP)
    denoiser, report = flow(quantized.model, recipe, quantized.samples)
    worst = min(report.sqnr_db, key=report.sqnr_db.__getitem__)
    assert 12 < report.sqnr_db[worst] < 30, worst
    with torch.no_grad():
        error = relative(denoiser(**quantized.example).sample, quantized.model(**quantized.example).sample)
        eight_bits = quantized.by_backend["reference"](**quantized.example).sample
        assert relative(eight_bits, quantized.model(**quantized.example).sample) < error < 0.5


@pytest.mark.parametrize("schemes", [("w2a8", "w3a8", "w4a8", "w6a8", "w8a8"), ("w8a3", "w8a4", "w8a6", "w8a8")])
def test_more_bits_mean_less_error(schemes: tuple[str, ...]) -> None:
    model = seeded(Plain)
    samples = plain_samples(model)
    inputs = next(iter(samples.batches(16)))
    errors = []
    with torch.no_grad():
        expected = model(**inputs)
        for scheme in schemes:
            denoiser, _ = flow(model, dmq_ao.recipes.minmax(scheme), samples)
            errors.append(relative(denoiser(**inputs), expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 < errors[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranges", list(Ranges))
def test_half_precision(backend: str, dtype: torch.dtype, ranges: Ranges) -> None:
    model = seeded(Plain)
    inputs = {"x": torch.randn(3, 3, 8, 8), "t": torch.tensor([900, 300, 0])}
    with torch.no_grad():
        expected = model(**inputs)
    half = seeded(Plain).to(dtype)
    recipe = dmq_ao.recipes.minmax("w8a8", ranges=ranges, power_of_two=True)
    denoiser, _ = flow(half, recipe, plain_samples(half, dtype=dtype), backend)
    actual = denoiser(inputs["x"].to(dtype), inputs["t"])
    assert (actual.dtype, denoiser.dtype) == (dtype, dtype)
    assert relative(actual, expected) < 0.05
    assert all(record.weight.scale.dtype is torch.float32 for record in denoiser.records.values())


def test_a_real_model_in_bfloat16(tiny_dit: tuple[nn.Module, Inputs]) -> None:
    model = copy.deepcopy(tiny_dit[0]).to(torch.bfloat16)
    example = {n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in tiny_dit[1].items()}
    samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}))
    prepared = dmq_ao.prepare(model, RECIPE, samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    with torch.no_grad():
        expected = tiny_dit[0](**tiny_dit[1]).sample
        for backend in ("reference", "auto"):
            actual = dmq_ao.convert(prepared, backend)(**example).sample
            assert actual.dtype is torch.bfloat16
            assert relative(actual, expected) < 0.2


# --- ranges per step ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timestep_that_calibration_never_saw_uses_the_nearest_row(backend: str) -> None:
    model = seeded(Blind)
    generator = torch.Generator().manual_seed(0)

    def call(step: int) -> None:
        model(torch.randn(4, 8, generator=generator) * (1 + step / 300), torch.full((4,), step))

    denoiser, _ = flow(model, dmq_ao.recipes.minmax("w8a8", ranges=Ranges.PER_STEP), record(model, call), backend)
    assert denoiser.records["middle"].activation.timesteps.tolist() == sorted(STEPS, reverse=True)
    x = torch.randn(2, 8)
    rows = {step: denoiser(x, step) for step in STEPS}
    assert len({tuple(row.flatten().tolist()) for row in rows.values()}) == len(STEPS)
    for unseen, nearest in ((2000, 900), (751, 900), (749, 600), (140, 0), (1, 0)):
        assert torch.equal(denoiser(x, unseen), rows[nearest]), unseen
    mixed = denoiser(x, torch.tensor([899, 2]))
    assert torch.equal(mixed, torch.stack([rows[900][0], rows[0][1]]))


def test_layers_that_read_an_argument_before_or_after_the_timestep() -> None:
    model = seeded(TextFirst)

    def inputs(step: int) -> Inputs:
        shapes = {"x": (3, 8), "text": (3, 5, 8), "late": (3, 4, 8)}
        return {name: torch.randn(shape) for name, shape in shapes.items()} | {"t": torch.full((3,), step)}

    samples = record(model, lambda step: model(**inputs(step)))
    prepared = dmq_ao.prepare(model, RECIPE, samples.example())
    prepared.graph.lint()
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    assert set(report.sqnr_db) == {"text", "after", "middle"}
    for backend in ("reference", "auto"):
        denoiser = dmq_ao.convert(prepared, backend)
        denoiser.graph_module.graph.lint()
        called = inputs(300)
        assert relative(denoiser(**called), model(**called)) < 0.05


def test_ranges_per_step_need_a_timestep() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with pytest.raises(ValueError, match="per_step ranges need the timestep, .* name it with timestep_arg="):
        dmq_ao.prepare(model, RECIPE, (torch.randn(2, 4),))
    dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a8"), (torch.randn(2, 4),))


# --- the quantizer alone -----------------------------------------------------


@pytest.mark.parametrize("ranges", [Ranges.STATIC, Ranges.DYNAMIC])
def test_the_quantizer_alone_gives_what_the_verbs_give(ranges: Ranges) -> None:
    model = seeded(Plain)
    samples = plain_samples(model)
    recipe = dmq_ao.recipes.minmax("w4a8", ranges=ranges)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    dynamic = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    exported = torch.export.export(model, (x, t), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, dmq_ao.DiffusionQuantizer(recipe))
    for inputs in samples.batches(8):
        prepared(*inputs.values())
    alone = convert_pt2e(prepared)
    denoiser, _ = flow(model, recipe, samples)
    for batch in (2, 5):
        x, t = torch.randn(batch, 3, 8, 8), torch.arange(batch)
        assert torch.equal(alone(x, t), denoiser(x, t))
        assert relative(alone(x, t), model(x, t)) < 0.3


def test_the_quantizer_alone_has_no_timestep_to_give() -> None:
    model = seeded(Plain)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    prepared = prepare_pt2e(torch.export.export(model, inputs).module(), dmq_ao.DiffusionQuantizer(RECIPE))
    with pytest.raises(ValueError, match="part1: per_step ranges need the timestep, .* use dmq_ao.prepare, or static"):
        prepared(*inputs)


# --- recipes -----------------------------------------------------------------

RECIPES = [
    *(make() for make in dmq_ao.recipes.ALL_RECIPES.values()),
    dmq_ao.recipes.minmax("w2a4", ranges=Ranges.PER_STEP, observer="percentile", power_of_two=PowerOfTwo(("conv",))),
    dmq_ao.recipes.minmax("w4a16", group_size=8),
    dataclasses.replace(
        RECIPE,
        num_samples=3,
        split_concat=False,
        config=dataclasses.replace(
            RECIPE.config,
            keep_float=(),
            overrides=(
                Override("a*", weight=TensorConfig(3)),
                Override("@concat", keep_float=True),
                Override("b", activation=TensorConfig(4, ranges=Ranges.DYNAMIC)),
            ),
        ),
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_recipes_survive_json(recipe: Recipe) -> None:
    back = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert back == recipe
    assert hash(back) == hash(recipe)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (
            "nmae",
            "x",
            ValueError,
            r"recipe: unknown keys \['nmae'\]; Recipe has \['allocation', 'bias_correction', 'blocks',",
        ),
        ("config.wieght", {}, ValueError, r"recipe.config: unknown keys \['wieght'\]"),
        ("config.weight.bits", "8", TypeError, r"recipe.config.weight.bits: expected int, got str '8'"),
        ("config.weight.bits", True, TypeError, r"recipe.config.weight.bits: expected int, got bool True"),
        ("config.weight.bits", 9, ValueError, "weights have 1 to 8 bits, or 16 for float; got 9"),
        ("config.weight.granularity", "per_row", ValueError, r"granularity: 'per_row' is not one of \['per_tensor'"),
        ("config.weight.group_size", 8, ValueError, "group_size goes with per_group, got per_channel and 8"),
        ("config.activation.granularity", "per_channel", ValueError, "activations are quantized per_tensor"),
        ("config.keep_float", "@input", TypeError, r"recipe.config.keep_float: expected a list, got str"),
        ("config.overrides", [{"pattern": "x"}], ValueError, "override 'x' changes nothing"),
        ("config.power_of_two.layers", [], ValueError, "PowerOfTwo.layers is empty"),
        ("config.power_of_two.agreement", 1.5, ValueError, "agreement is a share of the samples, 0 to 1; got 1.5"),
        ("num_samples", 0, ValueError, "num_samples must be at least 1, got 0"),
        ("config", [], TypeError, r"recipe.config: expected an object with the fields of QuantConfig, got list"),
    ],
)
def test_edited_recipes_name_the_field(path: str, value: Any, error: type[Exception], message: str) -> None:
    data = RECIPE.to_dict()
    *parents, last = path.split(".")
    level = data
    for parent in parents:
        level = level[parent]
    level[last] = value
    with pytest.raises(error, match=message):
        Recipe.from_dict(data)


def test_a_missing_field_is_named() -> None:
    data = RECIPE.to_dict()
    del data["config"]["weight"]["bits"]
    with pytest.raises(ValueError, match=r"recipe.config.weight: missing keys \['bits'\] of TensorConfig"):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    "bits", ["", "w4", "a8", "w4a", "w0a8", "w9a8", "w4a13", "w12a8", "w4a8x", "4/8", "w-4a8", "w4.5a8"]
)
def test_wrong_bits_say_what_they_look_like(bits: str) -> None:
    for make in dmq_ao.recipes.ALL_RECIPES.values():
        with pytest.raises(ValueError, match=f"bits must look like 'w4a8' .*, got {bits!r}"):
            make(bits)


def with_config(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, config=dataclasses.replace(RECIPE.config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep_float": ("nothing.*",)},
            r"keep_float: pattern 'nothing.\*' matches no layer; near ones of 6 are \[",
        ),
        ({"overrides": (Override("Conv", keep_float=True),)}, "override: pattern 'Conv' matches no layer"),
        ({"overrides": (Override("conv.part0", keep_float=True),)}, "override: pattern 'conv.part0' matches no layer"),
        ({"overrides": (Override("merge.part2", keep_float=True),)}, "pattern 'merge.part2' matches no layer"),
        ({"power_of_two": PowerOfTwo(("skip",))}, "power_of_two: pattern 'skip' matches no layer"),
        ({"keep_float": ("@inptu",)}, r"keep_float: unknown role '@inptu'; the roles are \['@input', '@output'"),
        (
            {"weight": TensorConfig(8, observer="minmx")},
            r"observer 'minmx' is not known; the observers are \['ema', 'minmax', 'mse', 'percentile'\]",
        ),
        ({"overrides": (Override("conv", activation=TensorConfig(8, observer="x")),)}, "observer 'x' is not known"),
    ],
)
def test_recipes_that_fit_no_layer_are_refused_at_prepare(changes: dict[str, Any], message: str) -> None:
    model = seeded(Plain)
    with pytest.raises(ValueError, match=message):
        dmq_ao.prepare(model, with_config(**changes), (torch.randn(2, 3, 8, 8), torch.tensor([1, 2])))


def test_later_overrides_win_and_roles_and_patterns_meet() -> None:
    model = seeded(Plain)
    four, two = TensorConfig(4), TensorConfig(2)
    recipe = with_config(
        keep_float=("@input", "time"),
        overrides=(
            Override("*", weight=four),
            Override("first", weight=two),
            Override("@concat", keep_float=True),
            Override("tokens", activation=TensorConfig(16)),
        ),
    )
    denoiser, _ = flow(model, recipe, plain_samples(model))
    why = {name: item.why for name, item in denoiser.plan.items() if item.weight is None}
    assert why == {"merge": "override '@concat'"}
    bits = {name: (r.weight.bits, r.activation and r.activation.bits) for name, r in denoiser.records.items()}
    assert bits == {"first": (2, 8), "time": (4, 8), "conv": (4, 8), "tokens": (4, None), "last": (4, 8)}


def test_defaults_keep_the_ends_and_the_embedding_in_float() -> None:
    model = seeded(Plain)
    denoiser, _ = flow(model, RECIPE, plain_samples(model))
    assert set(denoiser.records) == {"conv", "tokens", "merge.part0", "merge.part1"}
    why = {name: item.why for name, item in denoiser.plan.items() if item.weight is None}
    assert why == {
        "first": "input projection (role @input)",
        "last": "output projection (role @output)",
        "time": "time, label or size embedding (role @embedding)",
    }


def test_a_whole_concatenation_where_the_recipe_does_not_split() -> None:
    model = seeded(Plain)
    denoiser, _ = flow(model, dataclasses.replace(RECIPE, split_concat=False), plain_samples(model))
    assert set(denoiser.records) == {"conv", "tokens", "merge"}
    assert denoiser.records["merge"].weight.codes.shape == (16, 32, 1, 1)


# --- the verbs' own errors ---------------------------------------------------


def test_convert_before_calibrate_names_what_was_not_observed() -> None:
    model = seeded(Plain)
    prepared = dmq_ao.prepare(model, RECIPE, (torch.randn(2, 3, 8, 8), torch.tensor([1, 2])))
    with pytest.raises(MissingStatistics, match="conv: its input was never observed; run calibrate"):
        dmq_ao.convert(prepared)


def test_verbs_in_the_wrong_order() -> None:
    model = seeded(Plain)
    with pytest.raises(TypeError, match="convert takes what dmq_ao.prepare returned, got Plain"):
        dmq_ao.convert(model)  # type: ignore[arg-type]
    annotated = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    with pytest.raises(TypeError, match="convert takes what dmq_ao.prepare returned, got GraphModule"):
        dmq_ao.convert(annotated)
    Prepared(RECIPE).attach(annotated)  # as DiffusionQuantizer leaves it where torchao prepares alone
    with pytest.raises(TypeError, match="convert takes what dmq_ao.prepare returned, .* prepare_pt2e prepared alone"):
        dmq_ao.convert(annotated)
    with pytest.raises(TypeError, match="save takes what dmq_ao.convert or dmq_ao.load returned, got Plain"):
        dmq_ao.save(model, "out")  # type: ignore[arg-type]


def test_backends_are_checked_before_calibration() -> None:
    model = seeded(Plain)
    example = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"backend 'tpu' is not known; the backends are \['auto', 'onednn'"):
        dmq_ao.prepare(model, RECIPE, example, backend="tpu")
    recipe = with_config(weight=TensorConfig(8, symmetric=False, granularity=dmq_ao.Granularity.PER_CHANNEL))
    with pytest.raises(dmq_ao.UnsupportedByBackend, match="conv: asymmetric 8-bit weight codes") as caught:
        dmq_ao.prepare(model, recipe, example, backend="onednn")
    assert len(caught.value.reasons) == 3
    denoiser, _ = flow(model, recipe, plain_samples(model), "auto")
    assert denoiser.backend == "reference"


def test_weights_that_are_not_finite_are_named() -> None:
    model = seeded(Plain)
    samples = plain_samples(model)
    with torch.no_grad():
        model.tokens.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="tokens: its weight holds NaN or infinity; check the float checkpoint"):
        flow(model, dmq_ao.recipes.minmax("w8a16"), samples)


def test_groups_must_divide_the_inputs() -> None:
    model = seeded(Plain)
    with pytest.raises(ValueError, match="group_size 7 does not divide the 144 inputs of conv; .* would do"):
        flow(model, dmq_ao.recipes.minmax("w4a16", group_size=7), plain_samples(model))


# --- pipelines ---------------------------------------------------------------


def test_quantize_in_place(tiny_unet2d: tuple[nn.Module, Inputs]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DDIMPipeline(tiny_unet2d[0], diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        result = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np")
        return torch.from_numpy(result.images)

    with dmq_ao.record(pipe.unet, num_samples=8) as recorder:
        expected = images()
    report = dmq_ao.quantize(pipe, RECIPE, recorder.calibration_set(), progress=False)
    assert isinstance(pipe.unet, dmq_ao.QuantizedDenoiser)
    assert report.samples == 8
    assert json.loads(json.dumps(report.to_dict()))["sqnr_db"] == report.sqnr_db
    actual = images()
    error = (actual - expected).square().mean().sqrt()  # the largest of all pixels hangs on single codes
    assert 0 < error < 0.03


def test_quantize_wants_a_denoiser() -> None:
    model = seeded(Plain)
    with pytest.raises(TypeError, match="Plain has no denoiser under unet or transformer or transformer_2; give a"):
        dmq_ao.quantize(model, RECIPE, plain_samples(model))
