"""The numbers of the published methods, each beside the place that states it.

Sources: DMQ is arXiv 2507.12933 and github.com/LeeDongYeun/dmq, EDA-DM is arXiv 2401.04585 and
github.com/BienLuky/EDA-DM, MPQ-DM is arXiv 2412.11549 and github.com/cantbebetter2/MPQ-DM. Where a script and the
default of its option differ, the script's is meant.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import reduce
from typing import Any

import pytest
import torch

from dmq_ao import config, recipes
from dmq_ao.config import Init, LeftOut, Ranges, Reduce, RoundingMethod, Scope, Scorer, SelectMethod, Ties, Weighting
from dmq_ao.objectives import temperature
from dmq_ao.observers import adaround, ema, mse

DMQ_STEPS, CHECK_EVERY = 20, 20  # of the sampler; gradient steps between two looks at held-out samples

RECIPES = {
    "dmq": recipes.dmq("w4a8", compat="reference"),
    "eda_dm": recipes.eda_dm("w4a8", compat="reference"),
    "mpq_dm": recipes.mpq_dm("w3a6", compat="reference"),
    "our dmq": recipes.dmq("w4a8"),
    "our eda_dm": recipes.eda_dm("w4a8"),
    "our mpq_dm": recipes.mpq_dm("w3a6"),
    "feedback": recipes.default("w4a8"),
}

PUBLISHED: list[tuple[str, str, Any, str]] = [
    # DMQ: learned equivalent scaling
    ("dmq", "scaling.layers", ("*",), "quant_model.py: every quantized layer but the first and the last"),
    ("dmq", "scaling.steps", 6000, "run_quant.py --iters_scale"),
    ("dmq", "scaling.lr", 1e-3, "run_quant.py --lr_les"),
    ("dmq", "scaling.batch_size", 32, "paper, Table 8: B"),
    ("dmq", "scaling.init", Init.ONES, "quant_layer.py: tau starts at 1"),
    ("dmq", "scaling.patience", 6000 // CHECK_EVERY, "no early stop: as many checks as there are"),
    ("dmq", "scaling.logarithm", False, "quant_layer.py: tau itself is learned"),
    ("dmq", "scaling.batch_ranges", True, "quantizer.py with --dynamic: the range of the mini-batch as a whole"),
    # DMQ: adaptive timestep weighting
    ("dmq", "scaling.step_weights.kind", Weighting.FOCAL, "paper, adaptive timestep weighting"),
    ("dmq", "scaling.step_weights.gamma", 20.0, "scripts: --r 20 (LSUN-Church 25)"),
    ("dmq", "scaling.step_weights.momentum", 0.95, "paper, Table 8; run_quant.py --momentum"),
    ("dmq", "scaling.step_weights.reduce", Reduce.SUM, "reconstruction_util.py: a sum over the samples of a step"),
    # DMQ: rounding
    ("dmq", "rounding.method", RoundingMethod.ADAROUND, "paper, on top of BRECQ"),
    ("dmq", "rounding.steps", 20_000, "calibration.py, hard-coded"),
    ("dmq", "rounding.lr", 1e-3, "run_quant.py --lr_les, which this phase reads as well"),
    ("dmq", "rounding.batch_size", 32, "paper, Table 8: B"),
    ("dmq", "rounding.regularizer", 0.01, "reconstruction.py: weight of the rounding loss"),
    ("dmq", "rounding.warmup", 0.2, "reconstruction.py: warm-up"),
    ("dmq", "rounding.quantize_inputs", False, "calibration.py, third phase: activations in float"),
    ("dmq", "rounding.compensate", True, "calibration.py: the target is the float layer's output"),
    ("dmq", "rounding.step_weights.kind", Weighting.UNIFORM, "reconstruction_util.py: plain mean in this phase"),
    # DMQ: power-of-two scaling
    ("dmq", "config.power_of_two.layers", ("@concat",), "scripts: --ptf_layers skip_connection; paper, Table 7"),
    ("dmq", "config.power_of_two.agreement", 0.85, "paper, Table 8: kappa; run_quant.py --ratio_threshold"),
    ("dmq", "config.power_of_two.max_exponent", 3, "paper, Table 8: D"),
    ("dmq", "config.power_of_two.guard", False, "quantizer.py: the vote alone decides"),
    ("dmq", "config.power_of_two.ties", Ties.FINE, "quantizer.py: argmin and mode take the finest step first"),
    ("dmq", "config.power_of_two.per_step", True, "calibration.py, fourth phase: a vote for each step"),
    # DMQ: grids and samples
    ("dmq", "config.weight.observer", "mse", "quant_utils.py: search over 80 shrinks"),
    ("dmq", "config.weight.symmetric", False, "quantizer.py: asymmetric per output channel"),
    ("dmq", "config.activation.observer", "ema", "quantizer.py: moving average of batch extremes"),
    ("dmq", "config.activation.ranges", Ranges.PER_STEP, "calibration.py, fourth phase: 20 parameter sets"),
    ("dmq", "config.activation.symmetric", False, "quantizer.py: asymmetric per tensor"),
    ("dmq", "split_concat", True, "scripts: --use_split"),
    ("dmq", "num_samples", 256 * DMQ_STEPS, "paper, Table 8: n = 256 at each of T = 20 steps"),
    ("dmq", "select.method", SelectMethod.UNIFORM, "data_generate.py: as many at every step"),
    ("dmq", "bias_correction", False, "quant_layer.py: biases untouched"),
    # EDA-DM: temporal distribution-aligned calibration
    ("eda_dm", "select.method", SelectMethod.TDAC, "paper, temporal distribution-aligned calibration"),
    ("eda_dm", "select.radius", 3.0, "calibration.py, CIFAR and ImageNet"),
    ("eda_dm", "select.diversity_weight", 1.2, "for_cifar.sh --lamda"),
    ("eda_dm", "select.minimum", 0, "calibration.py: a step may get none"),
    ("eda_dm", "select.reference_rounding", True, "calibration.py: round half to even, then mend the sum"),
    ("eda_dm", "num_samples", 1024, "scripts: --calib_num_samples"),
    # EDA-DM: fine-grained block reconstruction
    ("eda_dm", "blocks.layer_weight", 0.8, "scripts: --add_loss (0.8 or 1.0)"),
    ("eda_dm", "blocks.left_out", LeftOut.REGISTRATION, "block_recon.py: all but the layer registered last"),
    ("eda_dm", "blocks.steps", 5000, "sample_diffusion_ddim.py: iterations on CIFAR"),
    ("eda_dm", "blocks.batch_size", 32, "block_recon.py"),
    ("eda_dm", "blocks.lr", 0.5, "for_cifar.sh --lr_w at W4A8"),
    ("eda_dm", "blocks.lr_activation", 5e-4, "for_cifar.sh --lr_a at W4A8"),
    ("eda_dm", "blocks.drop", 0.5, "quant_layer.py: QDrop's probability"),
    ("eda_dm", "blocks.mix", 0.5, "block_recon.py: input_prob"),
    ("eda_dm", "blocks.regularizer", 0.0, "block_recon.py: loss_mode 'none'"),
    ("eda_dm", "blocks.patience", 5000 // CHECK_EVERY, "no early stop: as many checks as there are"),
    ("eda_dm", "blocks.step_weights.kind", Weighting.UNIFORM, "block_recon.py: every sample alike"),
    # EDA-DM: grids
    ("eda_dm", "config.weight.symmetric", True, "scripts: a_sym is off, which selects the symmetric grid"),
    ("eda_dm", "config.weight.observer", "mse", "quant_layer.py: range of least error"),
    ("eda_dm", "config.activation.observer", "mse", "quant_layer.py: range of least error"),
    ("eda_dm", "config.activation.ranges", Ranges.STATIC, "paper: one set of scales for all steps"),
    ("eda_dm", "config.attention.bits", 8, "quant_block.py: queries, keys and values at --act_bit"),
    ("eda_dm", "config.attention.softmax_bits", 8, "scripts: --sm_abit"),
    ("eda_dm", "config.overrides.0.activation.bits", 8, "quant_model.py: the first layer at 8 bits"),
    ("eda_dm", "config.overrides.1.weight.bits", 8, "quant_model.py: the last layer at 8 bits"),
    ("eda_dm", "split_concat", True, "scripts: --split"),
    # MPQ-DM: outlier-driven mixed quantization
    ("mpq_dm", "scaling.steps", 0, "quant_layer.py: the closed form alone"),
    ("mpq_dm", "scaling.init", Init.CLOSED_FORM, "paper, OMQ: sqrt(max |X| / max |W|)"),
    ("mpq_dm", "scaling.migration", 0.5, "paper, OMQ: the root of the ratio"),
    ("mpq_dm", "allocation.scorer", Scorer.KURTOSIS, "paper, OMQ"),
    ("mpq_dm", "allocation.scope", Scope.LAYER, "quant_layer.py: every layer keeps its mean"),
    ("mpq_dm", "allocation.groups", 1, "quant_layer.py: none or a tenth of the channels"),
    ("mpq_dm", "allocation.mean_bits", None, "paper, OMQ: equally many up and down"),
    ("mpq_dm", "config.weight.observer", "mse", "quant_layer.py: the final quantizers"),
    ("mpq_dm", "config.weight.symmetric", False, "quant_layer.py: asymmetric"),
    ("mpq_dm", "config.activation.ranges", Ranges.PER_STEP, "quant_layer.py: delta_list, a row for each step"),
    ("mpq_dm", "split_concat", False, "quant_model.py: skip connections are not split"),
    # MPQ-DM: time-smoothed relation distillation
    ("mpq_dm", "select.window", 2, "ddim.py: two sampler steps"),
    ("mpq_dm", "distillation.rank", 32, "quant_layer.py: rank of the updates"),
    ("mpq_dm", "distillation.relation.weight", 100.0, "ddim.py: 100 times the divergence"),
    ("mpq_dm", "distillation.relation.window", 2, "ddim.py: two sampler steps"),
    ("mpq_dm", "distillation.relation.temperature", 1.0, "ddim.py: plain softmax"),
    ("mpq_dm", "distillation.relation.reduce", Reduce.SUM, "ddim.py: sum over rows"),
    # What our own recipes keep of them
    ("our dmq", "scaling.step_weights.gamma", 20.0, "DMQ scripts: --r 20"),
    ("our dmq", "scaling.step_weights.momentum", 0.95, "DMQ paper, Table 8"),
    ("our dmq", "scaling.step_weights.reduce", Reduce.MEAN, "ours: counts may be uneven"),
    ("our dmq", "config.power_of_two.agreement", 0.85, "DMQ paper, Table 8: kappa"),
    ("our dmq", "config.power_of_two.max_exponent", 3, "DMQ paper, Table 8: D"),
    ("our dmq", "config.power_of_two.ties", Ties.COARSE, "ours: a channel without a preference is not scaled"),
    ("our dmq", "config.power_of_two.guard", True, "ours: a vote may not raise the error"),
    ("our dmq", "rounding.regularizer", 0.01, "DMQ reconstruction.py"),
    ("our dmq", "rounding.warmup", 0.2, "DMQ reconstruction.py"),
    ("our eda_dm", "select.diversity_weight", 1.0, "EDA-DM for_bedroom.sh and for_church.sh --lamda"),
    ("our eda_dm", "blocks.layer_weight", 0.8, "EDA-DM scripts: --add_loss"),
    ("our eda_dm", "blocks.drop", 0.5, "EDA-DM quant_layer.py"),
    ("our eda_dm", "blocks.mix", 0.5, "EDA-DM block_recon.py: input_prob"),
    ("our eda_dm", "blocks.regularizer", 0.01, "DMQ reconstruction.py: EDA-DM has none, and loses what it learned"),
    ("our eda_dm", "blocks.warmup", 0.2, "DMQ reconstruction.py"),
    ("our mpq_dm", "scaling.migration", 0.5, "MPQ-DM paper, OMQ"),
    ("our mpq_dm", "distillation.rank", 32, "MPQ-DM quant_layer.py"),
    ("our mpq_dm", "distillation.relation.window", 2, "MPQ-DM ddim.py"),
    ("our mpq_dm", "distillation.relation.temperature", 1.0, "MPQ-DM ddim.py"),
    ("our mpq_dm", "distillation.relation.weight", 100.0, "MPQ-DM ddim.py"),
    ("feedback", "rounding.damping", 0.01, "GPTQ, arXiv 2210.17323, section 3.3: one percent of the mean diagonal"),
]

# Numbers of the stages above that no paper states, or that are not followed: the docstring of each recipe says which.
OURS = {
    "dmq": {
        *("scaling.positions", "scaling.outputs", "scaling.migration", "scaling.limit"),
        *("rounding.positions", "rounding.damping", "rounding.step_weights.gamma", "rounding.step_weights.momentum"),
    },
    "eda_dm": {
        *("select.quantile", "select.mean", "select.deviation", "select.pilot", "select.window"),
        *("blocks.warmup", "blocks.step_weights.gamma", "blocks.step_weights.momentum"),
    },
    "mpq_dm": {
        *(f"scaling.{name}" for name in ("lr", "batch_size", "positions", "outputs", "limit", "patience")),
        *("scaling.step_weights.gamma", "scaling.step_weights.momentum"),
        *("allocation.least_gain", "allocation.samples"),
        *(f"distillation.{name}" for name in ("steps", "passes", "lr", "batch_size", "checks", "lr_rank")),
        *(f"select.{name}" for name in ("diversity_weight", "quantile", "mean", "deviation", "pilot", "minimum")),
    },
}


def at(recipe: config.Recipe, path: str) -> Any:
    """The value at a dotted path; a number is a place in a tuple."""
    return reduce(lambda one, name: one[int(name)] if name.isdigit() else getattr(one, name), path.split("."), recipe)


@pytest.mark.parametrize(
    ("recipe", "path", "value", "source"), PUBLISHED, ids=[f"{recipe}.{path}" for recipe, path, *_ in PUBLISHED]
)
def test_a_number_is_the_published_one(recipe: str, path: str, value: Any, source: str) -> None:
    actual = at(RECIPES[recipe], path)
    assert actual == value, f"{source} says {value}"
    assert type(actual) is type(value)


def numbers(value: Any, path: str) -> list[str]:
    """Dotted paths of the numbers, not the choices, of a stage."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return [one for field in fields for one in numbers(getattr(value, field.name), f"{path}.{field.name}")]
    return [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.parametrize("name", OURS)
def test_every_number_of_a_published_recipe_has_a_source_or_is_known_to_be_ours(name: str) -> None:
    recipe = RECIPES[name]
    stages = ("scaling", "rounding", "blocks", "allocation", "distillation", "config.power_of_two", "config.attention")
    if recipe.select != config.Selection():
        stages = ("select", *stages)
    paths = {one for stage in stages for one in numbers(at(recipe, stage), stage)}
    sourced = {path for one, path, *_ in PUBLISHED if one == name}
    assert paths - sourced == OURS[name]


# --- what stands in the code, not in a recipe --------------------------------


def test_the_search_of_a_weight_range() -> None:
    """DMQ and MPQ-DM: 80 shrinks of a hundredth, errors to the power of 2.4 (quant_utils.py)."""
    assert mse.SHRINKS.tolist() == pytest.approx([1 - i / 100 for i in range(80)])
    assert mse.POWER == 2.4


def test_the_moving_average_of_ranges() -> None:
    """DMQ quantizer.py: 0.95 of what is stored, 0.05 of the batch."""
    assert ema.MOMENTUM == 0.95
    average = ema.MovingAverage()
    for high in (1.0, 3.0):
        average.update(torch.tensor([-1.0, high]))
    assert float(average.range(8)[1]) == pytest.approx(0.95 * 1 + 0.05 * 3)


def test_the_stretch_of_soft_roundings() -> None:
    """AdaRound, arXiv 2004.10568, eq. 23: zeta 1.1 and gamma -0.1."""
    assert (adaround.STRETCH_LOW, adaround.STRETCH_HIGH) == (-0.1, 1.1)


def test_the_temperature_of_roundings() -> None:
    """DMQ reconstruction.py: beta from 20 down to 2 after the warm-up."""
    defaults = inspect.signature(temperature).parameters
    assert (defaults["start"].default, defaults["stop"].default) == (20.0, 2.0)


@pytest.mark.parametrize("name", ["dmq", "eda_dm", "mpq_dm"])
def test_a_published_recipe_says_so_by_name(name: str) -> None:
    assert RECIPES[name].name == f"{name}-reference"
    assert RECIPES[f"our {name}"].name == name
