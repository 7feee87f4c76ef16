"""The Triton kernels equal sums of integers: in Triton's interpreter, or on a GPU where there is one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, HALVES, needs_triton, without_lost_checks
from torch import Tensor

from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda.tiles import Tile
from dmq_ao.backends.cuda.weights import kernel_weight
from dmq_ao.numerics import along
from dmq_ao.records import WeightRecord, shifted_codes
from tests.backends.test_cuda_weights import weight_of

pytestmark = needs_triton
without_lost_checks()

SMALL = Tile(rows=16, outs=16, lanes=32, parts=1, warps=4, stages=2)
WIDTHS: Any = st.sampled_from([1, 2, 3, 4, 7, 8, [4, 2], [3, 7, 1]])
TILES = st.builds(
    lambda rows, lanes, parts: SMALL._replace(rows=rows, lanes=lanes, parts=parts),
    st.sampled_from([16, 32]),
    st.sampled_from([32, 64]),
    st.sampled_from([1, 3]),
)
slowly = settings(max_examples=25, deadline=None)


def using(tile: Tile) -> Any:
    """Have kernels take this tile: the interpreter computes whole ones, so they should be small."""
    return mock.patch("dmq_ao.backends.cuda.tiles.tile_for", return_value=tile)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with using(SMALL):
        yield


def operands(
    weight: WeightRecord, exponents: Tensor | None, scale: Tensor, zero_point: Tensor, **given: Any
) -> tuple[Any, ...]:
    laid_out = kernel_weight(weight, exponents)
    tensors = (scale, zero_point, laid_out.packed, laid_out.widths, laid_out.order, laid_out.middle, laid_out.shifts)
    rest = (laid_out.sums, given.get("weight_scale", torch.ones(weight.shape[0])))
    added = (given.get("bias"), given.get("residual"))
    return tuple(on_device(value) for value in (*tensors, *rest, *added))


def on_device(value: Any) -> Any:
    if isinstance(value, list):
        return [on_device(item) for item in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def linear(codes: Tensor, weight: WeightRecord, exponents: Tensor | None = None, **given: Any) -> Tensor:
    scale, zero_point = given.pop("scale", torch.ones(1)), given.pop("zero_point")
    dtype = given.pop("dtype", torch.float32)
    signed = cuda_ops.signed_codes(codes).to(DEVICE)
    return cuda_ops.cuda_linear(signed, *operands(weight, exponents, scale, zero_point, **given), dtype).cpu()


def conv(
    codes: Tensor, weight: WeightRecord, geometry: tuple[list[int], ...], exponents: Tensor | None = None, **given: Any
) -> Tensor:
    scale, zero_point = given.pop("scale", torch.ones(1)), given.pop("zero_point")
    dtype = given.pop("dtype", torch.float32)
    signed = cuda_ops.signed_codes(codes).contiguous(memory_format=torch.channels_last).to(DEVICE)
    args = operands(weight, exponents, scale, zero_point, **given)
    return cuda_ops.cuda_conv(signed, *args, list(weight.shape[2:]), *geometry, dtype).cpu()


def zero_points(items: int) -> Tensor:
    return torch.randint(0, 256, (items,), dtype=torch.int32)


def votes(channels: int, weight: WeightRecord) -> Tensor | None:
    room = (8 if weight.symmetric else 7) - weight.bits
    return None if room <= 0 else torch.randint(0, min(3, room) + 1, (channels,), dtype=torch.int8)


def exact(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Centred codes in float64, whose products and sums are exact here."""
    return codes.double() - along(zero_point, 0, codes.dim())


@slowly
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    channels=st.integers(1, 150),
    outs=st.integers(1, 40),
    bits=WIDTHS,
    symmetric=st.booleans(),
    each_item=st.booleans(),
    tile=TILES,
    seed=st.integers(0, 2**16),
)
def test_a_linear_accumulates_exactly(
    rows: list[int],
    channels: int,
    outs: int,
    bits: int | list[int],
    symmetric: bool,
    each_item: bool,
    tile: Tile,
    seed: int,
) -> None:
    assume(symmetric or bits != 8)
    torch.manual_seed(seed)
    weight = weight_of((outs, channels), bits, symmetric)
    exponents = votes(channels, weight)
    codes = torch.randint(0, 256, (*rows, channels), dtype=torch.uint8)
    zero_point = zero_points(rows[0] if each_item else 1)
    scale = torch.ones(len(zero_point))
    expected = exact(codes, zero_point) @ shifted_codes(weight, exponents)[0].double().T
    assert float(expected.abs().max()) < 2**24  # what float32 holds exactly
    with using(tile):
        actual = linear(codes, weight, exponents, scale=scale, zero_point=zero_point)
    assert torch.equal(actual.double(), expected)


@slowly
@given(
    items=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.integers(1, 70),
    outs=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bits=WIDTHS,
    symmetric=st.booleans(),
    each_item=st.booleans(),
    tile=TILES,
    seed=st.integers(0, 2**16),
)
def test_a_convolution_accumulates_exactly(
    items: int,
    size: tuple[int, int],
    channels: int,
    outs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bits: int | list[int],
    symmetric: bool,
    each_item: bool,
    tile: Tile,
    seed: int,
) -> None:
    assume(symmetric or bits != 8)
    reach = [dil * (taps - 1) + 1 for dil, taps in zip(dilation, kernel, strict=True)]
    assume(all(side + 2 * pad >= far for side, pad, far in zip(size, padding, reach, strict=True)))
    torch.manual_seed(seed)
    weight = weight_of((outs, channels, *kernel), bits, symmetric)
    exponents = votes(channels, weight)
    codes = torch.randint(0, 256, (items, channels, *size), dtype=torch.uint8)
    zero_point = zero_points(items if each_item else 1)
    shifted = shifted_codes(weight, exponents)[0].double()
    expected = F.conv2d(exact(codes, zero_point), shifted, None, stride, padding, dilation)
    geometry = (list(stride), list(padding), list(dilation))
    scale = torch.ones(len(zero_point))
    with using(tile):
        actual = conv(codes, weight, geometry, exponents, scale=scale, zero_point=zero_point)
    assert torch.equal(actual.double(), expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_extreme_codes_do_not_saturate() -> None:
    codes = torch.full((2, 500), 255, dtype=torch.uint8)
    weight = replace(weight_of((2, 500), 8, symmetric=True), codes=torch.tensor([[-128], [127]]).expand(2, 500).char())
    zero = torch.zeros(1, dtype=torch.int32)
    expected = [[-128.0 * 255 * 500, 127.0 * 255 * 500]] * 2
    assert linear(codes, weight, zero_point=zero).tolist() == expected
    one = [1, 1]
    image = replace(weight, codes=weight.codes.reshape(2, 500, 1, 1))
    assert (
        conv(codes.reshape(2, 500, 1, 1), image, (one, [0, 0], one), zero_point=zero).flatten(1).tolist() == expected
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_epilogue_scales_and_adds(dtype: torch.dtype, parts: int) -> None:
    weight, zero_point, scale = weight_of((24, 70, 3, 3), 4, symmetric=True), zero_points(3), torch.rand(3) * 0.1
    codes = torch.randint(0, 256, (3, 70, 5, 6), dtype=torch.uint8)
    weight_scale, bias, residual = torch.rand(24) * 0.02, torch.randn(24), torch.randn(3, 24, 5, 6).to(dtype)
    added = {"weight_scale": weight_scale, "bias": bias, "residual": residual}
    one = [1, 1]
    given = {"scale": scale, "zero_point": zero_point, "dtype": dtype}
    with using(SMALL._replace(parts=parts)):
        actual = conv(codes, weight, (one, one, one), **given, **added)
    total = F.conv2d(exact(codes, zero_point), weight.codes.double(), padding=1)
    expected = total * along(scale, 0, 4) * along(weight_scale, 1, 4) + along(bias, 1, 4) + residual.double()
    assert actual.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    assert float((actual.double() - expected).abs().max()) <= eps * float(expected.abs().max())
    tokens = codes.flatten(2).mT
    matrix = replace(weight, codes=weight.codes[..., 0, 0].contiguous())
    actual = linear(tokens, matrix, **given, **(added | {"residual": residual.flatten(2).mT}))
    total = exact(tokens, zero_point) @ matrix.codes.double().T
    expected = total * along(scale, 0, 3) * weight_scale + bias + residual.flatten(2).mT.double()
    assert float((actual.double() - expected).abs().max()) <= eps * float(expected.abs().max())


@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (1, 7, 5, 5), (2, 4, 1, 1)])
def test_the_compiler_is_told_the_layout(shape: tuple[int, ...]) -> None:
    weight, zero_point = weight_of((5, shape[1], 3, 3), 4, symmetric=True), zero_points(1)
    codes = cuda_ops.signed_codes(torch.randint(0, 256, shape, dtype=torch.uint8)).to(DEVICE)
    args = operands(weight, None, torch.ones(1), zero_point)
    geometry = ([3, 3], [2, 1], [1, 1], [1, 1], torch.bfloat16)
    actual = cuda_ops.cuda_conv(codes, *args, *geometry)
    told = cuda_ops.cuda_conv(codes.to("meta"), *(meta(arg) for arg in args), *geometry)
    assert (told.shape, told.stride(), told.dtype) == (actual.shape, actual.stride(), actual.dtype)
    matrix = operands(weight_of((5, shape[-1]), 4, symmetric=True), None, torch.ones(1), zero_point)
    actual = cuda_ops.cuda_linear(codes, *matrix, torch.float16)
    told = cuda_ops.cuda_linear(codes.to("meta"), *(meta(arg) for arg in matrix), torch.float16)
    assert (told.shape, told.stride(), told.dtype) == (actual.shape, actual.stride(), actual.dtype)


def meta(value: Any) -> Any:
    if isinstance(value, list):
        return [meta(item) for item in value]
    return value.to("meta") if isinstance(value, Tensor) else value


@slowly
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 150),
    outs=st.integers(1, 40),
    bits=WIDTHS,
    symmetric=st.booleans(),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**16),
)
def test_floats_times_codes(
    rows: int, channels: int, outs: int, bits: int | list[int], symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    assume(symmetric or bits != 8)
    torch.manual_seed(seed)
    weight, x = weight_of((outs, channels), bits, symmetric), torch.randn(rows, channels).to(dtype)
    laid_out, scale = kernel_weight(weight, None), torch.rand(outs)
    args = (laid_out.packed, laid_out.widths, laid_out.order, laid_out.middle, None, laid_out.sums, scale, None, None)
    given = [on_device(value) for value in args]
    with using(SMALL._replace(parts=3)):  # which floats are not added in
        actual = cuda_ops.cuda_linear(x.to(DEVICE), None, None, *given, torch.float32).cpu()
    codes = shifted_codes(weight, None)[0].double()
    expected = (x.double() @ codes.T) * scale
    most = (x.double().abs() @ codes.abs().T) * scale
    assert bool(((actual.double() - expected).abs() <= 1e-5 * most + 1e-30).all())


def test_an_image_of_floats_times_codes() -> None:
    weight, x = weight_of((7, 40, 3, 3), [4, 2], symmetric=False), torch.randn(2, 40, 5, 6).to(torch.float16)
    laid_out = kernel_weight(weight, None)
    rest = (laid_out.middle, None, laid_out.sums, torch.ones(7), torch.arange(7.0), None)
    args = [on_device(value) for value in (laid_out.packed, laid_out.widths, laid_out.order, *rest)]
    geometry = ([3, 3], [2, 1], [1, 1], [1, 1])
    actual = cuda_ops.cuda_conv(x.to(DEVICE), None, None, *args, *geometry, torch.float32).cpu()
    codes = shifted_codes(weight, None)[0].double()
    expected = F.conv2d(x.double(), codes, torch.arange(7.0).double(), (2, 1), 1)
    assert float((actual.double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())


STEPS = {"shr": lambda a, b: a >> b, "and": lambda a, b: a & b, "or": lambda a, b: a | b}
STEPS |= {"sub": lambda a, b: (a - b) % 2**32, "xor": lambda a, b: a ^ b}


def executed(code: str, packed: int, middle: int) -> int:
    """The result of the few instructions that unpack four bytes at a time, read as they are written."""
    values = {"$1": packed, "$2": middle}
    body = code.strip("{} ").replace(".reg .b32 t;", "")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(" ", 1)
        to, left, right = (word.strip() for word in rest.split(","))
        step = STEPS[name.partition(".")[0]]
        values[to] = step(values[left], values[right] if right in values else int(right, 0))
    return values["$0"]


@given(st.sampled_from([2, 4]), st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4))
def test_machine_code_unpacks_as_the_interpreter_does(bits: int, packed: bytes, middles: bytes) -> None:
    from dmq_ao.backends.cuda import triton_kernels

    codes = [getattr(triton_kernels, f"_{bits}_{place}").value for place in range(8 // bits)]
    middle = bytes(byte % 2**bits for byte in middles)
    for place, code in enumerate(codes):
        expected = [
            ((byte >> (bits * place)) & (2**bits - 1)) - less for byte, less in zip(packed, middle, strict=True)
        ]
        word = executed(code, int.from_bytes(packed, "little"), int.from_bytes(middle, "little"))
        assert list(torch.frombuffer(bytearray(word.to_bytes(4, "little")), dtype=torch.int8)) == expected
