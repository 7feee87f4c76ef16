"""Widths and ranges: how tensors, and a whole denoiser, become integers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dmq_ao.config.stages import AttentionConfig as AttentionConfig

MAX_BITS = 8


# A wider input is multiplied as two bytes; beyond this nothing is left to gain over float.
MAX_INPUT_BITS = 12


FLOAT_BITS = 16


class Granularity(str, Enum):
    """Which elements share one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


class Ranges(str, Enum):
    """When an activation range is decided.

    ``STATIC``: once, over all samples. ``PER_STEP``: once per timestep, looked up by the timestep argument.
    ``DYNAMIC``: at run time, from each sample itself.
    """

    STATIC = "static"
    PER_STEP = "per_step"
    DYNAMIC = "dynamic"


class Ties(str, Enum):
    """Which power-of-two exponent wins when errors or votes are equal: ours, or that of the published code."""

    COARSE = "coarse"
    FINE = "fine"


@dataclass(frozen=True)
class TensorConfig:
    """How one tensor becomes integers.

    Attributes:
        bits: width of a code: 1 to 8; activations also up to 12, which integer kernels multiply as two bytes; 16 stays
            in float.
        granularity: which elements share a scale. Activations are per tensor.
        group_size: input features per scale, for ``PER_GROUP`` weights.
        symmetric: signed codes around zero (``zero_point`` 0) instead of unsigned ones with a zero point.
        ranges: when the range of an activation is decided.
        observer: name of a range estimator in ``dmq_ao.observers.ALL_OBSERVERS``.
        float8: codes are numbers of 8 bits (e4m3: 4 of exponent, 3 of mantissa) in linears; other layers, of which no
            device has such a product, get integers. 8 bits, symmetric, and ranges that are not dynamic.
    """

    bits: int
    granularity: Granularity = Granularity.PER_TENSOR
    group_size: int | None = None
    symmetric: bool = False
    ranges: Ranges = Ranges.STATIC
    observer: str = "minmax"
    float8: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= MAX_INPUT_BITS or self.bits == FLOAT_BITS):
            raise ValueError(
                f"bits must be 1 to {MAX_BITS}, up to {MAX_INPUT_BITS} for activations, or {FLOAT_BITS} for float; got"
                f" {self.bits}"
            )
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            raise ValueError(f"group_size goes with per_group, got {self.granularity.value} and {self.group_size}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        plain = self.bits == MAX_BITS and self.symmetric and self.group_size is None
        if self.float8 and not (plain and self.ranges is not Ranges.DYNAMIC):
            raise ValueError(
                f"float8 is symmetric, of {MAX_BITS} bits, without groups and with static or per_step ranges; got"
                f" {self.bits} bits, symmetric={self.symmetric}, group_size={self.group_size}, {self.ranges.value}"
            )


@dataclass(frozen=True)
class PowerOfTwo:
    """Channel-wise power-of-two scaling of activations, chosen by vote (DMQ, arXiv 2507.12933, section on PTS).

    Attributes:
        layers: patterns on layer names; the role ``@concat`` is every layer that reads a channel concatenation.
        agreement: share of the samples that must agree on a channel's exponent; equality is enough.
        max_exponent: finest step is ``scale * 2**-max_exponent``.
        guard: refuse a channel's vote when it raises that channel's summed squared error over the samples.
        ties: which candidate wins a tie.
        per_step: a vote for each timestep, as published: shifts then cannot be folded into the weight, so only the
            reference backend runs it. Needs per-step ranges.
    """

    layers: tuple[str, ...] = ("@concat",)
    agreement: float = 0.85
    max_exponent: int = 3
    guard: bool = True
    ties: Ties = Ties.COARSE
    per_step: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("PowerOfTwo.layers is empty; use power_of_two=None for no power-of-two scaling")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement is a share of the samples, 0 to 1; got {self.agreement}")
        if not 1 <= self.max_exponent <= 7:
            raise ValueError(f"max_exponent must be 1 to 7, got {self.max_exponent}")


@dataclass(frozen=True)
class Override:
    """What differs for the layers whose name matches ``pattern`` (``fnmatch``, or a role such as ``@concat``)."""

    pattern: str
    weight: TensorConfig | None = None
    activation: TensorConfig | None = None
    keep_float: bool = False

    def __post_init__(self) -> None:
        if self.keep_float and (self.weight or self.activation):
            raise ValueError(f"override {self.pattern!r} both keeps float and gives a tensor config")
        if not (self.keep_float or self.weight or self.activation):
            raise ValueError(
                f"override {self.pattern!r} changes nothing; give weight=, activation= or keep_float=True"
            )


@dataclass(frozen=True)
class QuantConfig:
    """Widths and ranges of a whole denoiser.

    Attributes:
        weight: of every layer that no override names.
        activation: likewise.
        keep_float: patterns or roles of layers that stay in float.
        overrides: applied in order, later wins.
        power_of_two: which layers vote on power-of-two exponents; None for none.
        attention: quantize the products inside attention as well; None leaves them in float.
    """

    weight: TensorConfig
    activation: TensorConfig
    keep_float: tuple[str, ...] = ("@input", "@output", "@embedding")
    overrides: tuple[Override, ...] = ()
    power_of_two: PowerOfTwo | None = None
    attention: AttentionConfig | None = None

    @property
    def weights(self) -> list[TensorConfig]:
        """Every one of weights, overrides included."""
        return [self.weight, *(o.weight for o in self.overrides if o.weight)]

    @property
    def activations(self) -> list[TensorConfig]:
        """Every one of activations."""
        return [self.activation, *(o.activation for o in self.overrides if o.activation)]

    def __post_init__(self) -> None:
        for config in self.weights:
            if MAX_BITS < config.bits < FLOAT_BITS:
                raise ValueError(f"weights have 1 to {MAX_BITS} bits, or {FLOAT_BITS} for float; got {config.bits}")
        for config in self.activations:
            if config.granularity is not Granularity.PER_TENSOR:
                raise ValueError(f"activations are quantized per_tensor, got {config.granularity.value}")
            if self.power_of_two and config.float8:
                raise ValueError("power-of-two votes are for integers: float8 has its own exponents; leave one out")
            if self.power_of_two and self.power_of_two.per_step and config.ranges is not Ranges.PER_STEP:
                raise ValueError(f"power_of_two.per_step needs per_step ranges, got {config.ranges.value}")
