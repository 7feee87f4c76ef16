"""Relations between pixels: from the equation in float64, with a gradient in the student's current features alone."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import Reduce
from dmq_ao.objectives import relation_error, smoothed

fast = settings(max_examples=30, deadline=None, derandomize=True)
SHAPES = [((2, 3, 2, 4), 1), ((2, 5, 3), -1), ((2, 3, 5), 1), ((1, 4, 2, 2, 2), 1), ((2, 1, 6), 2)]


def pair(*shape: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def by_pixel(student: Tensor, teacher: Tensor, ch_axis: int, temperature: float) -> list[float]:
    """Sum of the rows' divergences of each sample, from the equation, number by number."""

    def rows(sample: Tensor) -> list[list[float]]:
        vectors = sample.movedim(ch_axis - 1 if ch_axis > 0 else ch_axis, -1).flatten(0, -2).tolist()
        norms = [max(math.sqrt(sum(x * x for x in v)), 1e-12) for v in vectors]
        units = [[x / norm for x in v] for v, norm in zip(vectors, norms, strict=True)]
        maps = [[math.exp(sum(map(math.prod, zip(a, b, strict=True))) / temperature) for b in units] for a in units]
        return [[x / sum(row) for x in row] for row in maps]

    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        pairs = zip(itertools.chain(*rows(theirs)), itertools.chain(*rows(ours)), strict=True)
        found.append(sum(p * math.log(p / q) for p, q in pairs))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize(("shape", "ch_axis"), SHAPES)
def test_the_divergence_in_float64(shape: tuple[int, ...], ch_axis: int, temperature: float) -> None:
    student, teacher = pair(*shape)
    given = {"ch_axis": ch_axis, "temperature": temperature}
    total = relation_error(student, teacher, reduce=Reduce.SUM, **given)
    assert total.shape == (shape[0],)
    assert total.tolist() == pytest.approx(by_pixel(student, teacher, ch_axis, temperature), rel=1e-9)
    mean = relation_error(student, teacher, **given)
    assert (mean * student[0].movedim(ch_axis - 1 if ch_axis > 0 else -1, 0)[0].numel()).tolist() == pytest.approx(
        total.tolist()
    )


def test_the_gradient_is_that_of_finite_differences_and_the_students_alone() -> None:
    student, teacher = (x.requires_grad_() for x in pair(2, 3, 2, 3))

    def error(x: Tensor) -> Tensor:
        return relation_error(x, teacher, ch_axis=1, temperature=0.5, chunk=4)

    assert torch.autograd.gradcheck(error, (student,))
    error(student)[1].backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert bool(student.grad[1].all())
    assert not bool(student.grad[0].any())


def test_the_current_step_alone_of_a_window_has_a_gradient() -> None:
    current, teacher = pair(2, 4, 3, 3)
    earlier, other = (x.requires_grad_() for x in pair(2, 4, 3, 3, seed=4))
    current.requires_grad_()
    relation_error(smoothed(current, [earlier]), smoothed(teacher, [other]), ch_axis=1).sum().backward()
    assert current.grad is not None
    assert bool(current.grad.all())
    assert earlier.grad is None
    assert other.grad is None
    # The current step is one of two: half of what reaches the mean reaches it.
    mean = smoothed(current, [earlier]).detach().requires_grad_()
    relation_error(mean, smoothed(teacher, [other]), ch_axis=1).sum().backward()
    torch.testing.assert_close(current.grad, mean.grad / 2)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_is_its_mean(window: int) -> None:
    features = torch.randn(window, 2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(smoothed(features[0], list(features[1:])), features.sum(0) / window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_features_give_zero(dtype: torch.dtype) -> None:
    features = torch.randn(2, 5, 4, 4, dtype=dtype)
    error = relation_error(features, features.clone(), ch_axis=1)
    assert error.dtype is dtype
    assert error.tolist() == [0.0, 0.0]


@fast
@given(seed=st.integers(0, 99), pixel=st.integers(0, 8), factor=st.floats(1e-3, 1e3), in_teacher=st.booleans())
def test_the_length_of_a_pixel_is_not_seen(seed: int, pixel: int, factor: float, in_teacher: bool) -> None:
    features = list(pair(1, 4, 3, 3, seed=seed))
    before = relation_error(*features, ch_axis=1)
    factors = torch.ones(9, dtype=torch.float64)
    factors[pixel] = factor
    features[in_teacher] = features[in_teacher] * factors.reshape(3, 3)
    torch.testing.assert_close(relation_error(*features, ch_axis=1), before, rtol=1e-10, atol=1e-14)


@fast
@given(seed=st.integers(0, 99), chunk=st.integers(1, 20), tokens=st.integers(1, 12))
def test_chunks_change_nothing(seed: int, chunk: int, tokens: int) -> None:
    student, teacher = pair(2, tokens, 3, seed=seed)
    grads, errors = [], []
    for rows in (None, chunk):
        x = student.clone().requires_grad_()
        error = relation_error(x, teacher, ch_axis=-1, chunk=rows)
        grads += torch.autograd.grad(error.sum(), x)
        errors.append(error.detach())
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


@fast
@given(seed=st.integers(0, 99), temperature=st.floats(0.05, 5))
def test_a_divergence_is_never_negative(seed: int, temperature: float) -> None:
    student, teacher = pair(3, 6, 4, seed=seed)
    assert bool((relation_error(student, teacher, ch_axis=-1, temperature=temperature) >= -1e-12).all())


def test_maps_and_tokens_are_the_same() -> None:
    student, teacher = pair(2, 3, 4, 5)
    tokens = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
    found = relation_error(*tokens, ch_axis=-1)
    torch.testing.assert_close(found, relation_error(student, teacher, ch_axis=1))


def test_pixels_of_zeros_are_finite() -> None:
    student, teacher = pair(1, 3, 4)
    student[0, :2] = 0
    student.requires_grad_()
    error = relation_error(student, teacher, ch_axis=-1)
    error.sum().backward()
    assert bool(torch.isfinite(error).all())
    assert student.grad is not None
    assert not bool(student.grad[0, :2].any())
    assert bool(student.grad[0, 2].any())


@pytest.mark.parametrize(
    ("student", "teacher", "chunk", "message"),
    [
        ((1, 2, 3), (1, 2, 4), None, r"student \(1, 2, 3\) and teacher \(1, 2, 4\) differ in shape"),
        ((2, 3), (2, 3), None, r"axes of samples, pixels and channels, got \(2, 3\)"),
        ((1, 2, 3), (1, 2, 3), 0, "chunk must be 1 or more, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], chunk: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relation_error(torch.zeros(student), torch.zeros(teacher), ch_axis=-1, chunk=chunk)


PEAK = """
import resource, torch
from dmq_ao.objectives import relation_error
student, teacher = torch.randn(2, 8, 192, 64, 64)
student.requires_grad_()
relation_error(student[:1, :, :8, :8], teacher[:1, :, :8, :8], ch_axis=1).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
relation_error(student, teacher, ch_axis=1).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_stays_below_a_gigabyte() -> None:
    """One map alone would be half a gigabyte, and there are six."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    assert int(out) * 1024 < 1 << 30
