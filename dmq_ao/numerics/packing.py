"""Codes in bytes: packed without gaps on disk, two a byte in kernels."""

import torch
from torch import Tensor

from dmq_ao.numerics.affine import code_range


def to_unsigned(codes: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Codes [...] of a weight as int16 in ``[0, 2**bits - 1]``, to be packed."""
    if bits == 1:
        return (codes.to(torch.int16) + symmetric) >> 1
    return codes.to(torch.int16) - code_range(bits, symmetric)[0]


def from_unsigned(stored: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The inverse of ``to_unsigned`` on uint8 ``stored`` [...]: int8 where symmetric, else uint8; may reuse memory."""
    # Bytes wrap around: what is below zero then reads right as a signed one.
    codes = stored.mul_(2).sub_(int(symmetric)) if bits == 1 else stored.sub_(-code_range(bits, symmetric)[0])
    return codes.view(torch.int8) if symmetric else codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of ``bits`` bits without gaps, least significant bit first.

    Eight codes fill ``bits`` bytes; the last group is padded with zeros.

    Args:
        codes: [...] any shape, integers in ``[0, 2**bits - 1]``.
        bits: 1 to 8.

    Returns:
        [ceil(numel / 8) * bits] uint8.

    Raises:
        ValueError: for codes outside of that range.
    """
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ValueError(f"codes must be in [0, {2**bits - 1}] for {bits} bits, got [{flat.min()}, {flat.max()}]")
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    place = torch.arange(8, device=flat.device)
    word = (flat << (bits * place)).sum(-1, keepdim=True)
    packed: Tensor = ((word >> (8 * place[:bits])) & 255).to(torch.uint8).reshape(-1)
    return packed


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that ``numel`` codes of ``bits`` bits take once packed."""
    return -(-numel // 8) * bits


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse of ``pack``: uint8 codes [numel].

    Raises:
        ValueError: for another dtype than uint8, or another number of bytes than ``numel`` codes take.
    """
    expected = packed_bytes(numel, bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise ValueError(f"{numel} codes of {bits} bits take {expected} uint8, got {packed.numel()} {packed.dtype}")
    if bits == 8:
        return packed[:numel].clone()
    if 8 % bits == 0:  # no code crosses a byte
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    else:
        place = torch.arange(8, device=packed.device)
        word = (packed.reshape(-1, bits).to(torch.int64) << (8 * place[:bits])).sum(-1, keepdim=True)
        codes = (word >> (bits * place)) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1)[:numel]


def pack_rows(codes: Tensor) -> Tensor:
    """Pack unsigned codes of at most 4 bits two a byte, as kernels unpack them: whole rows at a time.

    Args:
        codes: [rows, n], integers in 0 to 15.

    Returns:
        uint8 [ceil(rows / 2), n]; row ``i`` holds row ``i`` of the codes in its low halves and row
        ``i + ceil(rows / 2)`` in its high ones.

    Raises:
        ValueError: for codes outside of that range.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 15):
        raise ValueError(f"codes must be in [0, 15] to share a byte, got [{codes.min()}, {codes.max()}]")
    low, high = torch.nn.functional.pad(codes.to(torch.uint8), (0, 0, 0, len(codes) % 2)).chunk(2)
    return low | (high << 4)


def unpack_rows(packed: Tensor, rows: int) -> Tensor:
    """The inverse of ``pack_rows``: int8 codes [rows, n]."""
    halves = torch.stack([packed & 15, packed >> 4])
    return halves.view(torch.int8).flatten(0, 1)[:rows]
