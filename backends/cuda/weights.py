"""Weights as the Triton kernels read them: codes of 2, 4 or 8 bits, packed so that unpacking moves nothing.

A byte holds ``8 / bits`` codes that lie ``LANES`` input channels apart::

    byte l of group g = sum_i  code[g * (8 / bits) * LANES + i * LANES + l] << (bits * i)

so that the i-th codes of ``LANES`` neighbouring bytes are those of as many neighbouring channels: a tile of bytes
gives ``8 / bits`` tiles of codes, each for channels that lie side by side in memory. Each tap of a convolution is
packed by itself. Codes of 8 bits are stored as they are multiplied, centred and shifted; narrower ones are centred and
shifted in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmq_ao.records import WeightRecord, channel_shifts, shifted_codes

LANES = 32


@dataclass(frozen=True, eq=False)
class KernelWeight:
    """The weight of one product.

    Attributes:
        widths: stored bits of the segments, ascending; a segment is a run of output channels in ``order``.
        packed: for each segment uint8 [rows, taps * bytes]; int8 codes where the width is 8.
        order: [out] int32, the output channel of each row of the segments; None where they are in order.
        middle: [out] int8, what a stored code is more than a centred one; 0 where codes take a byte.
        shifts: [channels] int8, by how much centred codes narrower than a byte are shifted; None where by nothing.
        sums: [taps, out] int32, sums over channels of the centred, shifted codes; a linear has one tap.
    """

    widths: list[int]
    packed: list[Tensor]
    order: Tensor | None
    middle: Tensor
    shifts: Tensor | None
    sums: Tensor


def pack_lanes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes [rows, taps, channels] as the module says; channels are filled up with zeros.

    Returns:
        uint8 [rows, taps * bytes].
    """
    each = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % (each * LANES)))
    lanes = codes.reshape(*codes.shape[:2], -1, each, LANES)
    packed = torch.zeros_like(lanes[..., 0, :])
    for i in range(each):
        packed |= lanes[..., i, :] << (bits * i)
    return packed.flatten(1)


def unpack_lanes(packed: Tensor, bits: int, taps: int, channels: int) -> Tensor:
    """The inverse of ``pack_lanes``: uint8 codes [rows, taps, channels]."""
    lanes = packed.reshape(packed.shape[0], taps, -1, 1, LANES)
    codes = torch.cat([(lanes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], 3)
    return codes.reshape(packed.shape[0], taps, -1)[..., :channels]


def kernel_weight(weight: WeightRecord, exponents: Tensor | None) -> KernelWeight:
    """Lay out a weight [out, channels, ...] whose shifted codes fit int8.

    Args:
        weight: one scale per output channel.
        exponents: [channels] of the layer's input, or None.
    """
    shifted = shifted_codes(weight, exponents)[0].to(torch.int8)
    stored = _stored_widths(weight)
    widths: list[int] = stored.unique().tolist()
    offset = _code_offset(weight, stored)
    unsigned = weight.codes.to(torch.int16) + (offset.reshape(-1, *[1] * (weight.codes.dim() - 1)))
    packed = []
    for width in widths:
        rows = stored == width
        packed.append(pack_lanes(_taps(unsigned[rows]), width) if width < 8 else _byte_rows(_taps(shifted[rows])))
    middle = torch.where(stored < 8, weight.zero_point[:, 0] + offset, 0).to(torch.int8)
    narrow = exponents is not None and bool(exponents.any()) and widths[0] < 8
    return KernelWeight(
        widths,
        packed,
        stored.argsort(stable=True).to(torch.int32) if len(widths) > 1 else None,
        middle,
        channel_shifts(exponents)[0].to(torch.int8) if narrow and exponents is not None else None,
        _sums(shifted),
    )


def _stored_widths(weight: WeightRecord) -> Tensor:
    """[out] of 2, 4 or 8; a code of one bit is a sign, and takes two."""
    bits = torch.as_tensor(weight.row_bits, dtype=torch.int64, device=weight.codes.device).expand(weight.shape[0])
    return torch.where(bits <= 2, 2, torch.where(bits <= 4, 4, 8))


def _code_offset(weight: WeightRecord, stored: Tensor) -> Tensor:
    """[out] what is added to codes to make them unsigned."""
    return 1 << (stored - 1) if weight.symmetric else torch.zeros_like(stored)


def _taps(codes: Tensor) -> Tensor:
    """Codes [out, channels, ...] as [out, taps, channels]."""
    return codes.flatten(2).movedim(1, 2) if codes.dim() > 2 else codes.unsqueeze(1)


def _byte_rows(codes: Tensor) -> Tensor:
    """int8 codes [rows, taps, channels] in rows whose taps begin at whole lanes."""
    return F.pad(codes, (0, -codes.shape[-1] % LANES)).flatten(1).contiguous()


def _sums(shifted: Tensor) -> Tensor:
    return _taps(shifted).sum(2, dtype=torch.int32).T.contiguous()
