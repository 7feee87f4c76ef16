"""The arithmetic against float64 versions written from the equations, and the properties that the rest leans on."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.numerics import (
    EPS,
    affine,
    choose_qparams,
    code_range,
    dequantize_affine,
    fake_quantize,
    pack,
    pack_rows,
    quantize_affine,
    sqnr,
    unpack,
    unpack_rows,
)

BITS = st.integers(1, 8)
ENDS = st.floats(-1e4, 1e4, width=32)
SEEDS = st.integers(0, 2**31)
# A range, its width of code and the kind of code; one symmetric bit has no positive value and is refused.
RANGES = st.tuples(ENDS, ENDS, BITS, st.booleans()).map(lambda r: (min(r[:2]), max(r[:2]), max(r[2], 1 + r[3]), r[3]))


def qparams(low: float, high: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    return choose_qparams(torch.tensor(low), torch.tensor(high), bits, symmetric)


def random_codes(bits: int, count: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))


def test_doctests() -> None:
    result = doctest.testmod(affine)
    assert result.attempted > 0
    assert result.failed == 0


@given(RANGES)
def test_choose_qparams_is_the_equation(given_range: tuple[float, float, int, bool]) -> None:
    low, high, bits, symmetric = given_range
    scale, zero_point = qparams(*given_range)
    low, high = min(low, 0.0), max(high, 0.0)
    expected = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    expected = max(expected, 2.0**-23)
    assert float(scale) == pytest.approx(expected, rel=1e-6)
    # Rounded to the nearest: the exact quotient is at most half a code away, give or take float32.
    assert abs(int(zero_point) - (0.0 if symmetric else -low / expected)) <= 0.5 + 1e-4
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


@given(RANGES)
def test_zero_is_a_code(given_range: tuple[float, float, int, bool]) -> None:
    _, _, bits, symmetric = given_range
    scale, zero_point = qparams(*given_range)
    quant_min, quant_max = code_range(bits, symmetric)
    assert quant_min <= int(zero_point) <= quant_max
    assert int(quantize_affine(torch.zeros(()), scale, zero_point, quant_min, quant_max)) == int(zero_point)
    assert float(fake_quantize(torch.zeros(()), scale, zero_point, quant_min, quant_max)) == 0.0


@given(RANGES)
def test_the_range_and_zero_are_represented(given_range: tuple[float, float, int, bool]) -> None:
    low, high, bits, symmetric = given_range
    scale, zero_point = qparams(*given_range)
    smallest, largest = (
        float(dequantize_affine(torch.tensor(q), scale, zero_point)) for q in code_range(bits, symmetric)
    )
    slack = float(scale) * (0.5 + 1e-4)
    assert smallest - slack <= min(low, 0.0)
    assert largest + slack >= max(high, 0.0)
    assert smallest <= 0.0 <= largest


@given(RANGES, SEEDS)
def test_quantize_rounds_the_quotient(given_range: tuple[float, float, int, bool], seed: int) -> None:
    scale, zero_point = qparams(*given_range)
    limits = code_range(*given_range[2:])
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * float(scale) * 2 ** given_range[2]
    for value, code in zip(x.tolist(), quantize_affine(x, scale, zero_point, *limits).tolist(), strict=True):
        exact = value / float(scale) + int(zero_point)
        clamped = min(max(exact, limits[0]), limits[1])
        assert code == int(code)
        assert abs(code - clamped) <= 0.5 + 1e-4


@given(st.lists(st.integers(-5000, 5000), min_size=1, max_size=30), st.integers(-4, 4), st.integers(0, 255))
def test_quantize_ties_go_to_even(sixteenths: list[int], exponent: int, zero_point: int) -> None:
    scale = 2.0**exponent  # powers of two: the quotient is exact, so that ties are ties
    x = [n / 16 * scale for n in sixteenths]
    expected = [min(max(round(n / 16) + zero_point, 0), 255) for n in sixteenths]
    codes = quantize_affine(torch.tensor(x), torch.tensor(scale), torch.tensor(zero_point), 0, 255)
    assert codes.tolist() == expected


@given(RANGES)
def test_dequantize_is_the_equation(given_range: tuple[float, float, int, bool]) -> None:
    scale, zero_point = qparams(*given_range)
    quant_min, quant_max = code_range(*given_range[2:])
    codes = torch.arange(quant_min, quant_max + 1)
    expected = [(q - int(zero_point)) * float(scale) for q in codes.tolist()]
    assert dequantize_affine(codes, scale, zero_point).tolist() == pytest.approx(expected, rel=1e-6)


@given(RANGES, SEEDS)
def test_fake_quantize_is_idempotent(given_range: tuple[float, float, int, bool], seed: int) -> None:
    scale, zero_point = qparams(*given_range)
    limits = code_range(*given_range[2:])
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * float(scale) * 2 ** given_range[2]
    once = fake_quantize(x, scale, zero_point, *limits)
    assert torch.equal(fake_quantize(once, scale, zero_point, *limits), once)


@given(ENDS, ENDS, st.booleans())
def test_more_bits_mean_a_smaller_step_and_error(first: float, second: float, symmetric: bool) -> None:
    low, high = min(first, second, 0.0), max(first, second, 0.0)
    high = max(high, low + 1.0)
    x = torch.linspace(low, high, 4097)
    last_step = last_error = math.inf
    for bits in range(1 + symmetric, 9):
        scale, zero_point = qparams(low, high, bits, symmetric)
        error = float((fake_quantize(x, scale, zero_point, *code_range(bits, symmetric)) - x).abs().max())
        assert float(scale) < last_step
        assert error <= last_error
        assert error <= float(scale) * (0.5 + 1e-4)
        last_step, last_error = float(scale), error


@given(RANGES, st.integers(-8, 20), SEEDS)
def test_quantization_is_scale_equivariant(
    given_range: tuple[float, float, int, bool], exponent: int, seed: int
) -> None:
    low, high, bits, symmetric = given_range
    high = max(high, low + 1.0, 1.0)  # steps well above EPS
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * high
    scale, zero_point = qparams(low, high, bits, symmetric)
    scaled, scaled_zero_point = qparams(low * 2.0**exponent, high * 2.0**exponent, bits, symmetric)
    assert torch.equal(scaled, scale * 2.0**exponent)
    assert torch.equal(scaled_zero_point, zero_point)
    limits = code_range(bits, symmetric)
    expected = quantize_affine(x, scale, zero_point, *limits)
    assert torch.equal(quantize_affine(x * 2.0**exponent, scaled, zero_point, *limits), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_empty_range_has_a_harmless_step(symmetric: bool) -> None:
    scale, zero_point = qparams(0.0, 0.0, 8, symmetric)
    assert (float(scale), int(zero_point)) == (EPS, 0)


def test_choose_qparams_takes_any_shape() -> None:
    low, high = -torch.rand(2, 3), torch.rand(2, 3)
    scale, zero_point = choose_qparams(low, high, 4, symmetric=False)
    for index in [(0, 0), (1, 2)]:
        alone = qparams(float(low[index]), float(high[index]), 4, False)
        assert (scale[index], zero_point[index]) == alone


def test_one_symmetric_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric codes need at least 2 bits; use asymmetric codes for 1 bit"):
        qparams(-1.0, 1.0, 1, True)


def test_half_precision_is_quantized_in_float32() -> None:
    x = torch.randn(1000).bfloat16()
    scale, zero_point = torch.tensor(0.0371), torch.tensor(100)
    codes = quantize_affine(x, scale, zero_point, 0, 255)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, quantize_affine(x.float(), scale, zero_point, 0, 255))


def test_along_puts_values_on_an_axis() -> None:
    values = torch.arange(3)
    assert numerics.along(values, 1, 4).shape == (1, 3, 1, 1)
    assert numerics.along(values, -1, 3).shape == (1, 1, 3)


@given(BITS, st.integers(0, 70), SEEDS)
def test_pack_is_dense_little_endian_and_reversible(bits: int, count: int, seed: int) -> None:
    codes = random_codes(bits, count, seed)
    packed = pack(codes, bits)
    size = math.ceil(count / 8) * bits
    number = sum(code << (bits * index) for index, code in enumerate(codes.tolist()))
    assert (packed.dtype, packed.shape) == (torch.uint8, (size,))
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@given(BITS, st.integers(0, 8), SEEDS)
def test_unpack_is_reversible(bits: int, groups: int, seed: int) -> None:
    packed = random_codes(8, groups * bits, seed).to(torch.uint8)
    assert torch.equal(pack(unpack(packed, bits, groups * 8), bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_keeps_the_largest_codes(bits: int) -> None:
    codes = torch.full((3, 3), 2**bits - 1)
    assert unpack(pack(codes, bits), bits, 9).tolist() == [2**bits - 1] * 9


def test_pack_refuses_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"codes must be in \[0, 15\] for 4 bits, got \[3, 16\]"):
        pack(torch.tensor([3, 16]), 4)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 255\] for 8 bits, got \[-1, 0\]"):
        pack(torch.tensor([-1, 0]), 8)


@given(st.integers(1, 9), st.integers(1, 9), SEEDS)
def test_rows_share_bytes_and_come_back(rows: int, inputs: int, seed: int) -> None:
    codes = random_codes(4, rows * inputs, seed).reshape(rows, inputs)
    packed = pack_rows(codes)
    half = math.ceil(rows / 2)
    assert (packed.dtype, packed.shape) == (torch.uint8, (half, inputs))
    for row, line in enumerate(codes.tolist()):
        assert [byte >> 4 * (row // half) & 15 for byte in packed[row % half].tolist()] == line
    back = unpack_rows(packed, rows)
    assert back.dtype == torch.int8
    assert torch.equal(back.long(), codes.long())


def test_rows_wider_than_half_a_byte_are_refused() -> None:
    for codes, words in (([[3, 16]], r"got \[3, 16\]"), ([[-1, 0]], r"got \[-1, 0\]")):
        with pytest.raises(ValueError, match=rf"codes must be in \[0, 15\] to share a byte, {words}"):
            pack_rows(torch.tensor(codes))


def test_unpack_refuses_other_sizes_and_dtypes() -> None:
    with pytest.raises(ValueError, match=r"9 codes of 3 bits take 6 uint8, got 5 torch.uint8"):
        unpack(torch.zeros(5, dtype=torch.uint8), 3, 9)
    with pytest.raises(ValueError, match=r"9 codes of 3 bits take 6 uint8, got 6 torch.int8"):
        unpack(torch.zeros(6, dtype=torch.int8), 3, 9)


@settings(max_examples=30)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), SEEDS)
def test_sqnr_is_the_equation(count: int, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(count, generator=generator)
    actual = expected + noise * torch.randn(count, generator=generator)
    pairs = list(zip(actual.tolist(), expected.tolist(), strict=True))
    ratio = sum(e * e for _, e in pairs) / sum((a - e) ** 2 for a, e in pairs)
    assert sqnr(actual, expected) == pytest.approx(10 * math.log10(ratio), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sqnr_of_equals_is_infinite(value: float) -> None:
    assert sqnr(torch.full((4,), value), torch.full((4,), value)) == math.inf


def test_sqnr_of_noise_without_a_signal() -> None:
    assert sqnr(torch.ones(4), torch.zeros(4)) == -math.inf
