"""The fine-grained error of a block: one number a sample, by the equation, with a gradient in the student alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmq_ao.objectives import Compared, fine_grained_error


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes for _ in range(2)]


def distance(student: Tensor, teacher: Tensor, ch_axis: int) -> list[float]:
    """From the equation, element by element."""
    found = []
    for a, b in zip(student, teacher, strict=True):
        channels = a.movedim(ch_axis - 1 if ch_axis > 0 else ch_axis, 0).flatten(1)
        others = b.movedim(ch_axis - 1 if ch_axis > 0 else ch_axis, 0).flatten(1)
        positions = range(channels.shape[1])
        sums = [sum(float(p - q) ** 2 for p, q in zip(channels[:, i], others[:, i], strict=True)) for i in positions]
        found.append(sum(sums) / len(sums))
    return found


def test_the_error_in_float64() -> None:
    y, y_hat, z, z_hat = tensors((3, 4, 2, 2), (3, 5, 6))
    found = fine_grained_error([Compared(y, y_hat, 1)], [Compared(z, z_hat, -1)], 0.8)
    pairs = zip(distance(y, y_hat, 1), distance(z, z_hat, -1), strict=True)
    assert found.tolist() == pytest.approx([block + 0.8 * layer for block, layer in pairs])
    assert found.shape == (3,)


def test_tokens_are_averaged_and_channels_summed() -> None:
    student, teacher = torch.ones(1, 10, 3), torch.zeros(1, 10, 3)
    assert fine_grained_error([Compared(student, teacher, 2)], [], 1.0).tolist() == [3.0]
    assert fine_grained_error([Compared(student, teacher, 1)], [], 1.0).tolist() == [10.0]


@pytest.mark.parametrize("layer_weight", [0.0, 0.8])
def test_no_weight_or_no_layers_is_plain_block_reconstruction(layer_weight: float) -> None:
    y, y_hat, z, z_hat = tensors((3, 4, 2), (3, 5, 6))
    inner = [Compared(z, z_hat, -1)] if layer_weight == 0 else []
    found = fine_grained_error([Compared(y, y_hat, 1)], inner, layer_weight)
    assert found.tolist() == pytest.approx(distance(y, y_hat, 1))


def test_the_gradient_is_that_of_finite_differences_and_the_students_alone() -> None:
    y, y_hat, z, z_hat = (t.requires_grad_() for t in tensors((2, 3, 2, 2), (2, 3, 4)))

    def error(student: Tensor, inner: Tensor) -> Tensor:
        return fine_grained_error([Compared(student, y_hat, 1)], [Compared(inner, z_hat, -1)], 0.7)

    assert torch.autograd.gradcheck(error, (y, z))
    error(y, z).sum().backward()
    assert y_hat.grad is None
    assert z_hat.grad is None
    assert z.grad is not None
    assert bool(z.grad.any())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a block needs an output to compare"):
        fine_grained_error([], [], 1.0)
    with pytest.raises(ValueError, match="differ in shape"):
        fine_grained_error([Compared(torch.zeros(1, 2), torch.zeros(1, 3), 1)], [], 1.0)
