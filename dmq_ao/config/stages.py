"""What a recipe says about choosing samples, weighting steps and learning blocks: frozen, validated values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Weighting(str, Enum):
    """How much a sample's loss counts, by its step: alike, more where little of the loss is, falling, or by table."""

    UNIFORM = "uniform"
    FOCAL = "focal"
    LINEAR = "linear"
    TABLE = "table"


class Reduce(str, Enum):
    """How the losses of one step become the step's share: their mean, or the sum of the published code."""

    MEAN = "mean"
    SUM = "sum"


class SelectMethod(str, Enum):
    """How many calibration samples each timestep gets.

    ``UNIFORM``: the same number. ``NORMAL``: by a normal density over the schedule (PTQ4DM, arXiv 2211.15736).
    ``TDAC``: by density and diversity of the denoiser's features (EDA-DM, arXiv 2401.04585).
    """

    UNIFORM = "uniform"
    NORMAL = "normal"
    TDAC = "tdac"


class LeftOut(str, Enum):
    """Which layer of a block counts as its output, not as an inner layer: by dataflow, or the last one registered."""

    DATAFLOW = "dataflow"
    REGISTRATION = "registration"


class Scorer(str, Enum):
    """What decides which output channels get more bits: error saved a bit, or kurtosis (MPQ-DM, arXiv 2412.11549)."""

    ERROR_GAIN = "error_gain"
    KURTOSIS = "kurtosis"


class Scope(str, Enum):
    """What a budget of bits is for: each layer by itself, or all layers together."""

    LAYER = "layer"
    MODEL = "model"


@dataclass(frozen=True)
class StepWeights:
    """Weight of a sample by its step on the sampler's list (DMQ, arXiv 2507.12933, adaptive timestep weighting).

    Attributes:
        kind: of weighting.
        gamma: focusing exponent of ``FOCAL``, ``(1 - share of the loss) ** gamma``; slope of ``LINEAR``,
            ``1 + gamma * (1 - step / steps)``.
        momentum: of the running loss of each step.
        reduce: mean over a step's samples, right for uneven counts; or their sum, as published.
        table: one weight a step, noisiest first, for ``TABLE``.
    """

    kind: Weighting = Weighting.FOCAL
    gamma: float = 20.0
    momentum: float = 0.95
    reduce: Reduce = Reduce.MEAN
    table: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind is Weighting.TABLE) != bool(self.table):
            raise ValueError(f"table= goes with kind=TABLE, got {self.kind.value} and {len(self.table)} weights")
        if any(not weight >= 0 for weight in self.table) or (self.table and not any(self.table)):
            raise ValueError(f"weights must be 0 or more and not all 0, got {self.table}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}")


@dataclass(frozen=True)
class Selection:
    """How calibration samples are shared out among the timesteps.

    Attributes:
        method: of sharing; the fields below say which method reads them.
        diversity_weight: ``TDAC``: weight of the diversity score beside the density score (the paper's lambda).
        quantile: ``TDAC``: two steps are near when their features differ by no more than this quantile of all pairs.
        radius: ``TDAC``: near within this mean squared difference instead, as published; it depends on the features'
            scale.
        tap: ``TDAC``: path of the module whose output are the features; None takes the denoiser's deepest block.
        mean: ``NORMAL``: centre of the density, as a share of the schedule counted from its clean end.
        deviation: ``NORMAL``: likewise.
        pilot: rows run through all timesteps before the counts are decided.
        minimum: samples that every timestep gets.
        reference_rounding: ``TDAC``: round half to even and mend the sum, as published; counts may be 0.
        window: ``UNIFORM``: rows are kept in runs of this many steps of one trajectory, one after the other, as
            distillation with a ``Relation`` wants them; 1 keeps each by itself.
    """

    method: SelectMethod = SelectMethod.UNIFORM
    diversity_weight: float = 1.0
    quantile: float = 0.3
    radius: float | None = None
    tap: str | None = None
    mean: float = 0.4
    deviation: float = 0.4
    pilot: int = 16
    minimum: int = 1
    reference_rounding: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        at_least(self, pilot=1, minimum=0, window=1)
        if self.window > 1 and self.method is not SelectMethod.UNIFORM:
            raise ValueError(
                f"window={self.window} keeps runs of steps, which {self.method.value} shares cannot count; use"
                " method=UNIFORM, or window=1"
            )
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
        if not 0 <= self.diversity_weight < float("inf"):
            raise ValueError(f"diversity_weight must be 0 or more, got {self.diversity_weight}")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}; None takes it from the features")
        if not self.deviation > 0:
            raise ValueError(f"deviation must be positive, got {self.deviation}")


@dataclass(frozen=True)
class BlockReconstruction:
    """Roundings and activation steps of a whole block learned together (EDA-DM, arXiv 2401.04585; BRECQ, QDrop).

    It starts from what was decided layer by layer, and is kept where the block's output is closer on held-out samples.

    Attributes:
        layer_weight: weight of the inner layers' outputs beside the block's (the paper's gamma); 0 leaves them out.
        left_out: the layer whose output is the block's own.
        steps: gradient steps, and so are the rest.
        batch_size: samples a step.
        lr: of Adam on the rounding logits; falls to 0 as a cosine.
        lr_activation: of Adam on the logarithm of the activation steps; likewise. 0 leaves them as they are.
        drop: share of the inputs' elements that stay in float in each step (QDrop, arXiv 2203.05740).
        mix: share of the block's input elements that come from the float network instead of the quantized one.
        regularizer: weight of the term that drives roundings to 0 or 1; the published code has none.
        warmup: share of the steps without that term.
        patience: stop after this many checks, one each 20 steps, without gain on held-out samples.
        step_weights: weight of each sample's loss.
    """

    layer_weight: float = 0.8
    left_out: LeftOut = LeftOut.DATAFLOW
    steps: int = 200
    batch_size: int = 8
    lr: float = 0.05
    lr_activation: float = 5e-3
    drop: float = 0.5
    mix: float = 0.5
    regularizer: float = 0.01
    warmup: float = 0.2
    patience: int = 10
    step_weights: StepWeights = StepWeights(Weighting.UNIFORM)

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, patience=1)
        if not self.lr > 0 or self.lr_activation < 0:
            raise ValueError(f"lr must be positive and lr_activation 0 or more, got {self.lr}, {self.lr_activation}")
        for name in ("drop", "mix", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.layer_weight < float("inf") or self.regularizer < 0:
            raise ValueError(
                f"layer_weight and regularizer must be 0 or more, got {self.layer_weight}, {self.regularizer}"
            )


@dataclass(frozen=True)
class Relation:
    """Time-smoothed relations between pixels, distilled beside the output (MPQ-DM, arXiv 2412.11549, TRD).

    Attributes:
        weight: of the relation error beside the output's relative error. At temperature 1 the distributions are nearly
            flat, and a pixel's divergence is some 1e-5 to 1e-3.
        window: steps of a trajectory whose features are averaged, the sample's own and those before it; the samples
            must be recorded with ``Selection(window=...)`` of as many or more.
        temperature: of the distributions that are compared.
        tap: path of the module whose output are the features; None takes what the denoiser's last norm reads.
        reduce: mean over pixels, or their sum, as published, which wants as many times less weight.
    """

    weight: float = 100.0
    window: int = 2
    temperature: float = 1.0
    tap: str | None = None
    reduce: Reduce = Reduce.MEAN

    def __post_init__(self) -> None:
        at_least(self, window=1)
        if not 0 < self.weight < float("inf") or not 0 < self.temperature < float("inf"):
            raise ValueError(f"weight and temperature must be positive, got {self.weight} and {self.temperature}")


@dataclass(frozen=True)
class BitAllocation:
    """A width for each output channel, decided after scaling, on the grid that is finally used (MPQ-DM, OMQ).

    Attributes:
        mean_bits: of the codes of the layers that share bits: those that the recipe does not give more than the widest
            candidate. None for the recipe's own width.
        scorer: ``ERROR_GAIN`` spends every bit where it saves most error; ``KURTOSIS`` gives channels of heavy tails
            one bit that channels of light tails give up, equally many of each, as published.
        scope: of the budget; over the ``MODEL``, a layer counts by what its error does to the denoiser's output.
        candidates: widths to choose from, of ``ERROR_GAIN``; a layer whose codes are shifted has those that fit.
        groups: ``KURTOSIS``: most groups of a tenth of the channels that move each way.
        inputs: over the ``MODEL``, share out the bits of the layers' inputs too, where they have fewer than 8: their
            mean over multiply-accumulates stays the recipe's.
        least_gain: over the ``MODEL`` at the recipe's own mean, the widths stay the recipe's where sharing them out
            does not divide the squared error of the output by this, measured with all of them rounded to nearest;
            weights and inputs by themselves.
        samples: to measure inputs on.
    """

    mean_bits: float | None = None
    scorer: Scorer = Scorer.ERROR_GAIN
    scope: Scope = Scope.MODEL
    candidates: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    groups: int = 5
    inputs: bool = True
    least_gain: float = 1.3
    samples: int = 16

    def __post_init__(self) -> None:
        at_least(self, groups=0, samples=1)
        if not 0 <= self.least_gain < float("inf"):
            raise ValueError(f"least_gain must be 0 or more, got {self.least_gain}")
        if self.groups > 5:
            raise ValueError(f"groups must be at most 5, a tenth of the channels each way; got {self.groups}")
        if not self.candidates or list(self.candidates) != sorted(set(self.candidates)):
            raise ValueError(f"candidates must be different widths in ascending order, got {self.candidates}")
        if not 1 <= self.candidates[0] <= self.candidates[-1] <= 8:
            raise ValueError(f"candidates must be from 1 to 8 bits, got {self.candidates}")
        if self.scorer is Scorer.KURTOSIS and (self.scope is not Scope.LAYER or self.mean_bits is not None):
            raise ValueError(
                "kurtosis swaps bits inside a layer around the recipe's width: scope=Scope.LAYER, mean_bits=None"
            )
        if self.mean_bits is not None and not self.candidates[0] <= self.mean_bits <= self.candidates[-1]:
            raise ValueError(f"mean_bits must be within the candidates {self.candidates}, got {self.mean_bits}")

    def leaves(self, bits: int) -> bool:
        """Whether a layer of so many bits keeps them, for they are more than any candidate."""
        return bits > self.candidates[-1]


@dataclass(frozen=True)
class AttentionConfig:
    """Attention's own products quantized: queries, keys and values, and the softmax.

    Attributes:
        bits: of queries, keys and values; each sample has its own range.
        softmax_bits: of the softmax, whose range is 0 to 1.
    """

    bits: int = 8
    softmax_bits: int = 8

    def __post_init__(self) -> None:
        at_least(self, bits=2, softmax_bits=2)
        if max(self.bits, self.softmax_bits) > 8:
            raise ValueError(f"attention has at most 8 bits, got {self.bits} and {self.softmax_bits}")


def at_least(config: object, **limits: int) -> None:
    """Raise ``ValueError`` for a field of ``config`` below its limit."""
    for name, limit in limits.items():
        if getattr(config, name) < limit:
            raise ValueError(f"{name} must be {limit} or more, got {getattr(config, name)}")
