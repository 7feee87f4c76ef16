"""Which output channel gets how many bits: a table that is searched, edited by hand, saved as JSON and applied."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmq_ao.config import MAX_BITS, MAX_INPUT_BITS, InvalidFile, as_json
from dmq_ao.config.as_json import typed

FORMAT = "dmq_ao.bit_plan"
VERSION = 1


@dataclass(frozen=True)
class LayerBits:
    """Widths of one layer.

    Attributes:
        weights: of one output channel, which all cost its width.
        bits: of each output channel.
    """

    weights: int
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        if type(self.weights) is not int or self.weights < 1 or not self.bits:
            raise ValueError(f"a layer has 1 or more weights and channels, got {self.weights!r} and {len(self.bits)}")
        for width in self.bits:
            if type(width) is not int or not 1 <= width <= MAX_BITS:
                raise ValueError(f"bits must be integers from 1 to {MAX_BITS}, got {width!r}")

    @property
    def mean_bits(self) -> float:
        """Mean over the channels."""
        return sum(self.bits) / len(self.bits)

    @property
    def channels_by_bits(self) -> dict[int, int]:
        """How many channels have each width."""
        return dict(sorted(Counter(self.bits).items()))

    def tensor(self) -> Tensor:
        """[out] uint8."""
        return torch.tensor(self.bits, dtype=torch.uint8)


@dataclass(frozen=True)
class InputBits:
    """Width of one layer's input.

    Attributes:
        products: multiply-accumulates of the layer, a sample, which all cost its width.
        bits: of the input's codes.
    """

    products: int
    bits: int

    def __post_init__(self) -> None:
        counted = type(self.products) is int and self.products >= 1
        if not counted or type(self.bits) is not int or not 1 <= self.bits <= MAX_INPUT_BITS:
            raise ValueError(
                f"an input has 1 to {MAX_INPUT_BITS} bits and 1 or more products, got {self.bits!r}, {self.products!r}"
            )


@dataclass(frozen=True)
class BitPlan:
    """Bits of every output channel of the layers it names; others keep what the recipe gives them.

    Attributes:
        layers: by name.
        scorer: what decided, for the reader.
        inputs: bits of layers' inputs by layer; readers of one input have the same.
    """

    layers: Mapping[str, LayerBits]
    scorer: str = "by hand"
    inputs: Mapping[str, InputBits] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it gives bits to anything."""
        return bool(self.layers or self.inputs)

    @property
    def mean_bits(self) -> float | None:
        """Mean over the weights of all layers it names; None where it names none."""
        numel = sum(one.weights * len(one.bits) for one in self.layers.values())
        return sum(one.weights * sum(one.bits) for one in self.layers.values()) / numel if numel else None

    @property
    def mean_input_bits(self) -> float | None:
        """Mean over the multiply-accumulates of the inputs it names; None where it names none."""
        products = sum(one.products for one in self.inputs.values())
        return sum(one.products * one.bits for one in self.inputs.values()) / products if products else None

    def summary(self) -> dict[str, Any]:
        """JSON-ready: mean bits and the channels of each width, layer by layer."""
        layers = {
            name: {
                "mean_bits": one.mean_bits,
                "channels_by_bits": {str(b): n for b, n in one.channels_by_bits.items()},
            }
            for name, one in self.layers.items()
        }
        inputs = Counter(one.bits for one in self.inputs.values())
        return {
            "scorer": self.scorer,
            "mean_bits": self.mean_bits,
            "mean_input_bits": self.mean_input_bits,
            "layers": layers,
            "inputs_by_bits": {str(bits): count for bits, count in sorted(inputs.items())},
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` is its inverse."""
        layers = {name: {"weights": one.weights, "bits": list(one.bits)} for name, one in self.layers.items()}
        inputs = {name: {"products": one.products, "bits": one.bits} for name, one in self.inputs.items()}
        head = {"format": FORMAT, "version": VERSION, "scorer": self.scorer}
        return {**head, "inputs": inputs, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BitPlan:
        """Read what ``to_dict`` gave.

        Raises:
            ValueError, TypeError: for what is no plan, or a width that is none.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT or data.get("version") != VERSION:
            named = f"{data.get('format')} {data.get('version')}" if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"a plan says format {FORMAT} and version {VERSION}, got {named}")
        plan = typed(_Stored, data, "plan")
        return cls(plan.layers, plan.scorer, plan.inputs)

    def save(self, file: str | Path) -> None:
        """Write JSON to edit, a layer a line; whatever stood there stays until the new one is whole."""
        data = self.to_dict()
        parts = [f"  {json.dumps(key)}: {json.dumps(data[key])}" for key in ("format", "version", "scorer")]
        for key in ("inputs", "layers"):
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(one)}" for name, one in data[key].items())
            parts.append(f'  "{key}": {{\n{lines}\n  }}')
        partial = Path(f"{file}.partial")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        os.replace(partial, file)

    @classmethod
    def load(cls, file: str | Path) -> BitPlan:
        """Read what ``save`` wrote, edited or not.

        Raises:
            InvalidFile: for a file that is missing, no JSON or no plan, or a width that is none.
        """
        try:
            plan = cls.from_dict(as_json.read_json(Path(file)))
            if not plan:
                raise ValueError("it names no layer")
        except FileNotFoundError:
            raise InvalidFile(f"{file} is missing; dmq_ao.search_bits(...).save(file) writes one") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InvalidFile(f"{file}: not a bit plan ({error}); search_bits writes one, to be edited") from error
        return plan


@dataclass(frozen=True)
class _Stored:
    """A plan as JSON, key by key."""

    format: str
    version: int
    scorer: str
    layers: dict[str, LayerBits]
    inputs: dict[str, InputBits] = field(default_factory=dict)
