"""Codes of different widths in one buffer: output channels in order of their width, every width packed by itself.

A segment is a width with the number of output channels that have it, in ascending order of the widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmq_ao import numerics

Segments = Sequence[tuple[int, int]]


def segment_bytes(segments: Segments, each: int) -> list[int]:
    """Bytes of each segment, ``each`` codes an output channel."""
    return [numerics.packed_bytes(count * each, bits) for bits, count in segments]


def pack_segments(codes: Tensor, segments: Segments, channel_bits: Tensor | None, symmetric: bool) -> Tensor:
    """Pack the codes of a weight.

    Args:
        codes: [out, ...].
        segments: that ``channel_bits`` make; one where that is None.
        channel_bits: [out] widths, on the device of ``codes``; None where all are the same.
        symmetric: signed codes.

    Returns:
        [bytes] uint8.
    """
    if channel_bits is None:
        ((bits, _),) = segments
        return numerics.pack(numerics.to_unsigned(codes, bits, symmetric), bits)
    rows = [(codes[channel_bits == bits], bits) for bits, _ in segments]
    return torch.cat([numerics.pack(numerics.to_unsigned(some, bits, symmetric), bits) for some, bits in rows])


def unpack_segments(
    packed: Tensor, shape: Sequence[int], segments: Segments, channel_bits: Tensor | None, symmetric: bool
) -> Tensor:
    """The inverse of ``pack_segments``: codes of ``shape`` [out, ...], int8 where symmetric, else uint8."""
    if channel_bits is None:
        ((bits, _),) = segments
        return _segment_codes(packed, bits, shape, symmetric)
    codes = torch.empty(tuple(shape), dtype=numerics.code_dtype(symmetric))
    parts = packed.split(segment_bytes(segments, math.prod(shape[1:])))
    for part, (bits, count) in zip(parts, segments, strict=True):
        codes[channel_bits == bits] = _segment_codes(part, bits, (count, *shape[1:]), symmetric)
    return codes


def _segment_codes(packed: Tensor, bits: int, shape: Sequence[int], symmetric: bool) -> Tensor:
    unsigned = numerics.unpack(packed, bits, math.prod(shape)).reshape(tuple(shape))
    return numerics.from_unsigned(unsigned, bits, symmetric)
