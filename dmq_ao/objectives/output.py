"""How far an output is from its teacher's."""

from torch import Tensor


def output_error(student: Tensor, teacher: Tensor, ch_axis: int) -> Tensor:
    """Squared error of each sample: summed over channels, averaged over all other axes (DMQ, arXiv 2507.12933, eq. 6).

    Args:
        student: [B, ...], gradients flow.
        teacher: the same shape; no gradient.
        ch_axis: channel axis: 1 for convolutions, the last for token-major linears.

    Returns:
        [B], in the dtype of ``student``.

    Raises:
        ValueError: for shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    error: Tensor = (student - teacher.detach()).square().sum(ch_axis).reshape(len(student), -1).mean(1)
    return error


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``|student - teacher| / |teacher|`` of each sample, Euclidean norms over all other axes.

    Args:
        student: [B, ...], gradients flow.
        teacher: the same shape; no gradient.

    Returns:
        [B], in the dtype of ``student``.

    Raises:
        ValueError: for shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    teacher = teacher.detach().flatten(1)
    error: Tensor = (student.flatten(1) - teacher).norm(dim=1) / teacher.norm(dim=1).clamp_min(1e-12)
    return error
