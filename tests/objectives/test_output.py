"""Errors of outputs, element by element in float64: one number a sample, a gradient for the student alone."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dmq_ao.objectives import output_error, relative_error

SHAPES = [((3, 4), 1), ((3, 4), -1), ((3, 4, 5), 1), ((3, 5, 4), -1), ((3, 4, 2, 3), 1), ((2, 4, 2, 3, 2), 1)]


def by_channel(student: Tensor, teacher: Tensor, ch_axis: int) -> list[float]:
    found = []
    for one, other in zip(student.movedim(ch_axis, 1), teacher.movedim(ch_axis, 1), strict=True):
        places = list(itertools.product(*map(range, one.shape[1:])))
        total = 0.0
        for place in places:
            total += sum((float(one[(c, *place)]) - float(other[(c, *place)])) ** 2 for c in range(len(one)))
        found.append(total / len(places))
    return found


@pytest.mark.parametrize(("shape", "ch_axis"), SHAPES)
def test_a_sum_over_channels_and_a_mean_over_places(shape: tuple[int, ...], ch_axis: int) -> None:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    assert output_error(student, teacher, ch_axis).tolist() == pytest.approx(by_channel(student, teacher, ch_axis))


@pytest.mark.parametrize(("shape", "ch_axis"), SHAPES)
def test_relative_to_the_teacher_of_each_sample(shape: tuple[int, ...], ch_axis: int) -> None:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    for i, error in enumerate(relative_error(student, teacher).tolist()):
        noise = sum((a - b) ** 2 for a, b in zip(student[i].flatten(), teacher[i].flatten(), strict=True))
        assert error == pytest.approx(float(noise / sum(b**2 for b in teacher[i].flatten())) ** 0.5)
    assert relative_error(3 * student, 3 * teacher).tolist() == pytest.approx(
        relative_error(student, teacher).tolist()
    )


def test_a_teacher_of_zeros_is_finite() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    error = relative_error(student, torch.zeros(2, 3))
    error.sum().backward()
    assert bool(torch.isfinite(error).all())
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("objective", [lambda s, t: output_error(s, t, 1), relative_error], ids=["output", "relative"])
def test_the_gradient_is_the_students(objective: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = torch.randn(2, 3, 4, 5).requires_grad_().unbind()
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    error = objective(student, teacher)
    assert error.shape == (3,)
    error[1].backward()
    assert student.grad is not None
    assert bool(student.grad[1].all())
    assert not bool(student.grad[[0, 2]].any())
    assert teacher.grad is None


def test_shapes_that_differ() -> None:
    for objective in (lambda s, t: output_error(s, t, 1), relative_error):
        with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 1\) differ in shape"):
            objective(torch.zeros(2, 3), torch.zeros(2, 1))
