"""One quantized layer in integers: the codes of its weight, and how its input becomes codes.

The graph, the files and the kernels all read the record::

    y_o = (scale / 2**D) * w_scale_o * sum_c (q_c - z) * ((w_oc - w_z_o) << (D - e_c)) + bias_o,   D = max_c e_c

(DMQ, arXiv 2507.12933, eq. 13 and 28 to 29, with a zero point of the weight and a scale for each output channel.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.config import Ranges
from dmq_ao.numerics.segments import segment_bytes

Record = TypeVar("Record", bound="LayerRecord | WeightRecord | ActivationRecord")


def zero_point_dtype(bits: int) -> torch.dtype:
    """What the zero point of an input with codes of ``bits`` bits takes on disk."""
    return torch.uint8 if bits <= 8 else torch.int16


@dataclass(frozen=True, eq=False)
class ActivationRecord:
    """How a layer's input becomes unsigned codes.

    Attributes:
        bits: width of a code; codes are 0 to ``2**bits - 1``.
        ch_axis: channel axis of the input.
        ranges: static (one row), per_step (a row per timestep) or dynamic (no rows: from the sample itself).
        scale: [rows] float32.
        zero_point: [rows] int32, inside the code range.
        timesteps: [rows] float32 for ``per_step``, else None.
        exponents: [channels] int8, step ``scale * 2**-exponent``; [rows, channels] of votes per timestep; None
            without power-of-two scaling.
        channel_scale: [channels] float32, learned factor that the input is divided by and the weight's codes hold;
            None without learned scaling.
        float8: codes are float8_e4m3fn instead, and zero points are zero.
    """

    bits: int
    ch_axis: int
    ranges: Ranges
    scale: Tensor
    zero_point: Tensor
    timesteps: Tensor | None = None
    exponents: Tensor | None = None
    channel_scale: Tensor | None = None
    float8: bool = False

    @property
    def channel_step(self) -> Tensor | None:
        """``2**-exponent`` in float32, of the shape [channels] of ``exponents``; None where every step is plain."""
        if self.exponents is None or not bool(self.exponents.any()):
            return None
        return torch.exp2(-self.exponents.float())

    @property
    def quantize_step(self) -> Tensor | None:
        """Factor [channels] or [rows, channels] of ``scale`` in the quantize step: ``channel_scale * 2**-exponent``.

        Dequantizing goes by ``channel_step``: the learned factor is in the weight's codes (DMQ, arXiv 2507.12933, eq.
        10 to 11 and 22 to 24).
        """
        if self.channel_scale is None or self.channel_step is None:
            return self.channel_step if self.channel_scale is None else self.channel_scale
        return self.channel_scale * self.channel_step


@dataclass(frozen=True, eq=False)
class WeightRecord:
    """A layer's weight as codes.

    Attributes:
        bits: width of a code, of the widest where they differ.
        symmetric: signed int8 codes with zero point 0, or float8_e4m3fn ones; else uint8 codes.
        codes: [out, ...] of the weight's own shape.
        scale: [out, groups] float32; groups run over the flattened input axes.
        zero_point: [out, groups] int32.
        channel_bits: [out] uint8, the width of each output channel's codes; None where all have ``bits``.
    """

    bits: int
    symmetric: bool
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    channel_bits: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.codes.shape

    @property
    def float8(self) -> bool:
        """Whether codes are no integers."""
        return self.codes.dtype == numerics.FLOAT8

    @property
    def row_bits(self) -> int | Tensor:
        """Widths as ``numerics.RowLimits`` takes them: ``channel_bits`` [out], or one for all."""
        return self.bits if self.channel_bits is None else self.channel_bits

    @property
    def mean_bits(self) -> float:
        """Mean width of a code."""
        return float(self.bits) if self.channel_bits is None else float(self.channel_bits.double().mean())

    @property
    def code_bytes(self) -> int:
        """Bytes that the codes take in a file, every width packed by itself."""
        return sum(segment_bytes(self.segments, math.prod(self.shape[1:])))

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Widths in ascending order, each with the number of output channels that have it."""
        if self.channel_bits is None:
            return [(self.bits, self.shape[0])]
        widths, counts = self.channel_bits.unique(return_counts=True)
        return list(zip(widths.tolist(), counts.tolist(), strict=True))

    def dequantize(self) -> Tensor:
        """The float32 weight [out, ...] that the codes stand for."""
        groups = self.codes.reshape(self.codes.shape[0], self.scale.shape[1], -1)
        values = numerics.dequantize_affine(groups, self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1))
        return values.reshape(self.codes.shape)


def with_positive_scale(record: WeightRecord) -> WeightRecord:
    """The same values by scales above zero: where one is negative, codes and zero points are mirrored.

    ``(q - z) * s = ((m - q) - (m - z)) * -s`` with the largest code m; symmetric codes change sign, and the one
    without a counterpart, ``-2**(bits - 1)``, becomes its neighbour.
    """
    smallest = torch.finfo(torch.float32).tiny
    if bool((record.scale >= smallest).all()):
        return record
    negative = record.scale < 0
    codes = record.codes.reshape(*record.scale.shape, -1)
    if record.symmetric:
        bits = torch.as_tensor(record.row_bits, device=codes.device).reshape(-1, 1, 1).int()
        largest = (2 ** (bits - 1) - 1).clamp_min(1)  # one-bit codes are -1 and 1
        mirror = -codes if record.float8 else (-codes.int()).minimum(largest)
        mirror_zero_point = record.zero_point
    else:
        bits = torch.as_tensor(record.row_bits, device=codes.device).reshape(-1, 1).int()
        top = torch.where(bits == 1, 2, 2**bits - 1)  # one-bit codes are 0 and 2
        mirror, mirror_zero_point = top[..., None] - codes.int(), top - record.zero_point
    return replace(
        record,
        codes=torch.where(negative[..., None], mirror.to(codes.dtype), codes).reshape(record.shape),
        scale=record.scale.abs().clamp_min(smallest),
        zero_point=torch.where(negative, mirror_zero_point, record.zero_point).to(record.zero_point.dtype),
    )


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One quantized layer.

    Attributes:
        name: original module path; parts of a split concatenation end in ``.part0``, ``.part1``.
        kind: ``conv1d``, ``conv2d``, ``conv3d``, ``linear`` or ``embedding table``.
        weight: codes and scales.
        activation: None when the input stays in float, or is indices.
        bias: [out] float32 that replaces the layer's own; None to keep that.
    """

    name: str
    kind: str
    weight: WeightRecord
    activation: ActivationRecord | None
    bias: Tensor | None = None

    @property
    def stored_bits(self) -> int:
        """Bits that the record takes in a file."""
        weight, activation = self.weight, self.activation
        bits = 8 * weight.code_bytes + 32 * weight.scale.numel()
        bits += 0 if weight.symmetric else 8 * weight.zero_point.numel()
        bits += 0 if weight.channel_bits is None else 8 * len(weight.channel_bits)
        bits += 0 if self.bias is None else 32 * self.bias.numel()
        if activation is None:
            return bits
        bits += (32 + 8 * zero_point_dtype(activation.bits).itemsize) * activation.scale.numel()
        bits += 0 if activation.timesteps is None else 32 * activation.timesteps.numel()
        bits += 0 if activation.channel_scale is None else 32 * activation.channel_scale.numel()
        return bits + (0 if activation.exponents is None else 8 * activation.exponents.numel())


def on_device(record: Record, device: torch.device) -> Record:
    """The record, or a part of it, with all its tensors on a device."""
    tensors: dict[str, Any] = {}
    for name, value in ((field.name, getattr(record, field.name)) for field in fields(record)):
        if isinstance(value, Tensor):
            tensors[name] = value.to(device)
        elif isinstance(value, (WeightRecord, ActivationRecord)):
            tensors[name] = on_device(value, device)
    return replace(record, **tensors)


def outline(records: Mapping[str, LayerRecord], name: str) -> LayerRecord:
    """The record of a layer for looking at all but its codes: those stay in the file if the records come from one."""
    read: Callable[[str], LayerRecord] = getattr(records, "without_codes", records.__getitem__)
    return read(name)


def joint_record(records: Sequence[LayerRecord]) -> LayerRecord:
    """The record of layers that read the same codes as one layer, their outputs one after the other."""
    if len(records) == 1:
        return records[0]
    first, weights = records[0], [record.weight for record in records]
    widths = torch.cat([torch.as_tensor(one.row_bits, dtype=torch.uint8).expand(one.shape[0]) for one in weights])
    weight = WeightRecord(
        max(one.bits for one in weights),
        first.weight.symmetric,
        torch.cat([one.codes for one in weights]),
        torch.cat([one.scale for one in weights]),
        torch.cat([one.zero_point for one in weights]),
        widths if len(widths.unique()) > 1 else None,
    )
    return LayerRecord("+".join(record.name for record in records), first.kind, weight, first.activation)


def record_tensor(record: LayerRecord, field: str) -> Tensor:
    """A tensor of a record by the name that a converted graph knows it by, with the record's own shape [...].

    Raises:
        ValueError: for an unknown field, or one that this record does not have.
    """
    weight, activation = record.weight, record.activation
    tensor: Tensor | None = None
    if field in ("codes", "weight_scale", "weight_zero_point"):
        tensor = getattr(weight, field.removeprefix("weight_"))
    elif field == "corrected_bias":
        tensor = record.bias
    elif activation is not None and field in ("input_scale", "input_zero_point"):
        tensor = getattr(activation, field.removeprefix("input_"))
    elif activation is not None and field == "dequantize_step":
        tensor = activation.channel_step
    elif activation is not None and field in ("timesteps", "channel_scale", "quantize_step"):
        tensor = getattr(activation, field)
    if tensor is None:
        raise ValueError(f"the record of {record.name} has no {field!r}")
    return tensor
