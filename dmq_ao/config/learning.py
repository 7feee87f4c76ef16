"""What calibration learns, each stage a frozen, validated value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from dmq_ao.config.stages import Relation as Relation
from dmq_ao.config.stages import StepWeights as StepWeights
from dmq_ao.config.stages import Weighting as Weighting
from dmq_ao.config.stages import at_least
from dmq_ao.config.tensors import MAX_BITS, MAX_INPUT_BITS


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
