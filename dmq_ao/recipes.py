"""Published methods and plain baselines, each a function that returns a ``Recipe``."""

from __future__ import annotations

import dataclasses
import re

from dmq_ao.config import (
    FLOAT_BITS,
    MAX_BITS,
    ChannelScaling,
    Distillation,
    Granularity,
    PowerOfTwo,
    QuantConfig,
    Ranges,
    Recipe,
    Rounding,
    RoundingMethod,
    StepWeights,
    TensorConfig,
)

# Up to here a symmetric grid wastes too much on one-sided channels, and asymmetric codes still shift into int8.
LAST_ASYMMETRIC_BITS = 4


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a scheme such as ``"w4a8"``; 16 means float.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", bits.lower())
    widths = tuple(int(group) for group in found.groups()) if found else ()
    if len(widths) != 2 or any(not (1 <= width <= MAX_BITS or width == FLOAT_BITS) for width in widths):
        raise ValueError(
            f"bits must look like 'w4a8' (1 to {MAX_BITS} bits each, or {FLOAT_BITS} for float), got {bits!r}"
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
) -> Recipe:
    """DMQ (arXiv 2507.12933), corrected: learned scales under focal step weights, rounding, ranges per step, PTS.

    Args:
        bits: ``"w4a8"`` and the like.
        rounding: learned as published, or in closed form.
        step_weights: of the scale learning; focal with exponent 20 as published when None.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    base = minmax(bits, ranges=Ranges.PER_STEP, power_of_two=True)
    weight = dataclasses.replace(base.config.weight, observer="mse")
    return dataclasses.replace(
        base,
        name="dmq",
        config=dataclasses.replace(base.config, weight=weight),
        scaling=ChannelScaling(step_weights=step_weights or StepWeights()),
        rounding=Rounding(method=rounding),
        bias_correction=True,
    )


def default(bits: str = "w4a8") -> Recipe:
    """The best we know: DMQ's scales, ranges and votes, rounding in closed form, and a last distillation.

    Args:
        bits: ``"w4a8"`` and the like.

    Raises:
        ValueError: for a scheme that is not of this form.
    """
    base = dmq(bits, rounding=RoundingMethod.FEEDBACK)
    return dataclasses.replace(base, name="default", distillation=Distillation())


ALL_RECIPES = {"minmax": minmax, "dmq": dmq, "default": default}
