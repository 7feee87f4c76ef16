"""Records whose codes take half a byte each in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.records.record import LayerRecord, WeightRecord, outline

# Up to here two codes share a byte.
PACKED_BITS = 4


class PackedWeight(WeightRecord):
    """The same record in half the memory: two codes a byte, for weights of at most ``PACKED_BITS`` bits.

    ``codes`` are unpacked whenever they are read.

    Attributes:
        packed: [ceil(out / 2), inputs] uint8, ``numerics.pack_rows`` of the codes plus ``offset``.
        offset: what a stored code is more than a code, so that it is not negative.
    """

    packed: Tensor
    offset: int
    _shape: torch.Size

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        channel_bits: Tensor | None = None,
    ) -> None:
        """Pack ``codes``; the arguments are those of ``WeightRecord``, so that ``dataclasses.replace`` works.

        Raises:
            ValueError: for codes that do not fit half a byte.
        """
        offset = -numerics.code_range(bits, symmetric)[0]
        packed = numerics.pack_rows(codes.flatten(1) + offset)
        own = {"packed": packed, "offset": offset, "_shape": codes.shape}
        same = {"bits": bits, "symmetric": symmetric, "scale": scale, "zero_point": zero_point}
        for name, value in (own | same | {"channel_bits": channel_bits}).items():
            object.__setattr__(self, name, value)  # the way into a frozen dataclass

    @property
    def shape(self) -> torch.Size:
        """Of the weight; unpacks nothing."""
        return self._shape

    @property
    def codes(self) -> Tensor:
        """[out, ...] of the weight's own shape."""
        codes = numerics.unpack_rows(self.packed, self.shape[0]) - self.offset
        return codes.to(numerics.code_dtype(self.symmetric)).reshape(self.shape)


def packed_record(record: LayerRecord) -> LayerRecord:
    """The record with its weight's codes two a byte; itself when they are wider than half a byte."""
    weight = record.weight
    if weight.bits > PACKED_BITS or isinstance(weight, PackedWeight):
        return record
    packed = PackedWeight(
        weight.bits, weight.symmetric, weight.codes, weight.scale, weight.zero_point, weight.channel_bits
    )
    return replace(record, weight=packed)


class PackedRecords(Mapping[str, LayerRecord]):
    """Records whose codes are packed as they are read, for a graph that keeps them so."""

    def __init__(self, records: Mapping[str, LayerRecord]) -> None:
        self.records = records

    def __getitem__(self, name: str) -> LayerRecord:
        """The packed record of a layer."""
        return packed_record(self.records[name])

    def without_codes(self, name: str) -> LayerRecord:
        """As ``outline`` gives it."""
        return outline(self.records, name)

    def __iter__(self) -> Iterator[str]:
        """Layer names."""
        return iter(self.records)

    def __len__(self) -> int:
        """How many layers."""
        return len(self.records)
