"""The plan for one layer, and what is known of its record before there is one; the kernel that runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dmq_ao.config import MAX_BITS, PowerOfTwo, Ranges, Recipe, TensorConfig
from dmq_ao.records.record import zero_point_dtype
from dmq_ao.records.shifts import shift_fits_int8


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe does with one layer.

    Attributes:
        name: of the layer.
        kind: of the layer.
        numel: weights.
        weight: how the weight is quantized; None when the layer stays in float.
        activation: how the input is quantized; None when it stays in float.
        power_of_two: whether and how the input's channels vote.
        why: reason for what stays in float, empty otherwise.
        roles: that the caller said the layer has (``prepare(..., roles=)``); empty for those that dataflow shows.
    """

    name: str
    kind: str
    numel: int
    weight: TensorConfig | None
    activation: TensorConfig | None
    power_of_two: PowerOfTwo | None
    why: str
    roles: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Kernel:
    """What multiplies one layer: its name, and the reason when it is not an integer kernel."""

    name: str
    why: str = ""

    @property
    def is_integer(self) -> bool:
        """Whether codes are multiplied as integers."""
        return "int8" in self.name


def overhead_bits(item: LayerPlan, shape: tuple[int, ...], steps: int, recipe: Recipe) -> int:
    """Bits of a record besides its codes, before there is one: at most, where a scale or a vote may be refused.

    Args:
        item: the plan.
        shape: of the weight.
        steps: rows of ranges per timestep.
        recipe: that it is of.
    """
    assert item.weight is not None
    scales = shape[0] if item.weight.group_size is None else math.prod(shape) // item.weight.group_size
    bits = scales * (32 if item.weight.symmetric else 40)
    if item.activation is None:
        return bits
    pair = 32 + 8 * zero_point_dtype(item.activation.bits).itemsize
    row = {Ranges.STATIC: pair, Ranges.PER_STEP: (pair + 32) * steps, Ranges.DYNAMIC: 0}[item.activation.ranges]
    row += 0 if recipe.scaling is None else 32 * shape[1]
    return bits + row + (0 if item.power_of_two is None else 8 * shape[1])


def widest_that_fits(item: LayerPlan, config: TensorConfig) -> int:
    """Most bits of a layer's codes that still fit int8 after centring and the largest shift that may be voted."""
    shift = 0 if item.power_of_two is None else item.power_of_two.max_exponent
    return max(bits for bits in range(1, MAX_BITS + 1) if bits == 1 or shift_fits_int8(bits, config.symmetric, shift))
