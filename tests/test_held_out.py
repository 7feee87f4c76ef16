"""Nothing is fitted to the samples that are held out: they only decide when to stop and what to keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmq_ao
from dmq_ao.algorithms.holdout import held_out
from dmq_ao.algorithms.layer_rows import LayerRows
from dmq_ao.algorithms.moments import Moments
from dmq_ao.algorithms.rounding import round_by_learning
from dmq_ao.algorithms.sampled_rows import SampledRows, product
from dmq_ao.config import Recipe, Rounding, RoundingMethod, StepWeights, TensorConfig
from dmq_ao.observers import ALL_OBSERVERS

pytestmark = pytest.mark.usefixtures("captures_are_shared")
FLOAT_INPUTS = dmq_ao.recipes.minmax("w4a16")
POSITIONS = 64  # of each layer of the plain denoiser: fewer than a rounding looks at, so all of them count


def inputs_of(model: nn.Module, layer: str, samples: dmq_ao.CalibrationSet) -> Tensor:
    """What a layer of the float denoiser reads, [N, ...], all samples in order."""
    inputs: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in samples.batches(8):
            model(**batch)
    hook.remove()
    return torch.cat(inputs)


def moments_of(
    recipe: Recipe, layer: str, model: nn.Module, samples: dmq_ao.CalibrationSet, patch: pytest.MonkeyPatch
) -> tuple[Moments, SampledRows]:
    """What calibration sums over the samples for one layer, and the rows it holds out."""
    results: dict[str, tuple[list[Moments], SampledRows]] = {}
    whole = LayerRows.moments

    def watched(self: LayerRows, name: str, *args: Any, **options: Any) -> tuple[list[Moments], SampledRows]:
        results[name] = whole(self, name, *args, **options)
        return results[name]

    patch.setattr(LayerRows, "moments", watched)
    dmq_ao.calibrate(dmq_ao.prepare(model, recipe, samples.example(), backend="reference"), samples, progress=False)
    (moments,), rows = results[layer]
    return moments, rows


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(FLOAT_INPUTS, rounding=Rounding()),
        dataclasses.replace(FLOAT_INPUTS, rounding=Rounding(propagate_error=False)),
        dataclasses.replace(FLOAT_INPUTS, rounding=Rounding(RoundingMethod.ADAROUND, steps=1)),
        dataclasses.replace(FLOAT_INPUTS, bias_correction=True),
    ],
    ids=["feedback", "of the float network", "learned", "bias"],
)
def test_moments_are_of_the_other_samples(
    recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, rows = moments_of(recipe, "conv", model, samples, monkeypatch)
    held = held_out(len(samples), torch.Generator().manual_seed(0))
    assert 0 < int(held.sum()) < len(held)
    channels = inputs_of(model, "conv", samples).mean((2, 3))  # [N, C]
    # The middle tap of a 3x3 kernel sees every position once.
    assert torch.allclose(moments.mean_x()[4::9], channels[~held].mean(0), atol=1e-5)
    assert not torch.allclose(moments.mean_x()[4::9], channels.mean(0), atol=1e-3)
    assert moments.weight == pytest.approx(int((~held).sum()) * POSITIONS)
    assert len(rows.x) == int(held.sum())


def test_weighted_moments_leave_them_out_too(
    model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are one in the mean over all samples, those of a step alike: none of the held out ones is in the sum."""
    recipe = dataclasses.replace(FLOAT_INPUTS, rounding=Rounding(step_weights=StepWeights(gamma=2.0)))
    weights: list[Tensor] = []
    whole = LayerRows._sample_weights

    def watched(self: LayerRows, name: str, *args: Any) -> Tensor:
        weights.append(whole(self, name, *args))
        return weights[-1]

    monkeypatch.setattr(LayerRows, "_sample_weights", watched)
    moments, _ = moments_of(recipe, "conv", model, samples, monkeypatch)
    held = held_out(len(samples), torch.Generator().manual_seed(0))
    assert float(weights[0].std()) > 0.01
    assert moments.weight == pytest.approx(float(weights[0][~held].sum()) * POSITIONS, rel=1e-5)


def test_one_sample_is_fitted_to_and_held_out(
    model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(FLOAT_INPUTS, rounding=Rounding())
    moments, rows = moments_of(recipe, "conv", model, samples.select(torch.tensor([3])), monkeypatch)
    assert moments.weight == POSITIONS
    assert len(rows.x) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_roundings_do_not_see_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 8, generator=generator)
    x = torch.randn(16, 4, 1, 8, generator=generator)
    held = held_out(16, generator)
    config, rounding = TensorConfig(3), Rounding(RoundingMethod.ADAROUND, steps=30)

    def codes(y: Tensor) -> Tensor:
        rows = SampledRows(x, y, torch.arange(16) % 4, held)
        with torch.enable_grad():
            return round_by_learning(
                weight, config, ALL_OBSERVERS["minmax"], rows, rounding, 4, torch.Generator().manual_seed(0)
            ).codes

    y = product(x, weight)
    far = torch.where(held[:, None, None], y + 100, y)
    assert torch.equal(codes(y), codes(far))
    assert not torch.equal(codes(y), codes(y + 100 * ~held[:, None, None]))
