"""Paired measures against values worked out by hand, and against numpy in float64."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dmq_ao.evaluation import OneStep, image_fidelity, one_step_error, paired_error, paired_sqnr, psnr

VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))
PAIRS = st.tuples(arrays(np.float64, (2, 6), elements=VALUES), arrays(np.float64, (2, 6), elements=VALUES))


def random_pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(shape, generator=generator)
    return expected + 0.1 * torch.randn(shape, generator=generator), expected


def test_relative_error_of_known_vectors() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    actual = torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    assert paired_error(actual, expected).tolist() == [0.2, 0.0]


def test_relative_error_where_the_teacher_is_zero() -> None:
    errors = paired_error(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))
    assert errors.tolist() == [math.inf, 0.0]


def test_psnr_of_a_known_error() -> None:
    expected = torch.zeros(2, 1, 2, 2)
    actual = torch.stack([torch.full((1, 2, 2), 0.125), torch.zeros(1, 2, 2)])
    first, second = psnr(actual, expected, data_range=1.0).tolist()
    assert first == pytest.approx(20 * math.log10(8))
    assert second == math.inf


def test_psnr_grows_by_six_decibels_with_twice_the_range() -> None:
    actual, expected = random_pair(3, 2, 4, 4)
    gain = psnr(actual, expected, 2.0) - psnr(actual, expected, 1.0)
    torch.testing.assert_close(gain, torch.full_like(gain, 20 * math.log10(2)))


def test_sqnr_of_known_powers() -> None:
    expected = torch.tensor([[10.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    actual = torch.tensor([[10.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert paired_sqnr(actual, expected).tolist() == [pytest.approx(20.0), math.inf, -math.inf]


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5, 2)])
def test_measures_equal_numpy(shape: tuple[int, ...]) -> None:
    actual, expected = random_pair(*shape)
    a, e = (np.asarray(x, dtype=np.float64).reshape(4, -1) for x in (actual, expected))
    noise, signal = ((a - e) ** 2).sum(1), (e**2).sum(1)
    np.testing.assert_allclose(paired_error(actual, expected), np.sqrt(noise / signal), rtol=1e-12)
    np.testing.assert_allclose(paired_sqnr(actual, expected), 10 * np.log10(signal / noise), rtol=1e-12)
    np.testing.assert_allclose(psnr(actual, expected, 1.5), 10 * np.log10(2.25 / (noise / a.shape[1])), rtol=1e-12)


@given(PAIRS)
def test_psnr_is_symmetric(pair: tuple[np.ndarray, np.ndarray]) -> None:
    one, other = map(torch.from_numpy, pair)
    assert torch.equal(psnr(one, other, 3.0), psnr(other, one, 3.0))


@given(PAIRS, st.sampled_from([-4.0, 0.25, 3.0, 1000.0]))
def test_relative_error_does_not_change_with_scale(pair: tuple[np.ndarray, np.ndarray], factor: float) -> None:
    actual, expected = map(torch.from_numpy, pair)
    torch.testing.assert_close(paired_error(factor * actual, factor * expected), paired_error(actual, expected))


@given(PAIRS, st.permutations(range(6)))
def test_measures_do_not_see_the_order_of_values(pair: tuple[np.ndarray, np.ndarray], order: list[int]) -> None:
    actual, expected = map(torch.from_numpy, pair)
    torch.testing.assert_close(paired_sqnr(actual[:, order], expected[:, order]), paired_sqnr(actual, expected))


def test_half_precision_is_measured_in_double() -> None:
    expected = torch.full((1, 100_000), 60_000.0, dtype=torch.float16)
    assert paired_error(expected * 0.5, expected).item() == 0.5


@pytest.mark.parametrize("measure", [paired_error, paired_sqnr, lambda a, e: psnr(a, e, 1.0)])
def test_a_pair_must_match(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must have the same shape, got \[3, 2\] and \[2, 3\]"):
        measure(torch.rand(3, 2), torch.rand(2, 3))
    with pytest.raises(ValueError, match="must have a batch axis"):
        measure(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"must have the same dtype, got torch.float64 and torch.float32"):
        measure(torch.rand(2, 3).double(), torch.rand(2, 3))
    with pytest.raises(TypeError, match="expected must be floating point, got torch.uint8; divide integer images"):
        measure(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.inf, math.nan])
def test_psnr_wants_a_range(data_range: float) -> None:
    with pytest.raises(ValueError, match=rf"data_range: expected a positive finite number .*, got {data_range}"):
        psnr(torch.rand(1, 2), torch.rand(1, 2), data_range)


def test_image_fidelity_of_known_images() -> None:
    expected = torch.full((2, 1, 2, 2), 0.5)
    actual = expected + torch.tensor([0.1, 0.01]).double().view(2, 1, 1, 1)
    figures = image_fidelity(actual, expected.double(), data_range=1.0)
    assert figures == pytest.approx(
        {
            "psnr_db": 30.0,
            "psnr_std_db": 10.0,
            "psnr_min_db": 20.0,
            "psnr_max_db": 40.0,
            "sqnr_db": 30.0 + 20 * math.log10(0.5),
            "max_abs": 0.1,
        }
    )


def test_image_fidelity_of_equal_images() -> None:
    _, images = random_pair(3, 1, 4, 4)
    figures = image_fidelity(images, images, 1.0)
    assert (figures["psnr_db"], figures["psnr_std_db"], figures["max_abs"]) == (math.inf, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(3, 4, 4), (0, 3, 4, 4)])
def test_image_fidelity_wants_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"actual: expected images \[N, C, H, W\] with N > 0, got \["):
        image_fidelity(torch.zeros(shape), torch.zeros(shape), 1.0)


def teacher(sample: Tensor, timestep: Tensor) -> Tensor:
    return sample + 1


def off_by(share: float) -> Callable[..., Tensor]:
    return lambda sample, timestep: teacher(sample, timestep) * (1 + share * timestep.item())


def batches(*timesteps: float, size: int = 2) -> list[tuple[float, dict[str, Tensor]]]:
    return [(t, {"sample": torch.full((size, 1, 2, 2), t), "timestep": torch.tensor(t)}) for t in timesteps]


def test_one_step_error_by_timestep() -> None:
    result = one_step_error(teacher, off_by(0.125), batches(4.0, 2.0, 1.0))
    assert result.timesteps == [4.0, 2.0, 1.0]
    assert result.errors == pytest.approx([0.5, 0.25, 0.125])
    assert result.mean == pytest.approx(0.875 / 3)
    assert result.to_dict() == {"timesteps": result.timesteps, "errors": result.errors}


def test_one_step_error_is_a_mean_over_samples_of_a_timestep_then_over_timesteps() -> None:
    factors = iter([1.5, 1.0, 1.25])  # timestep 1: 3 samples with error 0.5, 1 with 0; timestep 2: 1 with 0.25
    uneven = batches(1.0, size=3) + batches(1.0, size=1) + batches(2.0, size=1)
    result = one_step_error(teacher, lambda sample, timestep: (sample + 1) * next(factors), uneven)
    assert result == OneStep([1.0, 2.0], [pytest.approx(0.375), pytest.approx(0.25)])
    assert result.mean == pytest.approx(0.3125)


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x, None], lambda x: SimpleNamespace(sample=x)])
def test_one_step_error_reads_what_denoisers_return(wrap: Callable[[Tensor], object]) -> None:
    result = one_step_error(teacher, lambda **inputs: wrap(teacher(**inputs)), batches(1.0))
    assert result.errors == [0.0]


def test_one_step_error_compares_a_half_precision_student() -> None:
    result = one_step_error(teacher, lambda **inputs: teacher(**inputs).bfloat16(), batches(1.0))
    assert result.errors == [0.0]


def test_one_step_error_keeps_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    seen: list[Tensor] = []

    def student(sample: Tensor, timestep: Tensor) -> Tensor:
        seen.append(sample * weight + 1)
        return seen[-1]

    one_step_error(teacher, student, batches(1.0))
    assert not seen[0].requires_grad


def test_one_step_error_names_the_timestep_of_a_nan() -> None:
    def student(sample: Tensor, timestep: Tensor) -> Tensor:
        answer = teacher(sample, timestep).clone()
        answer[0, 0, 0, 0] = math.nan if timestep.item() == 981.0 else 1.0
        return answer

    with pytest.raises(ValueError, match=r"student: 1 of 8 values are NaN or infinite at timestep 981.0; .*reference"):
        one_step_error(teacher, student, batches(1.0, 981.0))


def test_one_step_error_wants_batches_and_tensors() -> None:
    with pytest.raises(ValueError, match=r"batches: expected at least one \(timestep, keyword arguments\) pair"):
        one_step_error(teacher, teacher, [])
    with pytest.raises(TypeError, match="student: expected a Tensor, .*, got dict"):
        one_step_error(teacher, lambda **inputs: {"out": 1}, batches(1.0))
    with pytest.raises(ValueError, match=r"must have the same shape, got \[1, 1, 2, 2\] and \[2, 1, 2, 2\]"):
        one_step_error(teacher, lambda sample, timestep: sample[:1], batches(1.0))
