"""Which layer gets which integers, where the graph decides: ranges per timestep, embeddings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import OWN, Case, built
from plain import relative
from torch import Tensor

import dmq_ao
from dmq_ao import recipes
from dmq_ao.config import MAX_INPUT_BITS, Override, Ranges, Recipe
from dmq_ao.quantizer.prepared import state_of
from dmq_ao.records import LayerPlan

pytest.importorskip("diffusers")
PER_STEP = recipes.minmax("w8a8", ranges=Ranges.PER_STEP)
EMBEDDINGS = recipes.minmax("w8a8", ranges=Ranges.PER_STEP, embeddings=True)


def plan_of(case: Case, recipe: Recipe) -> dict[str, LayerPlan]:
    return dict(state_of(dmq_ao.prepare(case.model, recipe, case.inputs(2, 2))).plan)


def ranges_of(plan: dict[str, LayerPlan]) -> dict[str, Ranges]:
    return {name: item.activation.ranges for name, item in plan.items() if item.activation is not None}


def quantized(case: Case, recipe: Recipe) -> tuple[dmq_ao.QuantizedDenoiser, dmq_ao.CalibrationSet]:
    """The case quantized on a few states of one prompt."""
    inputs = case.inputs(2, 2)
    sample = "sample" if "sample" in inputs else "hidden_states"
    with dmq_ao.record(case.model, num_samples=6) as recorder, torch.no_grad():
        for factor in (0.5, 0.8, 1.2):
            case.model(**inputs | {sample: inputs[sample] * factor})
    samples = recorder.calibration_set()
    prepared = dmq_ao.prepare(case.model, recipe, samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    return dmq_ao.convert(prepared), samples


def test_text_has_one_range_for_all_timesteps() -> None:
    ranges = ranges_of(plan_of(built("sd3"), PER_STEP))
    assert ranges["context_embedder"] is Ranges.STATIC
    assert ranges["transformer_blocks.0.attn.to_q"] is Ranges.PER_STEP


@pytest.mark.slow
def test_frames_and_pixels_have_no_timestep_of_their_own() -> None:
    """Rows that are frames or pixels were an error of calibration."""
    case = built("unet3d")
    net, _ = quantized(case, PER_STEP)
    ranges = ranges_of(net.plan)
    assert {ranges[f"mid_block.{name}"] for name in ("resnets.0.conv1", "attentions.0.proj_in")} == {Ranges.STATIC}
    assert ranges["mid_block.temp_convs.0.conv1.2"] is Ranges.PER_STEP  # [B, C, F, H, W]
    for batch, size in ((1, 2), (3, 2)):
        assert error(net, case, batch, size) < 0.02


def error(net: dmq_ao.QuantizedDenoiser, case: Case, batch: int, size: int) -> float:
    inputs = case.inputs(batch, size)
    with torch.no_grad():
        expected: Tensor = case.model(**inputs, return_dict=False)[0]
        return relative(net(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize(
    "name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in OWN if name not in ("sd3", "flux"))]
)
def test_embeddings_on_integers_take_prompts_that_calibration_did_not_see(name: str) -> None:
    case = built(name)
    net, _ = quantized(case, EMBEDDINGS)
    embeddings = [row for row in net.layer_reports() if row["activation_bits"] == MAX_INPUT_BITS]
    assert len(embeddings) >= 3
    assert {row["weight_bits"] for row in embeddings} == {8}
    floats, _ = quantized(case, PER_STEP)
    assert net.mean_bits < floats.mean_bits
    for batch, size in ((2, 2), (1, 2), (3, 2)):
        torch.manual_seed(batch)
        with_integers = error(net, case, batch, size)
        torch.manual_seed(batch)
        assert with_integers < 1.5 * error(floats, case, batch, size) + 0.005


def test_an_override_that_keeps_float_wins_over_the_recipes() -> None:
    recipe = recipes.default("w8a8")
    kept = Override("time_text_embed.timestep_embedder.*", keep_float=True)
    config = dataclasses.replace(recipe.config, overrides=(*recipe.config.overrides, kept))
    plan = plan_of(built("sd3"), dataclasses.replace(recipe, config=config))
    assert plan["time_text_embed.timestep_embedder.linear_1"].weight is None
    assert plan["time_text_embed.timestep_embedder.linear_1"].why.startswith("override 'time_text_embed")
    assert plan["time_text_embed.text_embedder.linear_1"].weight is not None
