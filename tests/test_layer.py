"""Shifting weight codes is dividing the input's step, exactly; and the widths at which the shift fits int8."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import Granularity, Ranges, TensorConfig
from dmq_ao.numerics import code_range, from_unsigned, to_unsigned
from dmq_ao.observers.minmax import MinMax
from dmq_ao.observers.weight import quantize_weight
from dmq_ao.records import (
    ActivationRecord,
    Kernel,
    LayerRecord,
    PackedWeight,
    WeightRecord,
    packed_record,
    shift_fits_int8,
    shifted_codes,
    with_positive_scale,
)


def weight_record(shape: tuple[int, ...], bits: int, symmetric: bool, generator: torch.Generator) -> WeightRecord:
    low, high = code_range(bits, symmetric)
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8 if symmetric else torch.uint8)
    zero_point = torch.randint(0, high + 1, (shape[0], 1), generator=generator, dtype=torch.int32)
    zero_point = torch.zeros_like(zero_point) if symmetric else zero_point
    return WeightRecord(bits, symmetric, codes, torch.ones(shape[0], 1), zero_point)


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 2, 6]),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
    exponents=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_shifted_sum_is_the_divided_sum(
    bits: int, symmetric: bool, groups: int, kernel: tuple[int, ...], exponents: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels, out = 6, 12
    per_group = channels // groups
    weight = weight_record((out, per_group, *kernel), bits, symmetric, generator)
    inputs = torch.randint(0, 256, (channels, *kernel), generator=generator)
    zero_point = int(torch.randint(0, 256, (), generator=generator))
    shifted, largest = shifted_codes(weight, torch.tensor(exponents, dtype=torch.int8), groups)
    assert (shifted.shape, largest) == (weight.codes.shape, max(exponents))
    for o in range(out):
        first = o // (out // groups) * per_group
        integers, divided = 0, 0.0  # float64 holds these sums of eighths exactly
        for c in range(per_group):
            centred = (inputs[first + c] - zero_point).long()
            plain = weight.codes[o, c].long() - int(weight.zero_point[o, 0])
            divided += float((centred * plain).sum()) * 2.0 ** -exponents[first + c]
            integers += int((centred * shifted[o, c].long()).sum())
        assert divided == integers * 2.0**-largest


@given(
    bits=st.integers(1, 4),
    symmetric=st.booleans(),
    shape=st.sampled_from([(1, 3), (5, 4), (6, 3, 2), (7, 2, 3, 1)]),
    seed=st.integers(0, 2**31),
)
def test_a_packed_weight_is_the_same_record_in_half_the_bytes(
    bits: int, symmetric: bool, shape: tuple[int, ...], seed: int
) -> None:
    weight = weight_record(shape, bits, symmetric, torch.Generator().manual_seed(seed))
    packed = packed_record(LayerRecord("layer", "linear", weight, None)).weight
    assert isinstance(packed, PackedWeight)
    assert packed.packed.numel() == (shape[0] + 1) // 2 * weight.codes[0].numel()
    assert vars(packed).keys() == {
        "bits",
        "symmetric",
        "packed",
        "offset",
        "_shape",
        "scale",
        "zero_point",
        "channel_bits",
    }
    for one in (packed, copy.deepcopy(packed), dataclasses.replace(packed, scale=packed.scale)):
        assert isinstance(one, PackedWeight)
        for field in dataclasses.fields(WeightRecord):
            actual, expected = getattr(one, field.name), getattr(weight, field.name)
            assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected, field.name
        assert one.codes.dtype == weight.codes.dtype
        assert torch.equal(one.dequantize(), weight.dequantize())


def test_wider_codes_are_left_as_they_are() -> None:
    record = LayerRecord("layer", "linear", weight_record((4, 3), 5, True, torch.Generator()), None)
    assert packed_record(record) is record


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_exponents_codes_are_only_centred(symmetric: bool) -> None:
    weight = weight_record((4, 3, 2), 4, symmetric, torch.Generator().manual_seed(0))
    centred, largest = shifted_codes(weight, None)
    assert largest == 0
    assert torch.equal(centred, weight.codes.int() - weight.zero_point[:, :, None])


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product(range(1, 9), [False, True])))
def test_shift_fits_int8_as_counted_out(bits: int, symmetric: bool) -> None:
    low, high = code_range(bits, symmetric)
    zero_points = [0] if symmetric else range(low, high + 1)
    differences = {code - zero_point for code in range(low, high + 1) for zero_point in zero_points}
    for largest in range(8):
        fits = all(-128 <= difference << shift <= 127 for difference in differences for shift in range(largest + 1))
        assert shift_fits_int8(bits, symmetric, largest) is fits


@pytest.mark.parametrize(
    ("exponents", "step"),
    [(None, None), ([0, 0], None), ([0, 3, 1], [1.0, 0.125, 0.5]), ([2, 2], [0.25, 0.25])],
)
def test_channel_step(exponents: list[int] | None, step: list[float] | None) -> None:
    given_exponents: Tensor | None = None if exponents is None else torch.tensor(exponents, dtype=torch.int8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    record = ActivationRecord(8, 1, Ranges.STATIC, one, zero, exponents=given_exponents)
    actual = record.channel_step
    assert (None if actual is None else actual.tolist()) == step


def test_a_kernel_says_whether_it_multiplies_integers() -> None:
    assert Kernel("onednn int8 linear").is_integer
    assert not Kernel("float on dequantized values", "weight-only").is_integer


@given(
    bits=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 3]),
    scales=st.lists(st.sampled_from([-2.0, -1e-3, 0.0, -1e-45, 1e-3, 3.0]), min_size=12, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_a_scale_above_zero_gives_the_same_values(
    bits: list[int], symmetric: bool, groups: int, scales: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=generator)
    config = TensorConfig(8, Granularity.PER_GROUP, 6 // groups, symmetric=symmetric)
    record = quantize_weight(weight, config, MinMax, torch.tensor(bits, dtype=torch.uint8))
    record = dataclasses.replace(record, scale=torch.tensor(scales)[: 4 * groups].reshape(4, groups))
    positive = with_positive_scale(record)
    assert bool((positive.scale > 0).all())
    assert torch.allclose(positive.dequantize(), record.dequantize(), rtol=0, atol=1e-35)
    for row, width in enumerate(bits):  # codes stay codes of their width
        stored = to_unsigned(positive.codes[row], width, symmetric)
        assert 0 <= int(stored.min()) <= int(stored.max()) < 2**width
        assert torch.equal(from_unsigned(stored.to(torch.uint8), width, symmetric), positive.codes[row])


def test_a_code_without_a_counterpart_becomes_its_neighbour() -> None:
    codes = torch.tensor([[-8, 7, 0]], dtype=torch.int8)
    record = WeightRecord(4, True, codes, torch.tensor([[-1.0]]), torch.zeros(1, 1, dtype=torch.int32))
    assert with_positive_scale(record).codes.tolist() == [[7, -7, 0]]


def test_a_record_of_positive_scales_is_left_alone() -> None:
    record = WeightRecord(4, True, torch.ones(1, 3).char(), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    assert with_positive_scale(record) is record
