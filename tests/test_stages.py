"""The table of stages: nothing that a recipe can ask for is forgotten by the run, the digest or the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from plain import small
from torch import nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao.api import stages
from dmq_ao.api.report import CalibrationReport
from dmq_ao.api.stages import STAGES
from dmq_ao.config import (
    BitAllocation,
    BlockReconstruction,
    ChannelScaling,
    Distillation,
    Protection,
    Recipe,
    Rounding,
)
from dmq_ao.mixed_precision.bit_plan import BitPlan, InputBits
from dmq_ao.mixed_precision.search_bits import apply_bits
from dmq_ao.quantizer.prepared import observers, reset, state_of

pytestmark = pytest.mark.usefixtures("captures_are_shared")
PLAIN = dmq_ao.recipes.minmax("w4a6")
MAY_BE_EMPTY = {"resumed", "votes", "blocks"}  # of the stage that several fields ask for
SMALLEST: dict[str, Any] = {
    "scaling": ChannelScaling(steps=1),
    "rounding": Rounding(),
    "bias_correction": True,
    "blocks": BlockReconstruction(steps=1),
    "protection": Protection(share=0.5),
    "allocation": BitAllocation(least_gain=0.0),
    "distillation": Distillation(steps=1, checks=1),
}


def recipe_of(stage: str) -> Recipe:
    return small(dataclasses.replace(PLAIN, **{stage: SMALLEST[stage]}), 1)


def prepared_for(model: nn.Module, recipe: Recipe, samples: dmq_ao.CalibrationSet) -> GraphModule:
    return dmq_ao.prepare(model, recipe, samples.example(), backend="reference")


def test_every_stage_of_a_recipe_is_run_by_one_row_of_the_table() -> None:
    rows = [name for stage in STAGES for name in stage.fields]
    assert sorted(rows) == sorted(PLAIN.stages) == sorted(SMALLEST)


def test_every_field_of_the_report_is_filled_by_a_stage_or_by_calibrate() -> None:
    own = {"samples", "seconds", "sqnr_db", "peak_bytes"}
    fields = {item.name for item in dataclasses.fields(CalibrationReport)}
    assert {name for stage in STAGES for name in stage.reports} == fields - own
    assert set(CalibrationReport(0, 0.0, resumed=False).to_dict()) == fields


@pytest.mark.parametrize("stage", SMALLEST)
def test_a_stage_is_asked_for_learns_and_says_so(
    stage: str, model: nn.Module, samples: dmq_ao.CalibrationSet, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = recipe_of(stage)
    assert recipe.learns
    assert recipe.asks_for(stage)
    assert not PLAIN.asks_for(stage)
    (row,) = [row for row in STAGES if stage in row.fields]
    report = dmq_ao.calibrate(prepared_for(model, recipe, samples), samples, state_dir=tmp_path)
    assert f"{row.label}:" in capsys.readouterr().err
    assert all(getattr(report, name) for name in row.reports if name not in MAY_BE_EMPTY)
    with pytest.raises(ValueError, match="belongs to another run"):  # a recipe without the stage is another recipe
        dmq_ao.calibrate(prepared_for(model, PLAIN, samples), samples, state_dir=_like_ranges(tmp_path))


def _like_ranges(folder: Path) -> Path:
    """The state of a run, under the name that a recipe without stages reads."""
    state = min(folder.rglob("*.safetensors"))
    (folder / "calibration.safetensors").write_bytes(state.read_bytes())
    return folder


def test_a_recipe_without_stages_watches_only(
    model: nn.Module, samples: dmq_ao.CalibrationSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not PLAIN.learns
    report = dmq_ao.calibrate(prepared_for(model, PLAIN, samples), samples)
    shown = capsys.readouterr().err
    assert "calibrate:" in shown
    others = [row for row in STAGES if row.fields]
    assert not any(f"{row.label}:" in shown for row in others if row.label != "calibrate")
    own = {name for row in STAGES if not row.fields for name in row.reports}
    assert not any(getattr(report, name) for row in others for name in row.reports if name not in own)


def test_bits_are_in_the_plan_of_every_layer_that_reads_the_input(
    model: nn.Module, samples: dmq_ao.CalibrationSet
) -> None:
    prepared = prepared_for(model, PLAIN, samples)
    before = dict(state_of(prepared).plan)
    name = next(iter(observers(prepared)))
    watcher = observers(prepared)[name][1]
    siblings = [other for other, (_, activation) in observers(prepared).items() if activation is watcher]
    apply_bits(prepared, BitPlan({}, "error_gain", {name: InputBits(1, 5)}))
    for other, item in state_of(prepared).plan.items():
        expected = 5 if other in siblings else before[other].activation and before[other].activation.bits
        assert (item.activation and item.activation.bits) == expected
        if other in observers(prepared):
            assert observers(prepared)[other][1].config is item.activation  # type: ignore[union-attr]
    reset(prepared)
    assert state_of(prepared).plan == before


def test_a_calibration_that_failed_is_not_converted(
    model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_for(model, PLAIN, samples)
    dmq_ao.calibrate(prepared, samples, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "observe", _fail)
        with pytest.raises(RuntimeError, match="no memory"):
            dmq_ao.calibrate(prepared, samples, progress=False)
    with pytest.raises(dmq_ao.MissingStatistics, match="failed or was interrupted, .* run calibrate"):
        dmq_ao.convert(prepared)
    dmq_ao.calibrate(prepared, samples, progress=False)
    dmq_ao.convert(prepared)


def _fail(*_: object) -> bool:
    raise RuntimeError("no memory")
