"""A recipe: everything that decides a quantized model, besides the model and its samples.

It prints, compares, round-trips through JSON, and changes with ``dataclasses.replace``.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dmq_ao.config.as_json import plain, typed
from dmq_ao.config.learning import ChannelScaling, Distillation, Protection, Rounding, RoundingMethod
from dmq_ao.config.stages import BitAllocation as BitAllocation
from dmq_ao.config.stages import BlockReconstruction as BlockReconstruction
from dmq_ao.config.stages import Selection as Selection
from dmq_ao.config.tensors import QuantConfig

_STAGE = {"stage": True}  # metadata of the fields that ask calibration for a stage


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
    scaling: ChannelScaling | None = field(default=None, metadata=_STAGE)
    rounding: Rounding | None = field(default=None, metadata=_STAGE)
    bias_correction: bool = field(default=False, metadata=_STAGE)
    blocks: BlockReconstruction | None = field(default=None, metadata=_STAGE)
    protection: Protection | None = field(default=None, metadata=_STAGE)
    allocation: BitAllocation | None = field(default=None, metadata=_STAGE)
    distillation: Distillation | None = field(default=None, metadata=_STAGE)

    @property
    def learns(self) -> bool:
        """Whether calibration goes layer by layer, each seeing the layers before it quantized."""
        return any(self.asks_for(name) for name in self.stages)

    @property
    def stages(self) -> dict[str, Any]:
        """Every stage that calibration can be asked for, by its field, and what this recipe says of it."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("stage")}

    def asks_for(self, stage: str) -> bool:
        """Whether the recipe has a stage, named by its field."""
        return getattr(self, stage) not in (None, False)

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
