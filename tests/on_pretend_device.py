"""Calibration, conversion and files of a denoiser on a device that is not there; run by ``test_other_device.py``."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import relative, repeated_samples, small
from pretend_device import DEVICE, PretendDevice, There
from torch import Tensor, nn

import dmq_ao
from dmq_ao import CalibrationSet, QuantizedDenoiser, Recipe, recipes
from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.graph.arguments import moved_inputs
from dmq_ao.passes.place_on import place_on

pytestmark = pytest.mark.usefixtures("captures_are_shared")

Tiny = tuple[nn.Module, dict[str, Tensor]]
NETS = ["tiny_unet2d", "tinier_dit"]
RECIPES = {
    "votes": lambda: recipes.minmax("w4a8", power_of_two=True),
    "dmq": lambda: recipes.dmq("w4a8"),
    "dmq-reference": lambda: recipes.dmq("w4a8", compat="reference"),
    "eda_dm": lambda: recipes.eda_dm("w4a6"),
    "eda_dm-reference": lambda: recipes.eda_dm("w4a6", compat="reference"),
    "default": lambda: recipes.default("w4a6"),
    "mpq_dm": lambda: recipes.mpq_dm("w3a6"),
    "mpq_dm-reference": lambda: recipes.mpq_dm("w3a6", compat="reference"),
}
# What together goes through every stage; the rest is the slow tier's.
FEW = {("tinier_dit", "eda_dm"), ("tinier_dit", "default")}


def brief(recipe: Recipe) -> Recipe:
    """Every stage of a recipe, two steps of each, on ranges that are found at once."""
    recipe = small(recipe, 2)
    config = dataclasses.replace(recipe.config, weight=dataclasses.replace(recipe.config.weight, observer="minmax"))
    last = None if recipe.distillation is None else dataclasses.replace(recipe.distillation, relation=None)
    return dataclasses.replace(recipe, config=config, distillation=last)


def calibrated(
    model: nn.Module, samples: CalibrationSet, recipe: Recipe, device: torch.device, backend: str, **options: Any
) -> QuantizedDenoiser:
    """The denoiser in integers, calibrated on a device."""
    prepared = dmq_ao.prepare(model, brief(recipe), samples.example(), backend="reference")
    place_on(prepared, device)
    dmq_ao.calibrate(prepared, samples, progress=False, **options)
    return dmq_ao.convert(prepared, backend)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    """And lets through what it lets through."""
    with PretendDevice():
        there = torch.arange(3.0, device=DEVICE)
        with pytest.raises(RuntimeError, match="on one device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="on one device"):
            torch.arange(3.0)[there.long()]
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        assert (there[torch.tensor([2, 0])] + torch.tensor(1.0)).tolist() == [3.0, 1.0]
        assert there.cpu().device.type == "cpu"


@pytest.mark.parametrize(
    ("net", "name"),
    [
        pytest.param(net, name, marks=() if (net, name) in FEW else pytest.mark.slow)
        for net in NETS
        for name in RECIPES
    ],
)
def test_calibration_finds_what_it_finds_on_the_cpu(net: str, name: str, request: pytest.FixtureRequest) -> None:
    model, inputs = request.getfixturevalue(net)
    samples = repeated_samples(inputs, noise=0.3)
    here = calibrated(model, samples, RECIPES[name](), torch.device("cpu"), "reference")
    with PretendDevice():
        there = calibrated(model, samples, RECIPES[name](), DEVICE, "reference")
        actual = there(**moved_inputs(inputs, DEVICE)).sample.cpu()
    expected = model(**inputs).sample
    # A last bit moves a code and with it what comes after, so it is not the same codes, but codes as good.
    assert relative(actual, expected) < 1.1 * relative(here(**inputs).sample, expected) + 0.01


@pytest.mark.parametrize(
    "name", ["eda_dm", *(pytest.param(one, marks=pytest.mark.slow) for one in ("default", "mpq_dm-reference"))]
)
def test_values_on_disk_and_a_resumed_run_come_back_to_the_device(name: str, tinier_dit: Tiny, tmp_path: Path) -> None:
    model, inputs = tinier_dit
    samples = repeated_samples(inputs, noise=0.3)
    options = {"state_dir": tmp_path, "max_memory": 0}
    with PretendDevice():
        first, resumed = (
            calibrated(model, samples, RECIPES[name](), DEVICE, "reference", **options)(
                **moved_inputs(inputs, DEVICE)
            ).sample.cpu()
            for _ in range(2)
        )
    assert torch.equal(first, resumed)


@pytest.mark.parametrize("name", ["votes", pytest.param("default", marks=pytest.mark.slow)])
def test_kernels_and_files_hold_everything_where_it_runs(
    name: str, tiny_unet2d: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "why_not_here", lambda device: "")
    model, inputs = tiny_unet2d
    with PretendDevice():
        lowered = calibrated(model, repeated_samples(inputs, noise=0.3), RECIPES[name](), DEVICE, "cuda")
        assert any(kernel.is_integer for kernel in lowered.kernels.values())
        assert all(isinstance(one, There) for one in lowered.graph_module.state_dict().values())
        dmq_ao.save(lowered, tmp_path)
        loaded = dmq_ao.load(tmp_path, backend="reference", device=DEVICE)
        there = loaded(**moved_inputs(inputs, DEVICE)).sample.cpu()
    here = dmq_ao.load(tmp_path, backend="reference")(**inputs).sample
    assert relative(there, here) < 0.05


@pytest.mark.parametrize("select", ["uniform", "tdac"])
def test_what_is_recorded_there_lies_on_the_cpu(select: str, tinier_dit: Tiny) -> None:
    model, inputs = tinier_dit

    @torch.no_grad()
    def recorded(net: nn.Module, device: torch.device) -> CalibrationSet:
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        with dmq_ao.record(net, 8, select=select) as recorder:
            for row in noise.split(2):
                for timestep in (900, 300):
                    labels = inputs["class_labels"].to(device)
                    net(hidden_states=row, timestep=torch.tensor([timestep] * 2).to(device), class_labels=labels)
        return recorder.calibration_set()

    expected = recorded(model, torch.device("cpu"))
    with PretendDevice():
        actual = recorded(copy.deepcopy(model).to(DEVICE), DEVICE)
    assert actual.digest() == expected.digest()
