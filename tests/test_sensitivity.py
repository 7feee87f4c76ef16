"""More bits go where one layer's rounding hurts the output most, within the share; a later run can undo it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain import relative, small
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

import dmq_ao
from dmq_ao import graph, numerics
from dmq_ao.config import InvalidFile, PowerOfTwo, Protection, Recipe, TensorConfig
from dmq_ao.mixed_precision import sensitivity
from dmq_ao.mixed_precision.sensitivity import Sensitivity, choose, choose_inputs, protect, sensitivities
from dmq_ao.numerics import ops
from dmq_ao.quantizer.prepared import observers, reset, state_of
from dmq_ao.records import LayerPlan
from dmq_ao.serialization.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("captures_are_shared")
STATE = "sensitivity.safetensors"
PROTECTION, NOWHERE = Protection(share=0.5, input_share=0.1), Checkpoint(None, "mine")
NARROW, WIDE, INPUT = TensorConfig(bits=4), TensorConfig(bits=8), TensorConfig(bits=8)


@pytest.fixture
def prepared(model: nn.Module, samples: dmq_ao.CalibrationSet) -> GraphModule:
    recipe = dataclasses.replace(dmq_ao.recipes.minmax("w4a6"), protection=PROTECTION)
    return dmq_ao.prepare(model, recipe, samples.example(), backend="reference")


@pytest.fixture
def arguments(samples: dmq_ao.CalibrationSet) -> list[Tensor]:
    one = next(iter(samples.batches(4)))
    return [one["x"], one["t"]]


def quiet() -> tqdm[None]:
    return tqdm(disable=True)


# --- what is measured --------------------------------------------------------


def perturbed(layer: nn.Module, weight: Tensor | None, bits: int, call: Callable[[], Tensor]) -> Tensor:
    """What ``call`` gives while ``layer`` has another weight and reads its input by ranges of each sample."""
    assert isinstance(layer.weight, Tensor)

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale, zero_point = (numerics.along(t, 0, args[0].dim()) for t in ops.dynamic_qparams(args[0], bits))
        return (numerics.fake_quantize(args[0], scale, zero_point, *numerics.code_range(bits, False)),)

    before, handle = layer.weight.detach().clone(), layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        layer.weight.copy_(before if weight is None else weight)
        result = call()
        layer.weight.copy_(before)
    handle.remove()
    return result


@pytest.mark.parametrize("name", ["conv", "tokens"])
def test_a_sensitivity_is_the_error_of_rounding_one_layer_by_hand(
    name: str, prepared: GraphModule, arguments: list[Tensor], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "WORTH", 0.0)
    found = sensitivities(prepared, arguments, quiet())[name]
    layer = model.get_submodule(name)
    assert isinstance(layer.weight, Tensor)
    rounded = observers(prepared)[name][0].record(layer.weight.detach()).dequantize()
    with torch.no_grad():
        expected = model(*arguments)
    for weight, error in ((rounded, found.error), (None, found.input_error)):
        actual = perturbed(layer, weight, 6, lambda: model(*arguments))
        by_sample = torch.tensor([relative(a, e) for a, e in zip(actual, expected, strict=True)])
        assert error == pytest.approx(float(by_sample.mean()), rel=1e-4)
    assert torch.equal(model(*arguments), expected)


def test_products_are_those_of_the_layer(prepared: GraphModule, arguments: list[Tensor]) -> None:
    found = sensitivities(prepared, arguments, quiet())
    assert found["conv"].products == 8 * 8 * 16 * 16 * 9
    assert found["tokens"].products == 64 * 16 * 16


def test_inputs_that_hardly_matter_are_not_looked_at(
    prepared: GraphModule, arguments: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "WORTH", 0.9)
    found = sensitivities(prepared, arguments, quiet())
    squares = sum(one.input_error**2 for one in found.values())
    skipped = [one for one in found.values() if not one.input_error]
    assert 0 < len(skipped) < len(found)
    assert all(one.error**2 < sensitivity.WORTH * squares for one in skipped)


def test_every_quantized_layer_is_measured_and_nothing_is_changed(
    prepared: GraphModule, arguments: list[Tensor]
) -> None:
    with torch.no_grad():
        expected = graph.first_tensor(prepared(*arguments))
        found = sensitivities(prepared, arguments, quiet())
        assert torch.equal(graph.first_tensor(prepared(*arguments)), expected)
    assert list(found) == list(observers(prepared))
    assert all(0 < one.error < 1 for one in found.values())


def test_layers_that_have_the_most_bits_already_are_left_out(
    model: nn.Module, samples: dmq_ao.CalibrationSet, arguments: list[Tensor]
) -> None:
    prepared = dmq_ao.prepare(model, dmq_ao.recipes.minmax("w4a8", embeddings=True), samples.example())
    assert "time" in sensitivities(prepared, arguments, quiet())
    found = sensitivities(prepared, arguments, quiet(), Protection())
    assert list(found) == [name for name in observers(prepared) if name != "time"]


# --- what is chosen ----------------------------------------------------------


def layer(name: str, numel: int, weight: TensorConfig = NARROW, *, votes: bool = False) -> LayerPlan:
    return LayerPlan(name, "conv2d", numel, weight, INPUT, PowerOfTwo() if votes else None, "")


def seen(error: float, input_error: float = 0.0, products: int = 1) -> Sensitivity:
    return Sensitivity(error, input_error, products)


PLANS = {item.name: item for item in (layer("small", 10), layer("middle", 30), layer("large", 960))}


@pytest.mark.parametrize(
    ("share", "expected"), [(0.009, []), (0.01, ["small"]), (0.039, ["small"]), (0.04, ["small", "middle"])]
)
def test_the_share_of_weights_is_kept(share: float, expected: list[str]) -> None:
    assert choose(dict.fromkeys(PLANS, seen(0.1)), PLANS, Protection(share=share)) == expected


def test_most_squared_error_per_weight_comes_first() -> None:
    found = {"small": seen(0.1), "middle": seen(0.2), "large": seen(0.2)}  # 1.0e-3, 1.3e-3, 4.2e-5 a weight
    assert choose(found, PLANS, Protection(share=1.0)) == ["middle", "small", "large"]
    assert choose(found, PLANS, Protection(share=0.03)) == ["middle"]


def test_a_layer_that_does_not_fit_leaves_room_for_the_next() -> None:
    found = {"small": seen(0.1), "middle": seen(0.9), "large": seen(0.1)}
    assert choose(found, PLANS, Protection(share=0.02)) == ["small"]


def test_who_is_never_chosen() -> None:
    plans = {item.name: item for item in (layer("wide", 10, WIDE), layer("voting", 10, votes=True), layer("dead", 10))}
    found = {"wide": seen(0.5), "voting": seen(0.5), "dead": seen(0.0)}
    assert choose(found, plans, Protection(share=1.0)) == []


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, []), (0.02, ["b"]), (0.05, ["b"]), (0.12, ["b", "a"]), (1.0, ["b", "a", "c"])]
)
def test_inputs_are_widened_within_the_share_of_products(share: float, expected: list[str]) -> None:
    found = {
        "a": seen(0.4, 0.3, 100),  # 9e-4 a product
        "b": seen(0.2, 0.2, 10),  # b and d read one input: 2.5e-3
        "c": seen(0.3, 0.2, 870),
        "d": seen(0.1, 0.1, 10),
        "e": seen(0.05, 0.05, 10),  # not worth it, however cheap
    }
    inputs = [["a"], ["b", "d"], ["c"], ["e"]]
    assert choose_inputs(found, inputs, Protection(input_share=share)) == expected


# --- what is done about it ---------------------------------------------------


def test_the_chosen_layers_get_their_bits_everywhere(prepared: GraphModule, arguments: list[Tensor]) -> None:
    recipe, plan = state_of(prepared).recipe, state_of(prepared).plan
    found = sensitivities(prepared, arguments, quiet())
    chosen = choose(found, plan, recipe.protection)
    wide = choose_inputs(found, [[name] for name in observers(prepared)], recipe.protection)
    protect(prepared, arguments, PROTECTION, NOWHERE, quiet())
    assert 0 < len(chosen) < len(plan)
    assert wide
    for name, (weight, activation) in observers(prepared).items():
        bits = (8 if name in chosen else 4, 12 if name in wide else 8 if name in chosen else 6)
        assert activation is not None
        assert (weight.config.bits, activation.config.bits) == bits
        item = state_of(prepared).plan[name]
        assert (item.weight.bits, item.activation.bits) == bits
    assert state_of(prepared).recipe.protection is None
    assert state_of(prepared).recipe.config.overrides != recipe.config.overrides
    reset(prepared)
    assert (state_of(prepared).recipe, state_of(prepared).plan) == (recipe, plan)
    assert {weight.config.bits for weight, _ in observers(prepared).values()} == {4}
    reset(prepared)  # a second time there is nothing to undo
    assert state_of(prepared).recipe == recipe


def test_the_written_overrides_make_the_same_plan(
    model: nn.Module, prepared: GraphModule, arguments: list[Tensor], samples: dmq_ao.CalibrationSet
) -> None:
    protect(prepared, arguments, PROTECTION, NOWHERE, quiet())
    written = Recipe.from_dict(state_of(prepared).recipe.to_dict())
    again = dmq_ao.prepare(model, written, samples.example(), backend="reference")
    assert state_of(again).plan == state_of(prepared).plan


def test_a_second_calibration_starts_from_what_was_asked(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = dataclasses.replace(small(dmq_ao.recipes.default("w4a8"), 2), distillation=None)
    recipe = dataclasses.replace(recipe, protection=Protection(share=0.5))
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    first = state_of(prepared).recipe
    dmq_ao.calibrate(prepared, samples, progress=False)
    assert state_of(prepared).recipe == first
    assert first != recipe


# --- state -------------------------------------------------------------------


def test_what_was_measured_is_taken_from_the_file(
    prepared: GraphModule, arguments: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect(prepared, arguments, PROTECTION, Checkpoint(tmp_path, "mine"), quiet())
    expected = state_of(prepared).plan
    reset(prepared)
    monkeypatch.setattr(sensitivity, "sensitivities", lambda *_: pytest.fail("measured again"))
    protect(prepared, arguments, PROTECTION, Checkpoint(tmp_path, "mine"), quiet())
    assert state_of(prepared).plan == expected


def test_damaged_and_foreign_measurements(prepared: GraphModule, arguments: list[Tensor], tmp_path: Path) -> None:
    protect(prepared, arguments, PROTECTION, Checkpoint(tmp_path, "mine"), quiet())
    reset(prepared)
    with pytest.raises(ValueError, match="belongs to another run"):
        protect(prepared, arguments, PROTECTION, Checkpoint(tmp_path, "theirs"), quiet())
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(InvalidFile, match="not the sensitivities of a calibration"):
        protect(prepared, arguments, PROTECTION, Checkpoint(tmp_path, "mine"), quiet())


def test_another_protection_is_another_run(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    for share in (0.5, 0.6):
        recipe = dataclasses.replace(dmq_ao.recipes.minmax("w4a8"), protection=Protection(share=share))
        prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
        if share == 0.5:
            dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
        else:
            with pytest.raises(ValueError, match="belongs to another run"):
                dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
