"""What a user can ask for: frozen, validated values, and the errors that say what was wrong.

A ``Recipe`` names everything that decides a quantized model: the widths and ranges (``QuantConfig``), how many
calibration samples to take, and the graph passes. It prints, compares, round-trips through JSON, and changes with
``dataclasses.replace``.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dmq_ao.as_json import plain, typed
from dmq_ao.stages import AttentionConfig as AttentionConfig
from dmq_ao.stages import BitAllocation as BitAllocation
from dmq_ao.stages import BlockReconstruction as BlockReconstruction
from dmq_ao.stages import LeftOut as LeftOut
from dmq_ao.stages import Reduce as Reduce
from dmq_ao.stages import Relation as Relation
from dmq_ao.stages import Scope as Scope
from dmq_ao.stages import Scorer as Scorer
from dmq_ao.stages import Selection as Selection
from dmq_ao.stages import SelectMethod as SelectMethod
from dmq_ao.stages import StepWeights as StepWeights
from dmq_ao.stages import Weighting as Weighting
from dmq_ao.stages import at_least

MAX_BITS = 8
# A wider input is multiplied as two bytes; beyond this nothing is left to gain over float.
MAX_INPUT_BITS = 12
FLOAT_BITS = 16


class UnsupportedByBackend(ValueError):
    """A backend cannot run what the recipe asks for. ``reasons`` holds one sentence per layer or rule."""

    def __init__(self, backend: str, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"backend {backend!r} cannot run this recipe:\n  " + "\n  ".join(reasons))


class MissingStatistics(ValueError):
    """Something that must be seen before it can be quantized was not: an observer, or an empty recording."""


class InvalidFile(ValueError):
    """A file is truncated, foreign, of another version or of another model."""


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


class Init(str, Enum):
    """Where learned channel scales start: at one, or at a closed form that evens out inputs and weights."""

    ONES = "ones"
    CLOSED_FORM = "closed_form"


class RoundingMethod(str, Enum):
    """How weights are rounded when the nearest code is not good enough.

    ``FEEDBACK``: column by column, the error fed back (GPTQ, arXiv 2210.17323). ``ADAROUND``: learned
    (arXiv 2004.10568).
    """

    FEEDBACK = "feedback"
    ADAROUND = "adaround"


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


@dataclass(frozen=True)
class ChannelScaling:
    """Learned equivalent scaling: a factor per input channel, divided out of the input, multiplied into the weight.

    Attributes:
        layers: patterns or roles of layers that learn; the others stay at one.
        steps: gradient steps of Adam; 0 leaves the closed form.
        lr: of Adam on the logarithm, falling to 0 as a cosine.
        batch_size: samples a step.
        positions: output positions taken from each sample.
        outputs: output channels looked at in a step, drawn anew each time.
        init: where the factors start.
        migration: exponent of the closed form, 0 evens out weights only, 1 inputs only (SmoothQuant's alpha).
        limit: factors stay within ``1 / limit`` and ``limit``.
        patience: stop after this many checks, one each 20 steps, without gain on held-out samples.
        step_weights: weight of each sample's loss.
        logarithm: learn the factor's logarithm, so that it stays positive; the published code learns the factor.
        batch_ranges: input ranges of a whole batch, as published, instead of each sample's own.
    """

    layers: tuple[str, ...] = ("*",)
    steps: int = 200
    lr: float = 2e-2
    batch_size: int = 16
    positions: int = 32
    outputs: int = 128
    init: Init = Init.CLOSED_FORM
    migration: float = 0.5
    limit: float = 32.0
    patience: int = 4
    step_weights: StepWeights = StepWeights()
    logarithm: bool = True
    batch_ranges: bool = False

    def __post_init__(self) -> None:
        at_least(self, steps=0, batch_size=1, positions=1, outputs=1, patience=1)
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.migration <= 1:
            raise ValueError(f"migration must be 0 to 1, got {self.migration}")
        if self.limit <= 1:
            raise ValueError(f"limit must be above 1, got {self.limit}")


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded with the layer's inputs in view.

    Attributes:
        method: closed form or learned.
        propagate_error: inputs come from the network as quantized so far; else from the float network.
        quantize_inputs: inputs are what their codes stand for; else float, of a network with quantized weights.
        compensate: the rounding also makes up for the error that the inputs bring; else only for its own.
        positions: output positions taken from each sample; more are taken when the layer has many inputs.
        step_weights: weight of each sample.
        damping: ``FEEDBACK``: share of the mean second moment added to all.
        steps: ``ADAROUND``: gradient steps, and so are the rest.
        lr: of Adam on the rounding logits.
        batch_size: samples a step.
        regularizer: weight of the term that drives roundings to 0 or 1.
        warmup: share of the steps without that term.
    """

    method: RoundingMethod = RoundingMethod.FEEDBACK
    propagate_error: bool = True
    quantize_inputs: bool = True
    compensate: bool = False
    positions: int = 256
    step_weights: StepWeights = StepWeights(Weighting.UNIFORM)
    damping: float = 0.01
    steps: int = 200
    lr: float = 0.1
    batch_size: int = 16
    regularizer: float = 0.01
    warmup: float = 0.2

    def __post_init__(self) -> None:
        at_least(self, positions=1, steps=1, batch_size=1)
        if self.damping <= 0 or self.lr <= 0:
            raise ValueError(f"damping and lr must be positive, got {self.damping} and {self.lr}")
        if not 0 <= self.warmup < 1 or self.regularizer < 0:
            raise ValueError(
                f"warmup must be in [0, 1) and regularizer 0 or more, got {self.warmup}, {self.regularizer}"
            )


@dataclass(frozen=True)
class Protection:
    """More bits for the layers that the output is most sensitive to and that cost little.

    Attributes:
        share: of all weights that may get ``bits``.
        bits: of those weights, then symmetric, and of their layers' inputs.
        input_share: of all multiply-accumulates whose input may get ``input_bits``, where that input alone makes a
            tenth of what all inputs do to the output; integer kernels do these products twice.
        input_bits: of those inputs.
        samples: on which the sensitivity is measured, one layer at a time.
    """

    share: float = 0.01
    bits: int = 8
    input_share: float = 0.03
    input_bits: int = 12
    samples: int = 4

    def __post_init__(self) -> None:
        at_least(self, samples=1)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0, at most 1; got {self.share}")
        if not 0 <= self.input_share <= 1:
            raise ValueError(f"input_share must be 0 to 1; got {self.input_share}")
        if not 2 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be 2 to {MAX_BITS}, got {self.bits}")
        if not 2 <= self.input_bits <= MAX_INPUT_BITS:
            raise ValueError(f"input_bits must be 2 to {MAX_INPUT_BITS}, got {self.input_bits}")


@dataclass(frozen=True)
class Distillation:
    """A last stage over the whole denoiser: what stays in float learns to make up for the codes.

    It learns the weights' scales, the biases, norms, embeddings and the layers kept in float, each by steps in
    proportion to its own size, so that the denoiser's output comes close to the teacher's, every timestep relative to
    its own output. The codes are fixed, or move by low-rank updates that are merged into them at the end.

    Attributes:
        steps: gradient steps.
        passes: at least so many times over the samples, where that takes more steps than ``steps``: many samples are
            worth more steps, few are soon learned by heart.
        lr: of Adam, as a share of each tensor's root mean square; falls to 0 as a cosine.
        batch_size: samples a step.
        checks: times that the held-out samples are looked at; the best state is kept.
        rank: of the update of each quantized layer's weight; 0 fixes the codes.
        lr_rank: of Adam on the updates' factors, the first in steps of the weight's grid, the second as a share of its
            root mean square; falls likewise.
        relation: of the features as well, where the samples know their trajectories; None for the output alone.
    """

    steps: int = 200
    passes: float = 0.0
    lr: float = 1e-3
    batch_size: int = 4
    checks: int = 6
    rank: int = 0
    lr_rank: float = 1e-2
    relation: Relation | None = None

    def __post_init__(self) -> None:
        at_least(self, steps=1, passes=0, batch_size=1, checks=1, rank=0)
        for name in ("lr", "lr_rank"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def steps_of(self, samples: int) -> int:
        """Gradient steps where there are so many samples to fit."""
        return max(self.steps, math.ceil(self.passes * samples / self.batch_size))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a quantized model, besides the model and its samples.

    Attributes:
        name: of the method, for reports.
        config: widths and ranges.
        split_concat: give each part of a concatenated input its own range.
        num_samples: calibration samples that the command line records.
        select: how it shares them out among the timesteps.
        scaling: learned channel scales; None for none.
        rounding: None rounds to nearest.
        bias_correction: take the mean error of each layer's output out of its bias.
        blocks: roundings and activation steps learned block by block, after their layers; None for none.
        protection: more bits for the most sensitive layers; None for none. Calibration turns it into overrides.
        allocation: a width for each output channel; None for the same in a layer.
        distillation: a last stage over the whole denoiser; None for none.
    """

    name: str
    config: QuantConfig
    split_concat: bool = True
    num_samples: int = 256
    select: Selection = Selection()
    scaling: ChannelScaling | None = None
    rounding: Rounding | None = None
    bias_correction: bool = False
    blocks: BlockReconstruction | None = None
    protection: Protection | None = None
    allocation: BitAllocation | None = None
    distillation: Distillation | None = None

    @property
    def learns(self) -> bool:
        """Whether calibration goes layer by layer, each seeing the layers before it quantized."""
        stages = (self.scaling, self.rounding, self.blocks, self.protection, self.allocation, self.distillation)
        return self.bias_correction or any(stage is not None for stage in stages)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        self._check_learned_rounding()
        if self.learns and any(tensor.float8 for tensor in (*self.config.weights, *self.config.activations)):
            raise ValueError("float8 is rounded to nearest, nothing learns its codes; use recipes.minmax")

    def _check_learned_rounding(self) -> None:
        """Learned rounding chooses between two neighbouring codes of one width a layer."""
        adaround = self.rounding is not None and self.rounding.method is RoundingMethod.ADAROUND
        if not adaround and self.blocks is None:
            return
        if self.allocation is not None or any(weight.bits == 1 for weight in self.config.weights):
            raise ValueError(
                "AdaRound and blocks learn codes of one width a layer, of 2 bits or more; with an allocation, or one"
                " bit, use Rounding(method=RoundingMethod.FEEDBACK)"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``Recipe.from_dict`` is its inverse."""
        return typing.cast("dict[str, Any]", plain(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: for a key or an enumeration value that is not known, naming the known ones.
            TypeError: for a value of the wrong type.
        """
        return typed(cls, data, "recipe")
