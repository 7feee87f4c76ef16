"""Published methods and plain baselines, each a function that returns a ``Recipe``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from dmq_ao.config import (
    FLOAT_BITS,
    MAX_BITS,
    MAX_INPUT_BITS,
    AttentionConfig,
    BitAllocation,
    BlockReconstruction,
    ChannelScaling,
    Distillation,
    Granularity,
    Init,
    LeftOut,
    Override,
    PowerOfTwo,
    Protection,
    QuantConfig,
    Ranges,
    Recipe,
    Reduce,
    Relation,
    Rounding,
    RoundingMethod,
    Scope,
    Scorer,
    Selection,
    SelectMethod,
    StepWeights,
    TensorConfig,
    Ties,
    Weighting,
)

# Up to here a symmetric grid wastes too much on one-sided channels, and asymmetric codes still shift into int8.
LAST_ASYMMETRIC_BITS = 4
FLOAT8_SUFFIX = "-fp8"


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a scheme such as ``"w4a8"``; 16 means float, and 9 to 12 are for activations.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", bits.lower())
    widths = tuple(int(group) for group in match.groups()) if match else (0, 0)
    limits = (MAX_BITS, MAX_INPUT_BITS)
    if any(not (1 <= width <= most or width == FLOAT_BITS) for width, most in zip(widths, limits, strict=True)):
        raise ValueError(
            f"bits must look like 'w4a8' (1 to {MAX_BITS} bits each, activations up to {MAX_INPUT_BITS}, or"
            f" {FLOAT_BITS} for float), got {bits!r}"
        )
    return widths[0], widths[1]


def minmax(
    bits: str = "w8a8",
    *,
    power_of_two: PowerOfTwo | bool = False,
    ranges: Ranges = Ranges.STATIC,
    observer: str = "minmax",
    group_size: int | None = None,
    embeddings: bool = False,
) -> Recipe:
    """Round to nearest: weights per output channel (or group), activations per tensor.

    Args:
        bits: ``"w8a8"``, ``"w4a8"``, ``"w4a6"``, ``"w4a16"`` and the like; ``"w8a8-fp8"`` gives linears float8 codes
            (e4m3), which GPUs from compute capability 8.9 on multiply, and all else the integers of ``"w8a8"``.
        power_of_two: channel exponents by vote; True for the layers that read a concatenation.
        ranges: ``STATIC``, ``PER_STEP`` or ``DYNAMIC`` activation ranges.
        observer: range estimator of weights and activations: ``minmax``, ``mse``, ``percentile`` or ``ema``.
        group_size: inputs that share a weight scale; None for one scale per output channel.
        embeddings: time and label embeddings and the modulations made from them, up to a third of a transformer's
            weights, get 8 bits and inputs of 12, each vector by its own range, tables 8 bits; else they stay in float.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    widths, float8 = bits.lower().removesuffix(FLOAT8_SUFFIX), bits.lower().endswith(FLOAT8_SUFFIX)
    weight_bits, activation_bits = parse_bits(widths)
    config = QuantConfig(
        weight=TensorConfig(
            bits=weight_bits,
            granularity=Granularity.PER_CHANNEL if group_size is None else Granularity.PER_GROUP,
            group_size=group_size,
            symmetric=weight_bits > LAST_ASYMMETRIC_BITS,
            observer=observer,
        ),
        activation=TensorConfig(bits=activation_bits, ranges=ranges, observer=observer),
        power_of_two=(PowerOfTwo() if power_of_two else None) if isinstance(power_of_two, bool) else power_of_two,
    )
    config = _with_embeddings(config) if embeddings else config
    return Recipe(name="minmax", config=_with_float8(config) if float8 else config)


def _with_float8(config: QuantConfig) -> QuantConfig:
    """Linears in float8 where no override says otherwise."""
    weight = dataclasses.replace(config.weight, float8=True)
    return dataclasses.replace(
        config, weight=weight, activation=dataclasses.replace(config.activation, float8=True, symmetric=True)
    )


def _with_embeddings(config: QuantConfig) -> QuantConfig:
    """Embeddings on integers, each input by its own range: prompts and timesteps never seen before are not clipped."""
    own = dataclasses.replace(config.activation, ranges=Ranges.DYNAMIC)
    override = _at_least("@embedding", config.weight, own, MAX_INPUT_BITS)
    keep_float = tuple(role for role in config.keep_float if role != "@embedding")
    return dataclasses.replace(config, keep_float=keep_float, overrides=(*config.overrides, override))


def dmq(
    bits: str = "w4a8",
    *,
    rounding: RoundingMethod = RoundingMethod.ADAROUND,
    step_weights: StepWeights | None = None,
    compat: str | None = None,
) -> Recipe:
    """DMQ (arXiv 2507.12933): learned scales under focal step weights, rounding, ranges per step, PTS.

    Args:
        bits: ``"w4a8"`` and the like.
        rounding: learned as published, or in closed form.
        step_weights: of the scale learning; focal with exponent 20 as published when None.
        compat: ``"reference"`` computes as the published code does: sums instead of means in the step weights, scales
            learned as they are and from one, ranges of whole batches and their moving average, a vote per timestep
            with ties to the finest and no guard, no bias correction, and its numbers of steps, which take days on a
            CPU. It runs on the reference backend only. Not reproduced: weight ranges that leave zero out, blocks (we
            learn layer by layer), and its defects.

    Raises:
        ValueError: for a scheme that is not of this form, or another ``compat``.
    """
    if compat not in (None, "reference"):
        raise ValueError(f"compat must be None or 'reference', got {compat!r}")
    if compat == "reference":
        return _reference_dmq(bits, rounding, step_weights)
    base = minmax(bits, ranges=Ranges.PER_STEP, power_of_two=True)
    weight = dataclasses.replace(base.config.weight, observer="mse")
    return dataclasses.replace(
        base,
        name="dmq",
        config=dataclasses.replace(base.config, weight=weight),
        scaling=ChannelScaling(step_weights=step_weights or StepWeights()),
        rounding=Rounding(method=rounding, compensate=rounding is RoundingMethod.ADAROUND),
        bias_correction=True,
    )


def _reference_dmq(bits: str, rounding: RoundingMethod, step_weights: StepWeights | None) -> Recipe:
    """DMQ as published: samples, batch, agreement and exponents of the paper's Table 8, steps of its code."""
    votes = PowerOfTwo(guard=False, ties=Ties.FINE, per_step=True)
    base = minmax(bits, ranges=Ranges.PER_STEP, power_of_two=votes)
    weight = dataclasses.replace(base.config.weight, observer="mse", symmetric=False)
    activation = dataclasses.replace(base.config.activation, observer="ema")
    return dataclasses.replace(
        base,
        name="dmq-reference",
        config=dataclasses.replace(base.config, weight=weight, activation=activation),
        num_samples=5120,
        scaling=ChannelScaling(
            steps=6000,
            lr=1e-3,
            batch_size=32,
            init=Init.ONES,
            patience=300,
            step_weights=step_weights or StepWeights(reduce=Reduce.SUM),
            logarithm=False,
            batch_ranges=True,
        ),
        rounding=Rounding(
            method=rounding, quantize_inputs=False, compensate=True, steps=20_000, lr=1e-3, batch_size=32
        ),
    )


def eda_dm(bits: str = "w4a8", *, step_weights: StepWeights | None = None, compat: str | None = None) -> Recipe:
    """EDA-DM (arXiv 2401.04585): samples by feature density and diversity, fine-grained block reconstruction.

    Symmetric weights per output channel and one static range per activation, both of least error; skip connections
    split; input and output projections at 8 bits, embeddings in float; roundings and activation steps learned block
    by block. The sample itself has 12 bits: at the last steps its noise is smaller than a step of 8.

    Args:
        bits: ``"w4a8"`` and the like.
        step_weights: of the block learning; every sample alike when None, as published.
        compat: ``"reference"`` computes as the published code does where that can be: its radius, rounding of counts
            and one-step-one-trajectory budget, no rounding regulariser, the last registered layer of a block left out,
            its numbers of steps and rates (those of CIFAR at W4A8), embeddings and attention's products quantized,
            queries, keys and values by each sample's own range, the sample at 8 bits. Not reproduced: unsigned
            storage of symmetric grids, its moving average of ranges, sums over tokens instead of channels, learning
            the activation step itself instead of its logarithm, and its defects.

    Raises:
        ValueError: for a scheme that is not of this form, or another ``compat``.
    """
    if compat not in (None, "reference"):
        raise ValueError(f"compat must be None or 'reference', got {compat!r}")
    base = minmax(bits, observer="mse")
    weight = dataclasses.replace(base.config.weight, symmetric=base.config.weight.bits > 1)
    config = dataclasses.replace(
        base.config,
        weight=weight,
        keep_float=("@table",) if compat else ("@embedding",),
        attention=AttentionConfig(min(base.config.activation.bits, MAX_BITS)) if compat else None,
        overrides=(
            _at_least("@input", weight, base.config.activation, MAX_BITS if compat else MAX_INPUT_BITS),
            _at_least("@output", weight, base.config.activation, MAX_BITS),
        ),
    )
    select = Selection(SelectMethod.TDAC)
    blocks = BlockReconstruction(step_weights=step_weights or StepWeights(Weighting.UNIFORM))
    if compat is None:
        return dataclasses.replace(base, name="eda_dm", config=config, select=select, blocks=blocks)
    return dataclasses.replace(
        base,
        name="eda_dm-reference",
        config=config,
        num_samples=1024,
        select=dataclasses.replace(select, radius=3.0, diversity_weight=1.2, minimum=0, reference_rounding=True),
        blocks=dataclasses.replace(
            blocks,
            left_out=LeftOut.REGISTRATION,
            steps=5000,
            batch_size=32,
            lr=0.5,
            lr_activation=5e-4,
            regularizer=0.0,
            patience=250,
        ),
    )


def _at_least(role: str, weight: TensorConfig, activation: TensorConfig, bits: int) -> Override:
    """Eight bits for the weights of a role's layers and ``bits`` for their inputs, where the recipe gives fewer."""
    wide = dataclasses.replace(weight, bits=max(weight.bits, MAX_BITS), symmetric=True)
    return Override(role, wide, dataclasses.replace(activation, bits=max(activation.bits, bits)))


def default(bits: str = "w4a8") -> Recipe:
    """The best we know: DMQ's scales, ranges and votes, rounding in closed form, and a last distillation.

    Below 8 bits, output channels and inputs share out their bits by what these save, at the same mean. The layers that
    the output is most sensitive to, up to one weight in a hundred, get 8 bits; so do embeddings, as in ``minmax``.

    Args:
        bits: ``"w4a8"`` and the like.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    base = dmq(bits, rounding=RoundingMethod.FEEDBACK)
    base = dataclasses.replace(base, config=_with_embeddings(base.config))
    if base.config.activation.bits < MAX_BITS:  # few levels: clipping rare extremes is worth more than reaching them
        activation = dataclasses.replace(base.config.activation, observer="mse")
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, activation=activation))
    if parse_bits(bits)[0] > LAST_ASYMMETRIC_BITS:  # wide codes do not shift into int8, and have the resolution
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, power_of_two=None))
    narrow = min(parse_bits(bits)) < MAX_BITS
    return dataclasses.replace(
        base,
        name="default",
        protection=Protection(),
        allocation=BitAllocation() if narrow else None,
        distillation=Distillation(passes=2),
    )


def mpq_dm(
    bits: str = "w3a6",
    *,
    mean_bits: float | None = None,
    scorer: Scorer = Scorer.ERROR_GAIN,
    compat: str | None = None,
) -> Recipe:
    """MPQ-DM (arXiv 2412.11549): a width for each output channel, and distillation along the trajectory.

    Channel scales in closed form, refined by learning; bits by what they save over the whole model; error feedback,
    bias correction and ranges per timestep as in ``default``; a distillation with low-rank updates of the weights,
    merged into their codes, and with time-smoothed relations between pixels. It needs samples in windows: record with
    ``select=recipe.select``.

    Args:
        bits: mean bits of the weights and bits of the activations: ``"w2a6"``, ``"w3a6"``, ``"w4a4"`` and the like.
        mean_bits: of the weights, where it is no whole number.
        scorer: of channels; ``KURTOSIS`` moves bits inside each layer, equally many channels up and down.
        compat: ``"reference"`` allocates as the published code does: scales in closed form only, kurtosis, none or a
            tenth of the channels moved, nearest rounding on grids of least error; low-rank updates of rank 32, and
            relations summed over pixels, which here have a gradient. Not reproduced: its search on min-max grids, the
            sum of squares as the error of the output, learned zero points, and its 16000 steps.

    Raises:
        ValueError: for a scheme that is not of this form, or another ``compat``.
    """
    if compat not in (None, "reference"):
        raise ValueError(f"compat must be None or 'reference', got {compat!r}")
    if compat == "reference":
        base = minmax(bits, ranges=Ranges.PER_STEP, observer="mse")
        weight = dataclasses.replace(base.config.weight, symmetric=False)
        return dataclasses.replace(
            base,
            name="mpq_dm-reference",
            config=dataclasses.replace(base.config, weight=weight),
            split_concat=False,
            select=Selection(window=2),
            scaling=ChannelScaling(steps=0),
            allocation=BitAllocation(scorer=Scorer.KURTOSIS, scope=Scope.LAYER, groups=1),
            distillation=Distillation(rank=32, relation=Relation(reduce=Reduce.SUM)),
        )
    allocation = (
        BitAllocation(mean_bits=mean_bits, least_gain=1.0)
        if scorer is Scorer.ERROR_GAIN
        else BitAllocation(scorer=scorer, scope=Scope.LAYER)
    )
    return dataclasses.replace(
        default(bits),
        name="mpq_dm",
        select=Selection(window=2),
        allocation=allocation,
        distillation=Distillation(steps=400, rank=32, relation=Relation()),
    )


ALL_RECIPES: dict[str, Callable[..., Recipe]] = {
    "minmax": minmax,
    "dmq": dmq,
    "eda_dm": eda_dm,
    "mpq_dm": mpq_dm,
    "default": default,
}
