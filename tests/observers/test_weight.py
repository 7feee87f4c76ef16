"""A weight as integers, element by element in float64, for every granularity and kind of code."""

import pytest
import torch
from torch import Tensor

from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.observers import ALL_OBSERVERS, MSE, MinMax, RangeEstimator, WeightObserver, quantize_weight
from dmq_ao.records import WeightRecord

LAYER = "down_blocks.0.resnets.1.conv1"
GROUPS = {Granularity.PER_TENSOR: None, Granularity.PER_CHANNEL: None, Granularity.PER_GROUP: 6}
EVERY = pytest.mark.parametrize("granularity", list(Granularity))


def config(granularity: Granularity, bits: int = 4, symmetric: bool = False) -> TensorConfig:
    return TensorConfig(bits=bits, granularity=granularity, group_size=GROUPS[granularity], symmetric=symmetric)


def conv_weight() -> Tensor:
    """[5, 4, 3], rows of very different sizes, one of one sign, one of zeros."""
    weight = torch.randn(5, 4, 3) * torch.tensor([1e-2, 1.0, 30.0, 1.0, 0.0])[:, None, None]
    weight[3] = weight[3].abs() + 0.5
    return weight


def observer(granularity: Granularity, estimator: type[RangeEstimator] = MinMax) -> WeightObserver:
    return WeightObserver(LAYER, config(granularity), estimator)


@EVERY
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (2, True), (4, False), (4, True), (8, False), (8, True)])
def test_codes_element_by_element(granularity: Granularity, bits: int, symmetric: bool) -> None:
    weight = conv_weight()
    record = quantize_weight(weight, config(granularity, bits, symmetric), MinMax)
    size = {Granularity.PER_TENSOR: 60, Granularity.PER_CHANNEL: 12, Granularity.PER_GROUP: 6}[granularity]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    groups = max(12 // size, 1)
    assert record.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert record.codes.shape == weight.shape
    assert record.scale.shape == record.zero_point.shape == (5, groups)
    assert (record.scale.dtype, record.zero_point.dtype) == (torch.float32, torch.int32)
    assert (record.bits, record.symmetric) == (bits, symmetric)
    flat, codes, real = weight.flatten().tolist(), record.codes.flatten().tolist(), record.dequantize().flatten()
    for start in range(0, 60, size):
        values = flat[start : start + size]
        smallest, largest = min(*values, 0.0), max(*values, 0.0)
        scale = max(max(-smallest, largest) / high if symmetric else (largest - smallest) / high, 2.0**-23)
        for index in range(start, start + size):
            o = index // 12
            group = index % 12 // size if granularity is Granularity.PER_GROUP else 0
            zero_point = int(record.zero_point[o, group])
            assert float(record.scale[o, group]) == pytest.approx(scale, rel=1e-6)
            assert low <= zero_point <= high
            assert zero_point == 0 if symmetric else abs(zero_point + smallest / scale) <= 0.5 + 1e-4
            exact = min(max(flat[index] / scale + zero_point, low), high)
            assert abs(codes[index] - exact) <= 0.5 + 1e-4
            assert float(real[index]) == pytest.approx((codes[index] - zero_point) * scale, rel=1e-6)
            assert abs(float(real[index]) - flat[index]) <= scale * (0.5 + 1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_bit_is_a_sign(symmetric: bool) -> None:
    weight = torch.randn(6, 64)
    record = quantize_weight(weight, config(Granularity.PER_CHANNEL, 1, symmetric), MSE)
    assert len(record.codes.unique()) == 2
    best = weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(record.dequantize(), torch.where(weight < 0, -best, best))
    for scale in (0.9, 1.1):  # the least-squares scale
        worse = (weight - scale * record.dequantize()).square().sum(1)
        assert bool((worse > (weight - record.dequantize()).square().sum(1)).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_GROUP])
def test_every_channel_has_its_own_width(granularity: Granularity, symmetric: bool) -> None:
    weight, widths = conv_weight(), torch.tensor([3, 1, 4, 2, 3], dtype=torch.uint8)
    mixed = quantize_weight(weight, config(granularity, 4, symmetric), MSE, widths)
    assert (mixed.bits, mixed.mean_bits) == (4, 13 / 5)
    assert mixed.segments == [(1, 1), (2, 1), (3, 2), (4, 1)]
    for channel, bits in enumerate(widths.tolist()):
        alone = quantize_weight(weight[channel : channel + 1], config(granularity, bits, symmetric), MSE)
        for field in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(mixed, field)[channel], getattr(alone, field)[0])


def test_channels_of_different_widths_cannot_share_a_scale() -> None:
    with pytest.raises(ValueError, match="cannot share one scale"):
        quantize_weight(conv_weight(), config(Granularity.PER_TENSOR), MinMax, torch.full((5,), 2))


def test_per_tensor_is_one_scale_for_all() -> None:
    record = quantize_weight(conv_weight(), config(Granularity.PER_TENSOR), MinMax)
    assert len(record.scale.unique()) == len(record.zero_point.unique()) == 1


@pytest.mark.parametrize("shape", [(6, 12), (6, 4, 3), (6, 3, 2, 2), (6, 3, 1, 2, 2)])
def test_layers_of_every_rank(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    record = quantize_weight(weight, config(Granularity.PER_CHANNEL, bits=8), MinMax)
    assert record.dequantize().shape == shape
    assert torch.allclose(record.dequantize(), weight, atol=float(record.scale.max()))
    flat = quantize_weight(weight.reshape(6, 12), config(Granularity.PER_CHANNEL, bits=8), MinMax)
    assert torch.equal(record.codes.reshape(6, 12), flat.codes)


@pytest.mark.parametrize("name", ALL_OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_points_are_codes_for_every_estimator(name: str, symmetric: bool) -> None:
    weight = conv_weight()
    record = quantize_weight(weight, config(Granularity.PER_CHANNEL, 4, symmetric), ALL_OBSERVERS[name])
    assert bool(((record.zero_point >= 0) & (record.zero_point <= 15)).all())
    assert bool((record.dequantize()[4] == 0).all())


def test_the_search_lowers_the_error_of_heavy_tails() -> None:
    weight = torch.randn(8, 200)
    weight[:, 0] = 15.0

    def error(estimator: type[RangeEstimator]) -> float:
        record = quantize_weight(weight, config(Granularity.PER_CHANNEL), estimator)
        return float((record.dequantize() - weight).abs().pow(2.4).sum())

    assert error(MSE) < 0.95 * error(MinMax)


@EVERY
def test_the_weight_is_not_changed(granularity: Granularity) -> None:
    weight = conv_weight()
    before = weight.clone()
    observed = observer(granularity, MSE)
    assert observed(weight) is weight
    observed.record(weight)
    assert torch.equal(weight, before)


def test_a_group_size_that_does_not_divide_names_the_layer() -> None:
    with pytest.raises(ValueError, match=f"{LAYER}: group_size 6 does not divide the 10 inputs of an output channel"):
        observer(Granularity.PER_GROUP).record(torch.randn(3, 10))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_the_layer(value: float) -> None:
    weight = conv_weight()
    weight[1, 2, 0] = value
    with pytest.raises(ValueError, match=f"{LAYER}: its weight holds NaN or infinity; check the float checkpoint"):
        observer(Granularity.PER_CHANNEL).record(weight)


def test_a_restored_record_is_kept_until_the_next_start() -> None:
    observed, other = observer(Granularity.PER_CHANNEL), torch.randn(5, 4, 3)
    restored: WeightRecord = observed.record(conv_weight())
    observed.restore(restored)
    assert observed.record(other) is restored
    scale, zero_point = observed.calculate_qparams()
    assert scale is restored.scale
    assert zero_point is restored.zero_point
    observed.start()
    assert not torch.equal(observed.record(other).codes, restored.codes)
