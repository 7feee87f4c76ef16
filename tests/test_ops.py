"""The operators of a converted graph, element by element in plain Python."""

import itertools

import pytest
import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.numerics import ops

TIMESTEPS = torch.tensor([900.0, 500.0, 100.0])


def exact_example(ch_axis: int, per_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x``, scale, zero point and channel scale whose quotients are exact in float32, ties among them."""
    shape = (3, 4, 5, 2) if ch_axis == 1 else (3, 5, 4)
    x = torch.randint(-600, 600, shape) / 16
    scale, zero_point = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([3, 0, 15], dtype=torch.int32)
    channel_scale = torch.tensor([1.0, 0.125, 0.5, 0.25])
    return (x, scale, zero_point, channel_scale) if per_row else (x, scale[:1], zero_point[:1], channel_scale)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("ch_axis", [1, -1])
@pytest.mark.parametrize("with_channels", [True, False])
def test_quantize_and_dequantize_element_by_element(ch_axis: int, per_row: bool, with_channels: bool) -> None:
    x, scale, zero_point, channel_scale = exact_example(ch_axis, per_row)
    given = channel_scale if with_channels else None
    codes = ops.quantize(x, scale, zero_point, given, ch_axis, 0, 15)
    real = ops.dequantize(codes, scale, zero_point, given, ch_axis, torch.float32)
    assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
    for index in itertools.product(*map(range, x.shape)):
        row = index[0] if per_row else 0
        step = float(scale[row]) * (float(channel_scale[index[ch_axis]]) if with_channels else 1.0)
        code = min(max(round(float(x[index]) / step) + int(zero_point[row]), 0), 15)
        assert int(codes[index]) == code
        assert float(real[index]) == (code - int(zero_point[row])) * step


def test_dequantize_gives_the_dtype_asked_for() -> None:
    x, scale, zero_point, channel_scale = exact_example(1, per_row=True)
    codes = ops.quantize(x, scale, zero_point, channel_scale, 1, 0, 15)
    real = ops.dequantize(codes, scale, zero_point, channel_scale, 1, torch.bfloat16)
    assert real.dtype == torch.bfloat16
    expected = ops.dequantize(codes, scale, zero_point, channel_scale, 1, torch.float32)
    assert torch.equal(real, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("groups", [1, 3])
def test_dequantize_weight_element_by_element(groups: int, dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (4, 3, 2, 2)).to(dtype)
    scale, zero_point = torch.rand(4, groups), torch.randint(0, 16, (4, groups), dtype=torch.int32)
    real = ops.dequantize_weight(codes, scale, zero_point, torch.float32)
    for index in itertools.product(*map(range, codes.shape)):
        flat = (index[1] * 2 + index[2]) * 2 + index[3]
        group = (index[0], flat * groups // 12)
        expected = (int(codes[index]) - int(zero_point[group])) * float(scale[group])
        assert float(real[index]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("timestep", "nearest"),
    [(900, 900), (500, 500), (100, 100), (999, 900), (701, 900), (699, 500), (299, 100), (0, 100), (-50, 100)],
)
def test_row_is_the_nearest_timestep(timestep: int, nearest: int) -> None:
    assert TIMESTEPS[ops.row(torch.tensor([timestep]), TIMESTEPS)].tolist() == [nearest]


def test_row_takes_the_first_on_a_tie() -> None:
    assert ops.row(torch.tensor([700, 300]), TIMESTEPS).tolist() == [0, 1]


def test_row_looks_up_every_row_of_a_batch() -> None:
    assert ops.row(torch.tensor([120.5, 880.0, 500.0, 900.0]), TIMESTEPS).tolist() == [2, 0, 1, 0]
    assert ops.row(torch.tensor(480), TIMESTEPS).tolist() == [1]


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 5), (3, 2, 3, 4)])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_dynamic_qparams_are_those_of_each_row(shape: tuple[int, ...], bits: int) -> None:
    x = torch.randn(shape) * torch.tensor([0.1, 1.0, 9.0]).reshape(-1, *[1] * (len(shape) - 1))
    x[1] = x[1].abs() + 1  # one-sided: the range still holds zero
    scale, zero_point = ops.dynamic_qparams(x, bits)
    assert (scale.shape, zero_point.shape, zero_point.dtype) == ((3,), (3,), torch.int32)
    for row in range(3):
        alone = numerics.choose_qparams(x[row].min(), x[row].max(), bits, symmetric=False)
        assert (scale[row], zero_point[row]) == alone
    assert int(zero_point[1]) == 0


def test_compiled_codes_are_the_eager_codes() -> None:
    scale, zero_point = torch.rand(3) * 0.05, torch.tensor([100, 37, 0], dtype=torch.int32)
    channel_scale = torch.tensor([1.0, 0.125, 0.5, 0.25])

    def codes(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        rows = ops.row(timestep, TIMESTEPS)
        fixed = ops.quantize(x, scale[rows], zero_point[rows], channel_scale, 1, 0, 255)
        return fixed, ops.quantize(x, *ops.dynamic_qparams(x, 6), None, 1, 0, 63)

    x, timestep = torch.randn(5, 4, 33), torch.tensor([80, 900, 640, 500, 100])
    compiled = torch.compile(codes, fullgraph=True)(x, timestep)
    for actual, expected in zip(compiled, codes(x, timestep), strict=True):
        assert torch.equal(actual, expected)
