"""Published methods and plain baselines, each a function that returns a ``Recipe``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from dmq_ao.config import (
    FLOAT_BITS,
    MAX_BITS,
    MAX_INPUT_BITS,
    ChannelScaling,
    Distillation,
    Granularity,
    Init,
    PowerOfTwo,
    Protection,
    QuantConfig,
    Ranges,
    Recipe,
    Reduce,
    Rounding,
    RoundingMethod,
    StepWeights,
    TensorConfig,
    Ties,
)

# Up to here a symmetric grid wastes too much on one-sided channels, and asymmetric codes still shift into int8.
LAST_ASYMMETRIC_BITS = 4


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a scheme such as ``"w4a8"``; 16 means float, and 9 to 12 are for activations.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", bits.lower())
    widths = tuple(int(group) for group in found.groups()) if found else (0, 0)
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
) -> Recipe:
    """Round to nearest: weights per output channel (or group), activations per tensor.

    Args:
        bits: ``"w8a8"``, ``"w4a8"``, ``"w4a6"``, ``"w4a16"`` and the like.
        power_of_two: channel exponents by vote; True for the layers that read a concatenation.
        ranges: ``STATIC``, ``PER_STEP`` or ``DYNAMIC`` activation ranges.
        observer: range estimator of weights and activations: ``minmax``, ``mse`` or ``percentile``.
        group_size: inputs that share a weight scale; None for one scale per output channel.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    weight_bits, activation_bits = parse_bits(bits)
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
    return Recipe(name="minmax", config=config)


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
        return _published(bits, rounding, step_weights)
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


def _published(bits: str, rounding: RoundingMethod, step_weights: StepWeights | None) -> Recipe:
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


def default(bits: str = "w4a8") -> Recipe:
    """The best we know: DMQ's scales, ranges and votes, rounding in closed form, and a last distillation.

    The layers that the output is most sensitive to, up to one weight in a hundred, get 8 bits.

    Args:
        bits: ``"w4a8"`` and the like.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    base = dmq(bits, rounding=RoundingMethod.FEEDBACK)
    if base.config.activation.bits < MAX_BITS:  # few levels: clipping rare extremes is worth more than reaching them
        activation = dataclasses.replace(base.config.activation, observer="mse")
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, activation=activation))
    if parse_bits(bits)[0] > LAST_ASYMMETRIC_BITS:  # wide codes do not shift into int8, and have the resolution
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, power_of_two=None))
    return dataclasses.replace(base, name="default", protection=Protection(), distillation=Distillation())


ALL_RECIPES: dict[str, Callable[..., Recipe]] = {"minmax": minmax, "dmq": dmq, "default": default}
