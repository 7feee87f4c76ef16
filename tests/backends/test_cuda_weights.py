"""Packed weights of the CUDA kernels: nothing is lost, and a tile of bytes gives tiles of neighbouring channels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.backends.cuda.weights import LANES, KernelWeight, kernel_weight, pack_lanes, unpack_lanes
from dmq_ao.records import WeightRecord, shifted_codes


def weight_of(shape: tuple[int, ...], bits: int | list[int], symmetric: bool) -> WeightRecord:
    """Random codes over their whole range; widths of rows in turn, where there are several."""
    widths = torch.tensor(bits).repeat(shape[0])[: shape[0]] if isinstance(bits, list) else torch.full(shape[:1], bits)
    scale, zero_point = torch.rand(shape[0], 1), torch.zeros(shape[0], 1, dtype=torch.int32)
    if not symmetric:
        zero_point[:, 0] = (torch.rand(shape[0]) * 2.0**widths).int()
        zero_point[widths == 1] = 1
    rows = [row_codes(shape[1:], int(width), symmetric) for width in widths]
    codes = torch.stack(rows).to(torch.int8 if symmetric else torch.uint8)
    channel_bits = widths.to(torch.uint8) if isinstance(bits, list) else None
    return WeightRecord(int(widths.max()), symmetric, codes, scale, zero_point, channel_bits)


def row_codes(shape: tuple[int, ...], bits: int, symmetric: bool) -> Tensor:
    if bits == 1:  # a sign: one less and one more than the zero point
        return torch.randint(0, 2, shape) * 2 - int(symmetric)
    low, high = numerics.code_range(bits, symmetric)
    return torch.randint(low, high + 1, shape)


def centred(weight: KernelWeight, shape: torch.Size) -> Tensor:
    """What the kernels make of the bytes: centred, shifted codes [out, channels, ...] int32."""
    taps = shape[2:].numel()
    rows = []
    for width, packed in zip(weight.widths, weight.packed, strict=True):
        if width == 8:
            rows.append(packed.view(torch.int8).reshape(len(packed), taps, -1)[..., : shape[1]].int())
        else:
            rows.append(unpack_lanes(packed, width, taps, shape[1]).int())
    order = torch.arange(shape[0]) if weight.order is None else weight.order.long()
    codes = torch.empty(shape[0], taps, shape[1], dtype=torch.int32)
    codes[order] = torch.cat(rows)
    codes -= weight.middle.int().reshape(-1, 1, 1)
    if weight.shifts is not None:
        narrow = torch.cat([torch.full((len(p),), w < 8) for w, p in zip(weight.widths, weight.packed, strict=True)])
        shifts = torch.zeros(shape[0], 1, shape[1], dtype=torch.int32)
        shifts[order[narrow]] = weight.shifts.int()
        codes <<= shifts
    return codes.movedim(1, 2).reshape(shape)


@given(st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 4), st.integers(1, 300))
def test_packing_loses_nothing(bits: int, rows: int, taps: int, channels: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, taps, channels))
    packed = pack_lanes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, taps * -(-channels // (LANES * 8 // bits)) * LANES)
    assert torch.equal(unpack_lanes(packed, bits, taps, channels), codes)


@given(st.sampled_from([2, 4]), st.integers(0, 255))
def test_a_byte_holds_codes_that_lie_lanes_apart(bits: int, channel: int) -> None:
    codes = torch.zeros(1, 1, 256)
    codes[0, 0, channel] = 1
    each = 8 // bits
    group, rest = divmod(channel, LANES * each)
    i, lane = divmod(rest, LANES)
    expected = torch.zeros(1, 256 // each)
    expected[0, group * LANES + lane] = 1 << (bits * i)
    assert torch.equal(pack_lanes(codes, bits), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, [4, 2], [1, 3, 7], [4, 3], [2, 1]])
@pytest.mark.parametrize("shape", [(7, 40), (6, 5, 3, 3), (3, 33, 1, 2)])
def test_the_bytes_hold_the_shifted_codes(shape: tuple[int, ...], bits: int | list[int], symmetric: bool) -> None:
    weight = weight_of(shape, bits, symmetric)
    laid_out = kernel_weight(weight, None)
    assert torch.equal(centred(laid_out, weight.shape), shifted_codes(weight, None)[0].int())
    most = max(bits) if isinstance(bits, list) else bits
    largest = min(3, (8 if symmetric else 7) - most)
    exponents = (torch.arange(shape[1]) % 4).clamp(max=largest).to(torch.int8)
    laid_out = kernel_weight(weight, exponents)
    assert torch.equal(centred(laid_out, weight.shape), shifted_codes(weight, exponents)[0].int())


def stored_bytes(weight: KernelWeight) -> int:
    return sum(tensor.numel() for tensor in weight.packed)


def test_widths_take_the_bytes_that_they_should() -> None:
    weight = weight_of((8, 128), [2, 4], symmetric=True)
    laid_out = kernel_weight(weight, None)
    assert (laid_out.widths, stored_bytes(laid_out)) == ([2, 4], 4 * 32 + 4 * 64)
    assert laid_out.order is not None
    assert laid_out.order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    wide = replace(weight, bits=8, channel_bits=None)
    assert stored_bytes(kernel_weight(wide, None)) == 8 * 128


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 2, 3), (4, 3, 1, 2)])
def test_sums_are_those_of_each_tap(shape: tuple[int, ...]) -> None:
    weight, exponents = weight_of(shape, 4, symmetric=False), torch.arange(shape[1]).clamp(max=3).to(torch.int8)
    shifted = shifted_codes(weight, exponents)[0].int()
    taps = shifted.flatten(2).unbind(2) if len(shape) > 2 else (shifted,)
    sums = kernel_weight(weight, exponents).sums
    assert (sums.dtype, sums.shape, sums.is_contiguous()) == (torch.int32, (len(taps), shape[0]), True)
    assert torch.equal(sums, torch.stack([tap.sum(1) for tap in taps]).int())
