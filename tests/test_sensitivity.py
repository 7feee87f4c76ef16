"""More bits go where one layer's rounding hurts the output most, within the share; a later run can undo it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from plain import relative, small
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm.auto import tqdm

import dmq_ao
from dmq_ao import graph, numerics, ops, sensitivity
from dmq_ao.annotate import PLAN, RECIPE, observers
from dmq_ao.config import InvalidFile, PowerOfTwo, Protection, Recipe, TensorConfig
from dmq_ao.layer import LayerPlan
from dmq_ao.sensitivity import choose, forget, protect, sensitivities

pytestmark = pytest.mark.usefixtures("captures_are_shared")
STATE = "sensitivity.safetensors"
NARROW, WIDE, INPUT = TensorConfig(bits=4), TensorConfig(bits=8), TensorConfig(bits=8)


@pytest.fixture
def prepared(model: nn.Module, samples: dmq_ao.CalibrationSet) -> GraphModule:
    recipe = dataclasses.replace(dmq_ao.recipes.minmax("w4a6"), protection=Protection(share=0.5))
    return dmq_ao.prepare(model, recipe, samples.example(), backend="reference")


@pytest.fixture
def arguments(samples: dmq_ao.CalibrationSet) -> list[Tensor]:
    one = next(iter(samples.batches(4)))
    return [one["x"], one["t"]]


def quiet() -> tqdm[None]:
    return tqdm(disable=True)


# --- what is measured --------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "tokens"])
def test_a_sensitivity_is_the_error_of_rounding_one_layer_by_hand(
    name: str, prepared: GraphModule, arguments: list[Tensor], model: nn.Module
) -> None:
    found = sensitivities(prepared, arguments, quiet())
    layer = model.get_submodule(name)
    assert isinstance(layer.weight, Tensor)
    rounded = observers(prepared)[name][0].record(layer.weight.detach()).dequantize()

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale, zero_point = (numerics.along(t, 0, args[0].dim()) for t in ops.dynamic_qparams(args[0], 6))
        return (numerics.fake_quantize(args[0], scale, zero_point, *numerics.code_range(6, False)),)

    with torch.no_grad():
        expected = model(*arguments)
        before, handle = layer.weight.detach().clone(), layer.register_forward_pre_hook(hook)
        layer.weight.copy_(rounded)
        actual = model(*arguments)
        layer.weight.copy_(before)
        handle.remove()
    by_sample = torch.tensor([relative(a, e) for a, e in zip(actual, expected, strict=True)])
    assert found[name] == pytest.approx(float(by_sample.mean()), rel=1e-4)
    assert torch.equal(model(*arguments), expected)


def test_every_quantized_layer_is_measured_and_nothing_is_changed(
    prepared: GraphModule, arguments: list[Tensor]
) -> None:
    with torch.no_grad():
        expected = graph.first_tensor(prepared(*arguments))
        found = sensitivities(prepared, arguments, quiet())
        assert torch.equal(graph.first_tensor(prepared(*arguments)), expected)
    assert list(found) == list(observers(prepared))
    assert all(0 < value < 1 for value in found.values())


# --- what is chosen ----------------------------------------------------------


def layer(name: str, numel: int, weight: TensorConfig = NARROW, *, votes: bool = False) -> LayerPlan:
    return LayerPlan(name, "conv2d", numel, weight, INPUT, PowerOfTwo() if votes else None, "")


PLANS = {item.name: item for item in (layer("small", 10), layer("middle", 30), layer("large", 960))}


@pytest.mark.parametrize(
    ("share", "expected"), [(0.009, []), (0.01, ["small"]), (0.039, ["small"]), (0.04, ["small", "middle"])]
)
def test_the_share_of_weights_is_kept(share: float, expected: list[str]) -> None:
    assert choose(dict.fromkeys(PLANS, 0.1), PLANS, Protection(share=share)) == expected


def test_most_squared_error_per_weight_comes_first() -> None:
    found = {"small": 0.1, "middle": 0.2, "large": 0.2}  # 1.0e-3, 1.3e-3, 4.2e-5 a weight
    assert choose(found, PLANS, Protection(share=1.0)) == ["middle", "small", "large"]
    assert choose(found, PLANS, Protection(share=0.03)) == ["middle"]


def test_a_layer_that_does_not_fit_leaves_room_for_the_next() -> None:
    assert choose({"small": 0.1, "middle": 0.9, "large": 0.1}, PLANS, Protection(share=0.02)) == ["small"]


def test_who_is_never_chosen() -> None:
    plans = {item.name: item for item in (layer("wide", 10, WIDE), layer("voting", 10, votes=True), layer("dead", 10))}
    assert choose({"wide": 0.5, "voting": 0.5, "dead": 0.0}, plans, Protection(share=1.0)) == []


# --- what is done about it ---------------------------------------------------


def test_the_chosen_layers_get_their_bits_everywhere(prepared: GraphModule, arguments: list[Tensor]) -> None:
    recipe, plan = prepared.meta[RECIPE], prepared.meta[PLAN]
    chosen = choose(sensitivities(prepared, arguments, quiet()), plan, recipe.protection)
    protect(prepared, arguments, None, "mine", quiet())
    assert 0 < len(chosen) < len(plan)
    for name, (weight, activation) in observers(prepared).items():
        bits = (8, 8) if name in chosen else (4, 6)
        assert activation is not None
        assert (weight.config.bits, activation.config.bits) == bits
        item = prepared.meta[PLAN][name]
        assert (item.weight.bits, item.activation.bits) == bits
    assert prepared.meta[RECIPE].protection is None
    assert prepared.meta[RECIPE].config.overrides != recipe.config.overrides
    forget(prepared)
    assert (prepared.meta[RECIPE], prepared.meta[PLAN]) == (recipe, plan)
    assert {weight.config.bits for weight, _ in observers(prepared).values()} == {4}
    forget(prepared)  # a second time there is nothing to undo
    assert prepared.meta[RECIPE] == recipe


def test_the_written_overrides_make_the_same_plan(
    model: nn.Module, prepared: GraphModule, arguments: list[Tensor], samples: dmq_ao.CalibrationSet
) -> None:
    protect(prepared, arguments, None, "mine", quiet())
    written = Recipe.from_dict(prepared.meta[RECIPE].to_dict())
    again = dmq_ao.prepare(model, written, samples.example(), backend="reference")
    assert again.meta[PLAN] == prepared.meta[PLAN]


def test_a_second_calibration_starts_from_what_was_asked(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    recipe = dataclasses.replace(small(dmq_ao.recipes.default("w4a8"), 2), distillation=None)
    recipe = dataclasses.replace(recipe, protection=Protection(share=0.5))
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    first = prepared.meta[RECIPE]
    dmq_ao.calibrate(prepared, samples, progress=False)
    assert prepared.meta[RECIPE] == first
    assert first != recipe


# --- state -------------------------------------------------------------------


def test_what_was_measured_is_taken_from_the_file(
    prepared: GraphModule, arguments: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect(prepared, arguments, tmp_path, "mine", quiet())
    expected = prepared.meta[PLAN]
    forget(prepared)
    monkeypatch.setattr(sensitivity, "sensitivities", lambda *_: pytest.fail("measured again"))
    protect(prepared, arguments, tmp_path, "mine", quiet())
    assert prepared.meta[PLAN] == expected


def test_damaged_and_foreign_measurements(prepared: GraphModule, arguments: list[Tensor], tmp_path: Path) -> None:
    protect(prepared, arguments, tmp_path, "mine", quiet())
    forget(prepared)
    with pytest.raises(ValueError, match="belongs to another run"):
        protect(prepared, arguments, tmp_path, "theirs", quiet())
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(InvalidFile, match="not the sensitivities of a calibration"):
        protect(prepared, arguments, tmp_path, "mine", quiet())


def test_another_protection_is_another_run(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> None:
    for share in (0.5, 0.6):
        recipe = dataclasses.replace(dmq_ao.recipes.minmax("w4a8"), protection=Protection(share=share))
        prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
        if share == 0.5:
            dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
        else:
            with pytest.raises(ValueError, match="belongs to another run"):
                dmq_ao.calibrate(prepared, samples, state_dir=tmp_path, progress=False)
