"""What is the same in every sample: one prompt, one guidance scale, one timestep; families of diffusers, recipes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import built
from plain import relative, small
from torch import Tensor, nn

import dmq_ao
from dmq_ao import CalibrationSet, recipes
from dmq_ao.graph.arguments import flatten_inputs

pytest.importorskip("diffusers")
# What is the same in all samples of each family, the timestep of a one-step sampler apart.
CONDITIONS = {
    "flux": ("encoder_hidden_states", "pooled_projections", "guidance"),
    "sdxl": ("encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"),
    "sd3": ("encoder_hidden_states", "pooled_projections"),
    "pixart": ("encoder_hidden_states", "encoder_attention_mask"),
    "sana": ("encoder_hidden_states",),
    "wan": ("encoder_hidden_states",),
}

FAST = [("flux", 1)]  # the others, by ``pytest -m slow``


def constant_samples(inputs: dict[str, Any], same: tuple[str, ...], steps: int) -> CalibrationSet:
    """Sixteen rows at so many steps, those of ``same`` all alike; ids of tokens have no rows."""
    flat = {name: x for name, x in flatten_inputs(inputs).items() if isinstance(x, Tensor)}
    timestep = flat.pop("timestep")
    shared = {name: flat.pop(name) for name in ("img_ids", "txt_ids") if name in flat}
    rows = {name: x[:1].expand(16, *x.shape[1:]).clone() if name in same else x for name, x in flat.items()}
    step = torch.arange(16) * steps // 16
    times = torch.linspace(0.9, 0.1, steps) if timestep.is_floating_point() else torch.arange(900, 0, -900 // steps)
    return CalibrationSet(rows, shared, times[:steps][step], step)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param(name, steps, marks=() if (name, steps) in FAST else pytest.mark.slow)
        for name in CONDITIONS
        for steps in (1, 4)
    ],
)
def test_one_prompt(name: str, steps: int) -> None:
    case = built(name)
    samples = constant_samples(case.inputs(16, 2), CONDITIONS[name], steps)
    _calibrate(case.model, small(recipes.default("w4a8"), 4), samples)


@pytest.mark.parametrize(
    "recipe", ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mpq_dm", "eda_dm", "dmq"))]
)
def test_one_step(recipe: str, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    samples = CalibrationSet(
        {"sample": torch.randn(16, 3, 16, 16)}, {}, torch.full((16,), 999), torch.zeros(16).long()
    )
    chosen = small(recipes.ALL_RECIPES[recipe]("w4a8"), 4)
    if chosen.distillation is not None and chosen.distillation.relation is not None:  # windows need two steps
        chosen = dataclasses.replace(chosen, distillation=dataclasses.replace(chosen.distillation, relation=None))
    _calibrate(tiny_unet2d[0], chosen, samples)


def _calibrate(model: nn.Module, recipe: dmq_ao.Recipe, samples: CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    denoiser = dmq_ao.convert(prepared, "reference")
    inputs = samples.example(16)
    with torch.no_grad():
        ours, wanted = (denoiser(**inputs), model(**inputs))
    ours, wanted = (one if isinstance(one, Tensor) else one[0] for one in (ours, wanted))
    assert bool(torch.isfinite(ours).all())
    assert relative(ours, wanted) < 0.5


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_windows_longer_than_the_sampler_are_as_long_as_it(
    steps: int, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """What is smoothed over three steps is smoothed over those there are, and says so."""
    model, message = (
        tiny_unet2d[0],
        f"a window is 3 timesteps in a row, .* at {steps}: windows have {steps} here.*unif",
    )
    with dmq_ao.record(model, 8, select=dmq_ao.Selection(window=3)) as recorder, torch.no_grad():
        for _ in range(3):
            for timestep in range(steps):
                model(torch.randn(2, 3, 16, 16), torch.full((2,), 900 - 100 * timestep))
    with pytest.warns(UserWarning, match=message):
        samples = recorder.calibration_set()
    assert len(samples) == (6 if steps == 1 else 8)
    with pytest.warns(UserWarning, match=message):
        earlier = samples.earlier(3)
    assert earlier.shape == (len(samples), steps - 1)
    assert int((earlier >= 0).sum()) == (0 if steps == 1 else 4)
    recipe = small(recipes.mpq_dm("w4a8"))
    assert recipe.distillation is not None
    assert recipe.distillation.relation is not None
    relation = dataclasses.replace(recipe.distillation.relation, window=3)
    recipe = dataclasses.replace(recipe, distillation=dataclasses.replace(recipe.distillation, relation=relation))
    with pytest.warns(UserWarning, match=message):
        _calibrate(model, recipe, samples)


def test_calls_with_other_arguments_say_which() -> None:
    class Hinted(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, hint: Tensor | None = None) -> Tensor:
            return sample if hint is None else sample + hint

    denoiser, x = Hinted(), torch.randn(2, 3, 4, 4)
    for first, message in ((None, r"\['hint'\] came and none went"), (x, r"none came and \['hint'\] went")):
        with dmq_ao.record(denoiser):
            denoiser(x, torch.zeros(2), **({} if first is None else {"hint": x}))
            with pytest.raises(ValueError, match=message):
                denoiser(x, torch.zeros(2), **({"hint": x} if first is None else {}))
