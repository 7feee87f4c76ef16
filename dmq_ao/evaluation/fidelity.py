"""Paired fidelity: what a quantized student answers, against its float teacher on the same inputs.

Every measure works in float64 and returns one number per sample; means come last. The expected tensor is
the teacher's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Any]
"""Called with keyword arguments; answers a Tensor, a tuple that begins with one, or an object with ``.sample``."""


def paired_error(actual: Tensor, expected: Tensor) -> Tensor:
    """``||actual - expected|| / ||expected||`` of each sample.

    Args:
        actual: ``[B, ...]``, the student's.
        expected: ``[B, ...]``, the teacher's, of the same shape and dtype.

    Returns:
        ``[B]`` float64, no unit. 0 where the two are equal, inf where only ``expected`` is zero.

    Raises:
        ValueError: the shapes differ, or there is no batch axis.
        TypeError: the dtypes differ, or are not floating point.
    """
    actual, expected = _as_rows(actual, expected)
    error = torch.linalg.vector_norm(actual - expected, dim=1)
    return torch.where(error == 0, error, error / torch.linalg.vector_norm(expected, dim=1))


def paired_sqnr(actual: Tensor, expected: Tensor) -> Tensor:
    """Signal to quantization noise ratio of each sample: the relative error in decibels, larger is better.

    Args:
        actual: ``[B, ...]``, the student's.
        expected: ``[B, ...]``, the teacher's, of the same shape and dtype.

    Returns:
        ``[B]`` float64, dB. inf where the two are equal, -inf where only ``expected`` is zero.

    Raises:
        ValueError: the shapes differ, or there is no batch axis.
        TypeError: the dtypes differ, or are not floating point.
    """
    return -20 * torch.log10(paired_error(actual, expected))


def psnr(actual: Tensor, expected: Tensor, data_range: float) -> Tensor:
    """Peak signal to noise ratio of each image: ``10 log10(data_range**2 / mean squared error)``.

    Args:
        actual: ``[B, ...]``, the student's.
        expected: ``[B, ...]``, the teacher's, of the same shape and dtype.
        data_range: largest possible value minus smallest: 1 for images in 0..1, 2 for -1..1.

    Returns:
        ``[B]`` float64, dB. inf where the two are equal.

    Raises:
        ValueError: the shapes differ, there is no batch axis, or ``data_range`` is not positive and finite.
        TypeError: the dtypes differ, or are not floating point.
    """
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"data_range: expected a positive finite number (largest value - smallest), got {data_range}")
    actual, expected = _as_rows(actual, expected)
    return 10 * torch.log10(data_range**2 / (actual - expected).square().mean(dim=1))


def image_fidelity(actual: Tensor, expected: Tensor, data_range: float) -> dict[str, float]:
    """How close the student's images are to the teacher's of the same seeds.

    Args:
        actual: ``[N, C, H, W]``, the student's.
        expected: ``[N, C, H, W]``, the teacher's, of the same shape and dtype.
        data_range: largest possible value minus smallest: 1 for images in 0..1, 2 for -1..1.

    Returns:
        ``psnr_db`` (mean over images), ``psnr_std_db`` (over images, not corrected), ``psnr_min_db``, ``psnr_max_db``,
        ``sqnr_db`` (mean), all in dB, and ``max_abs`` in units of the images. Equal images count as inf dB, so some
        of them make the mean inf and the deviation nan.

    Raises:
        ValueError: the shapes differ or are not ``[N, C, H, W]`` with N > 0, or ``data_range`` is not positive.
        TypeError: the dtypes differ, or are not floating point.
    """
    if actual.ndim != 4 or not len(actual):
        raise ValueError(f"actual: expected images [N, C, H, W] with N > 0, got {list(actual.shape)}")
    peaks = psnr(actual, expected, data_range)
    low, high = peaks.min().item(), peaks.max().item()
    return {
        "psnr_db": peaks.mean().item(),
        "psnr_std_db": 0.0 if low == high else peaks.std(correction=0).item(),
        "psnr_min_db": low,
        "psnr_max_db": high,
        "sqnr_db": paired_sqnr(actual, expected).mean().item(),
        "max_abs": (actual.double() - expected.double()).abs().max().item(),
    }


@dataclass(frozen=True)
class OneStep:
    """Relative error of single denoiser calls, by timestep: no error accumulates along the trajectory.

    Attributes:
        timesteps: values of the scheduler's list, in the order in which they were first met.
        errors: mean relative error over the samples of each timestep.
    """

    timesteps: list[float]
    errors: list[float]

    @property
    def mean(self) -> float:
        """Mean over timesteps: each counts once, however many samples it had."""
        return math.fsum(self.errors) / len(self.errors)

    def to_dict(self) -> dict[str, list[float]]:
        """The form that ``errors_by_timestep`` has in a report."""
        return {"timesteps": list(self.timesteps), "errors": list(self.errors)}


@torch.no_grad()
def one_step_error(
    teacher: Denoiser, student: Denoiser, batches: Iterable[tuple[float, Mapping[str, Any]]]
) -> OneStep:
    """Ask teacher and student the same questions and compare answer by answer.

    Args:
        teacher: the float denoiser.
        student: the quantized denoiser; its answers may have another floating dtype or device.
        batches: pairs of a timestep and the keyword arguments of one call. A timestep may come more than once.

    Returns:
        The mean relative error of each timestep.

    Raises:
        ValueError: there are no batches, an answer is not finite (the timestep is named), or the shapes differ.
        TypeError: an answer holds no tensor.
    """
    errors: dict[float, list[Tensor]] = {}
    for timestep, inputs in batches:
        expected = _finite_answer(teacher, "teacher", timestep, inputs)
        actual = _finite_answer(student, "student", timestep, inputs)
        errors.setdefault(float(timestep), []).append(paired_error(actual, expected))
    if not errors:
        raise ValueError("batches: expected at least one (timestep, keyword arguments) pair, got none")
    return OneStep(list(errors), [torch.cat(parts).mean().item() for parts in errors.values()])


def _finite_answer(denoiser: Denoiser, who: str, timestep: float, inputs: Mapping[str, Any]) -> Tensor:
    """The answer as float64 on the CPU, ``[B, ...]``."""
    answer = _tensor_of(denoiser(**inputs), who)
    bad = answer.numel() - int(torch.isfinite(answer).sum())
    if bad:
        raise ValueError(
            f"{who}: {bad} of {answer.numel()} values are NaN or infinite at timestep {timestep}; run the same input "
            f"with backend='reference' to tell a kernel's fault from a range that calibration never saw"
        )
    return answer.cpu().double()


def _tensor_of(answer: object, who: str) -> Tensor:
    first = answer[0] if isinstance(answer, tuple | list) and answer else getattr(answer, "sample", answer)
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{who}: expected a Tensor, a tuple that begins with one, or .sample, got {type(answer).__name__}"
        )
    return first


def _as_rows(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 ``[B, values]``, once they are known to be a pair."""
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual and expected must have the same shape, got {list(actual.shape)} and {list(expected.shape)}"
        )
    if not expected.ndim:
        raise ValueError("expected must have a batch axis, [B, ...], got a scalar")
    if not expected.is_floating_point():
        raise TypeError(f"expected must be floating point, got {expected.dtype}; divide integer images by their range")
    if actual.dtype != expected.dtype:
        raise TypeError(f"actual and expected must have the same dtype, got {actual.dtype} and {expected.dtype}")
    return actual.double().unsqueeze(-1).flatten(1), expected.double().unsqueeze(-1).flatten(1)
