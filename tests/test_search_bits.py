"""Bits are searched under an exact budget, applied, stored at their own widths, and run on the integer kernels."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from plain import assert_same_records, contents, flow, plain_samples, relative, repeated_samples, reseal, small
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

import dmq_ao
from dmq_ao import BitPlan, PowerOfTwo, graph, recipes
from dmq_ao.api.stored_size import StoredSize
from dmq_ao.config import (
    BitAllocation,
    ChannelScaling,
    InvalidFile,
    Ranges,
    Recipe,
    Rounding,
    RoundingMethod,
    Scope,
    Scorer,
    TensorConfig,
)
from dmq_ao.mixed_precision.bit_errors import (
    error_of_rounded_inputs,
    error_of_rounded_weights,
    input_errors,
    probe_of,
    weight_errors,
)
from dmq_ao.mixed_precision.bit_plan import InputBits, LayerBits
from dmq_ao.objectives import relative_error
from dmq_ao.quantizer.prepared import observers
from dmq_ao.serialization.folder import TENSORS
from tests.integer_sums import EXACT

pytestmark = pytest.mark.usefixtures("captures_are_shared")
KURTOSIS = BitAllocation(scorer=Scorer.KURTOSIS, scope=Scope.LAYER)
BY_LAYER = BitAllocation(scope=Scope.LAYER)
ALWAYS = BitAllocation(least_gain=0)
EVERY = pytest.mark.parametrize("allocation", [ALWAYS, BY_LAYER, KURTOSIS], ids=["model", "layer", "kurtosis"])


def prepared_for(recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet) -> GraphModule:
    return dmq_ao.prepare(model, recipe, samples.example(), backend="reference")


def searched(recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, **given: object) -> BitPlan:
    return dmq_ao.search_bits(prepared_for(recipe, model, samples), samples, progress=False, **given)  # type: ignore[arg-type]


def mixed(recipe: Recipe, allocation: BitAllocation | None = None) -> Recipe:
    """Nearest rounding, each channel its own width."""
    return dataclasses.replace(recipe, allocation=allocation or BitAllocation(mean_bits=2.6))


@EVERY
def test_the_mean_is_the_recipes_width(
    allocation: BitAllocation, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    plan = searched(recipes.minmax("w3a8"), model, samples, allocation=allocation)
    largest = max(one.weights for one in plan.layers.values())
    numel = sum(one.weights * len(one.bits) for one in plan.layers.values())
    assert 3 - largest * len(plan.layers) / numel < plan.mean_bits <= 3
    if allocation.scope is Scope.LAYER:
        assert all(one.mean_bits <= 3 for one in plan.layers.values())
    if allocation is KURTOSIS:
        assert all(one.mean_bits == 3 and set(one.bits) <= {2, 3, 4} for one in plan.layers.values())


@pytest.mark.parametrize("mean", [1.5, 2.0, 3.3, 5.0])
def test_the_mean_is_what_was_asked(mean: float, model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    plan = searched(recipes.minmax("w4a8"), model, samples, mean_bits=mean)
    assert mean - 0.15 < plan.mean_bits <= mean


def test_what_gains_little_stays_as_it_was(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = recipes.minmax("w4a6")
    assert not searched(recipe, model, samples, allocation=BitAllocation(least_gain=1e9))
    both = searched(recipe, model, samples, allocation=BitAllocation(least_gain=0))
    assert both.layers
    assert both.inputs
    # Who asks for a mean gets it.
    assert searched(recipe, model, samples, allocation=BitAllocation(least_gain=1e9), mean_bits=4).layers
    prepared = prepared_for(mixed(recipe, BitAllocation(least_gain=1e9)), model, samples)
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    assert report.bits is not None
    assert report.to_dict()["bits"]["mean_bits"] is None


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_curves_of_inputs_are_measured_at_every_width(
    bits: int, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    recipe = recipes.minmax(f"w8a{bits}", ranges=Ranges.DYNAMIC)
    prepared = prepared_for(recipe, model, samples)
    probe = probe_of(prepared, samples)
    nodes = graph.layer_nodes(prepared)
    errors = input_errors(prepared, probe)
    assert len(errors) == len({id(one) for _, one in observers(prepared).values()})
    for one in errors:
        assert one.candidates == tuple(range(bits - 2, 9))
        measured = [probe.error_of({nodes[name]: (None, width) for name in one.products}) for width in one.candidates]
        assert one.curve[0].tolist() == pytest.approx(list(itertools.accumulate((m**2 for m in measured), min)))
        assert one.curve[0, -1] < one.curve[0, 0]


@pytest.mark.parametrize(("bits", "tolerance"), [("w3a16", 1e-3), ("w8a3", 0.05)])  # 8 bits are not quite float
def test_sharing_is_judged_by_the_output_of_the_converted_graph(
    bits: str, tolerance: float, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    recipe = recipes.minmax(bits, ranges=Ranges.DYNAMIC)
    quantized, prepared = flow(model, recipe, samples)[0], prepared_for(recipe, model, samples)
    probe = probe_of(prepared, samples)
    if bits.startswith("w8"):
        widths = {name: activation.config.bits for name, (_, activation) in observers(prepared).items() if activation}
        found = error_of_rounded_inputs(prepared, probe, widths)
    else:
        layers, fixed = weight_errors(prepared, samples, BitAllocation(), probe, 4, tqdm(disable=True))
        assert not fixed
        found = error_of_rounded_weights(prepared, probe, layers, None)
        eight = {name: torch.full((len(one.curves),), 8) for name, one in layers.items()}
        assert error_of_rounded_weights(prepared, probe, layers, eight) < 0.1 * found
    with torch.no_grad():
        expected = relative_error(quantized.graph_module(*probe.arguments), probe.expected).mean()
    assert found == pytest.approx(float(expected), rel=tolerance)


def test_more_bits_more_fidelity(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    errors = []
    inputs = samples.example(4)
    with torch.no_grad():
        expected = model(**inputs)
        for mean in (1.2, 2.0, 3.0, 4.5):
            quantized, _ = flow(model, mixed(recipes.minmax("w4a16"), BitAllocation(mean_bits=mean)), samples)
            errors.append(relative(quantized(**inputs), expected))
    assert errors == sorted(errors, reverse=True)


def test_bits_over_the_model_beat_the_same_bits_everywhere(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    inputs = samples.example(8)
    with torch.no_grad():
        expected = model(**inputs)
        even, _ = flow(model, recipes.minmax("w3a16", observer="mse"), samples)
        searched_for, _ = flow(model, mixed(recipes.minmax("w3a16", observer="mse"), BitAllocation()), samples)
        assert relative(searched_for(**inputs), expected) < 0.8 * relative(even(**inputs), expected)


def folder_at(max_bytes: int, recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, folder: Path) -> int:
    """Bytes of all files of a denoiser whose bits were searched for so many."""
    plan = searched(recipe, model, samples, max_bytes=max_bytes)
    prepared = prepared_for(recipe, model, samples)
    dmq_ao.calibrate(prepared, samples, bits=plan, progress=False)
    dmq_ao.save(dmq_ao.convert(prepared, "reference"), folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def between(share: float, recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet) -> int:
    """Bytes of a folder at a share of the way from two bits everywhere to six."""
    size = StoredSize(prepared_for(recipe, model, samples), len(samples.timesteps))
    counts = {name: len(record.weight.codes) for name, record in size.contents.records.items() if name in size.layers}
    least, most = (size.bytes({name: torch.full((n,), bits) for name, n in counts.items()}) for bits in (2, 6))
    return int(least + share * (most - least))


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("net", ["tiny_unet2d", "tiny_unet2d_condition", "tinier_dit"])
def test_a_folder_of_the_bytes_asked_for(
    net: str, share: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """All that ``save`` writes."""
    model, inputs = request.getfixturevalue(net)
    samples, recipe = repeated_samples(inputs, 0.1), recipes.minmax("w4a8")
    max_bytes = between(share, recipe, model, samples)
    assert 0.97 * max_bytes <= folder_at(max_bytes, recipe, model, samples, tmp_path / "out") <= max_bytes


@pytest.mark.parametrize("name", ["default", "dmq", "mpq_dm"])
def test_what_calibration_adds_is_counted(
    name: str, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    recipe = small(recipes.ALL_RECIPES[name]("w4a8"), steps=2)
    if recipe.select.window > 1:
        samples = plain_samples(model, window=recipe.select.window)
    max_bytes = between(0.5, recipe, model, samples)
    # A layer that is not protected in the end is a thirtieth of so small a folder.
    assert 0.95 * max_bytes <= folder_at(max_bytes, recipe, model, samples, tmp_path / "out") <= max_bytes


def test_kurtosis_keeps_to_no_bytes(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    with pytest.raises(ValueError, match="kurtosis moves bits inside each layer and keeps to no budget of bytes"):
        searched(mixed(recipes.minmax("w4a8"), KURTOSIS), model, samples, max_bytes=10_000_000)


def test_a_plan_is_edited_saved_and_applied(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    plan = searched(recipes.minmax("w3a8"), model, samples)
    name = "tokens"
    layers = {**plan.layers, name: LayerBits(16, (6,) + (2,) * 15)}
    BitPlan(layers).save(tmp_path / "plan.json")
    prepared = prepared_for(recipes.minmax("w3a8"), model, samples)
    report = dmq_ao.calibrate(prepared, samples, bits=BitPlan.load(tmp_path / "plan.json"), progress=False)
    quantized = dmq_ao.convert(prepared, "reference")
    weight = quantized.records[name].weight
    assert weight.segments == [(2, 15), (6, 1)]
    assert int(weight.codes[1:].max()) <= 3 < int(weight.codes[0].max())
    assert report.to_dict()["bits"]["layers"][name]["channels_by_bits"] == {"2": 15, "6": 1}
    row = next(row for row in quantized.layer_reports() if row["name"] == name)
    assert (row["weight_bits"], row["channels_by_bits"]) == (2.25, {"2": 15, "6": 1})
    again = dmq_ao.calibrate(prepared, samples, progress=False)  # every call starts clean
    assert again.bits is None
    assert observers(prepared)[name][0].channel_bits is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"nobody": LayerBits(16, (2,) * 16)}, "'nobody', which is no quantized layer; they are"),
        (
            {"tokens": LayerBits(16, (2,) * 15)},
            "has 16 output channels of 16 weights, the plan gives bits for 15 of 16",
        ),
        ({"tokens": LayerBits(16, (8,) * 16)}, "8 bits, and its codes, centred .* fit int8 with 7"),
    ],
)
def test_a_plan_that_does_not_fit(
    layers: dict[str, LayerBits], message: str, model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    prepared = prepared_for(recipes.minmax("w3a8"), model, samples)
    with pytest.raises(ValueError, match=message):
        dmq_ao.calibrate(prepared, samples, bits=BitPlan(layers), progress=False)


def test_shifted_codes_stay_in_int8(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = recipes.minmax("w3a8", power_of_two=True)
    plan = searched(recipe, model, samples, mean_bits=4.5)
    assert max(max(one.bits) for name, one in plan.layers.items() if name.startswith("merge")) == 4
    too_wide = BitPlan({"merge.part0": LayerBits(16, (5,) * 16)})
    with pytest.raises(ValueError, match="shifted by the power-of-two factors, fit int8 with 4"):
        dmq_ao.calibrate(prepared_for(recipe, model, samples), samples, bits=too_wide, progress=False)


def test_what_is_asked_wrongly(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    prepared = prepared_for(recipes.minmax("w3a8"), model, samples)
    with pytest.raises(TypeError, match="what dmq_ao.prepare returned, got Plain"):
        dmq_ao.search_bits(model, samples)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean_bits or max_bytes, not both"):
        dmq_ao.search_bits(prepared, samples, mean_bits=3, max_bytes=10)
    with pytest.raises(ValueError, match=r"within the candidates \(1, 2, 3, 4, 5, 6\), got 9"):
        dmq_ao.search_bits(prepared, samples, mean_bits=9, progress=False)
    with pytest.raises(ValueError, match=r"the budget leaves them -\d+; ask for more$"):
        dmq_ao.search_bits(prepared, samples, max_bytes=10, progress=False)
    with pytest.raises(TypeError, match="bits must be a BitPlan, got dict"):
        dmq_ao.calibrate(prepared, samples, bits={}, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one width a layer"):
        dataclasses.replace(mixed(recipes.minmax("w3a8")), rounding=Rounding(RoundingMethod.ADAROUND))
    with pytest.raises(ValueError, match="kurtosis swaps bits inside a layer"):
        BitAllocation(scorer=Scorer.KURTOSIS)


def test_inputs_share_out_their_bits_too(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    plan = searched(recipes.minmax("w4a6"), model, samples)
    assert 6 - 0.5 < (plan.mean_input_bits or 0) <= 6
    assert len({one.bits for one in plan.inputs.values()}) > 1
    assert searched(recipes.minmax("w4a8"), model, samples).inputs == {}  # a byte costs what fewer bits do
    assert searched(recipes.minmax("w4a6"), model, samples, allocation=BitAllocation(inputs=False)).inputs == {}
    prepared = prepared_for(recipes.minmax("w4a6"), model, samples)
    dmq_ao.calibrate(prepared, samples, bits=plan, progress=False)
    quantized = dmq_ao.convert(prepared, "reference")
    for name, record in quantized.records.items():
        assert record.activation is not None
        assert record.activation.bits == plan.inputs[name].bits
    rows = {row["name"]: row["activation_bits"] for row in quantized.layer_reports()}
    assert {name: rows[name] for name in plan.inputs} == {name: one.bits for name, one in plan.inputs.items()}
    dmq_ao.calibrate(prepared, samples, progress=False)  # every call starts clean
    again = dmq_ao.convert(prepared, "reference")
    assert {record.activation.bits for record in again.records.values() if record.activation} == {6}


def test_readers_of_one_input_agree(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    unet, inputs = tiny_unet2d
    step = torch.tensor([0, 1])
    samples = dmq_ao.CalibrationSet({"sample": inputs["sample"]}, {}, torch.tensor([500, 10]), step)
    prepared = dmq_ao.prepare(unet, recipes.minmax("w4a6"), samples.example(), backend="reference")
    plan = dmq_ao.search_bits(prepared, samples, allocation=ALWAYS, progress=False)
    names = [name for name in plan.inputs if name.endswith(("to_q", "to_k"))][:2]
    assert plan.inputs[names[0]].bits == plan.inputs[names[1]].bits
    other = {**plan.inputs, names[1]: InputBits(1, 3)}
    with pytest.raises(ValueError, match="read the same input, and the plan gives it .* and 3 bits"):
        dmq_ao.calibrate(prepared, samples, bits=dataclasses.replace(plan, inputs=other), progress=False)
    with pytest.raises(ValueError, match="the input of 'nobody', which is not quantized"):
        dmq_ao.calibrate(prepared, samples, bits=BitPlan({}, inputs={"nobody": InputBits(1, 3)}), progress=False)


def test_much_float_is_told(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    with pytest.warns(UserWarning, match=r"\d+% of the weights stay in float.*: first, last, time"):
        searched(recipes.minmax("w3a8"), model, samples)


def test_damaged_weights_are_named(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.conv.weight[0, 0, 0, 0] = torch.nan  # type: ignore[index,union-attr]
    prepared = dmq_ao.prepare(damaged, recipes.minmax("w3a8"), samples.example(), backend="reference")
    with pytest.raises(ValueError, match=r"NaN or infinity"):
        dmq_ao.search_bits(prepared, samples, progress=False)


# --- stored and run ----------------------------------------------------------

EVERY_WIDTH = (1, 2, 3, 4, 5, 6, 7, 3, 3, 1, 2, 2, 4, 4, 6, 1)


def by_hand(
    recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, backend: str
) -> dmq_ao.QuantizedDenoiser:
    """Every width that fits, in no order."""
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend=backend)
    most = 4 if recipe.config.power_of_two else 7
    layers = {
        name: LayerBits(weight.numel() // 16, tuple(min(bits, most) for bits in EVERY_WIDTH))
        for name in observers(prepared)
        if len(weight := _weight_of(model, name)) == 16
    }
    dmq_ao.calibrate(prepared, samples, bits=BitPlan(layers), progress=False)
    return dmq_ao.convert(prepared, backend)


def _weight_of(model: nn.Module, name: str) -> Tensor:
    whole, _, part = name.partition(".part")
    weight: Tensor = model.get_submodule(whole).weight
    return weight.chunk(2, 1)[int(part)] if part else weight


@pytest.mark.parametrize("bits", ["w4a8", "w8a8", "w4a16"])
def test_load_after_save_is_the_identity(
    bits: str, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    quantized = by_hand(recipes.minmax(bits), model, samples, "reference")
    dmq_ao.save(quantized, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=model, backend="reference")
    assert_same_records(quantized, loaded)
    with torch.no_grad():
        assert torch.equal(quantized(**samples.example(4)), loaded(**samples.example(4)))
    dmq_ao.save(loaded, tmp_path / "again")
    assert (tmp_path / TENSORS).read_bytes() == (tmp_path / "again" / TENSORS).read_bytes()


def test_every_width_is_packed_by_itself(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    quantized = by_hand(recipes.minmax("w4a8"), model, samples, "reference")
    dmq_ao.save(quantized, tmp_path)
    weight = quantized.records["conv"].weight
    assert weight.code_bytes == sum(math.ceil(EVERY_WIDTH.count(b) * 144 / 8) * b for b in set(EVERY_WIDTH))
    stored = sum(record.stored_bits for record in quantized.records.values())
    stored += sum(8 * tensor.nbytes for tensor in quantized.float_tensors.values())
    numel = sum(p.numel() for p in model.parameters())
    assert quantized.mean_bits == pytest.approx(stored / numel)
    assert (tmp_path / TENSORS).stat().st_size * 8 == pytest.approx(stored, rel=0.02, abs=8 * 6000)


def test_a_truncated_segment_is_named(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    quantized = by_hand(recipes.minmax("w4a8"), model, samples, "reference")
    dmq_ao.save(quantized, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace(
            '"segments": [\n          [\n            1,\n            3',
            '"segments": [[1, 2], [\n            1,\n            3',
            1,
        )
    )
    reseal(tmp_path)
    with pytest.raises(
        InvalidFile, match="segments must be ascending widths up to 7, the numbers of channels adding up"
    ):
        dmq_ao.load(tmp_path, model=model, backend="reference")


@pytest.mark.skipif(not EXACT, reason="this CPU has no VNNI, so there are no integer kernels to compare")
@pytest.mark.parametrize(
    "recipe",
    [recipes.minmax("w4a8"), recipes.minmax("w8a8"), recipes.minmax("w4a8", power_of_two=PowerOfTwo(agreement=0.3))],
    ids=["asymmetric", "symmetric", "votes"],
)
def test_integer_kernels_equal_the_graph(recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    quantized = by_hand(recipe, model, samples, "onednn")
    assert all(kernel.is_integer for kernel in quantized.kernels.values())
    reference = by_hand(recipe, model, samples, "reference")
    assert_same_records(quantized, reference)
    with torch.no_grad():
        assert relative(quantized(**samples.example(4)), reference(**samples.example(4))) < 1e-3


def test_an_interrupted_run_goes_on(model: nn.Module, tmp_path: Path) -> None:
    samples = plain_samples(model, window=2)
    recipe = small(recipes.mpq_dm("w3a6"), 4)
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        prepared = prepared_for(recipe, model, samples)
        report = dmq_ao.calibrate(prepared, samples, state_dir=folder, progress=False)
        assert report.bits is not None
        dmq_ao.save(dmq_ao.convert(prepared, "reference"), folder / "out")
        made.append(contents(folder))
    assert made[0] == made[1]
    for file in (tmp_path / "two" / "units").iterdir():
        file.unlink()
    prepared = prepared_for(recipe, model, samples)
    report = dmq_ao.calibrate(prepared, samples, state_dir=tmp_path / "two", progress=False)
    dmq_ao.save(dmq_ao.convert(prepared, "reference"), tmp_path / "two" / "out")
    assert contents(tmp_path / "two") == made[0]


@pytest.mark.parametrize("bits", ["w2a4", "w2a6", "w3a4", "w3a6", "w4a4", "w4a6"])
def test_the_recipe_runs_at_every_width(bits: str, model: nn.Module) -> None:
    for recipe in (small(recipes.mpq_dm(bits), 4), small(recipes.mpq_dm(bits, compat="reference"), 4)):
        windows = plain_samples(model, window=2)
        quantized, report = flow(model, dataclasses.replace(recipe, protection=None), windows)
        assert report.bits is not None
        assert report.bits.mean_bits <= int(bits[1])
        assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_scales_come_before_bits(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    plain = recipes.minmax("w3a8")
    scaled = dataclasses.replace(plain, scaling=ChannelScaling(steps=0))
    assert searched(plain, model, samples) != searched(scaled, model, samples)


def test_layers_of_one_scale_keep_their_width(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    base = recipes.minmax("w3a8")
    override = dmq_ao.Override("tokens", weight=TensorConfig(8, symmetric=True))
    recipe = dataclasses.replace(base, config=dataclasses.replace(base.config, overrides=(override,)))
    plan = searched(recipe, model, samples)
    assert "tokens" not in plan.layers
    # Its eight bits are none of the others' mean, but come out of a budget in bytes.
    assert searched(recipe, model, samples, mean_bits=3) == plan
    assert searched(recipe, model, samples, mean_bits=4).mean_bits == pytest.approx(4, abs=0.01)
    prepared = dmq_ao.prepare(model, recipe, samples.example())
    with pytest.raises(ValueError, match=r"leaves them -\d+; .* fewer than 2048 bits to .*: \['tokens'\]"):
        dmq_ao.search_bits(prepared, samples, max_bytes=1000, progress=False)
