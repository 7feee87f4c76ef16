"""How alike the pixels of a feature map are to each other, compared with the teacher (MPQ-DM, arXiv 2412.11549).

Time-smoothed relation distillation: features are averaged over a window of denoising steps, every pixel is compared
with every other by the cosine of their channels, and each pixel's similarities, as a distribution over the others,
should be the teacher's. It says what goes with what, not how large anything is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from dmq_ao.config import Reduce

# A pixel shorter than this points nowhere.
MIN_LENGTH = 1e-12
# Of one map of similarities; a step of the work holds about six.
MAP_BYTES = 32 << 20


def smoothed(current: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """Mean of a window of features, one tensor a denoising step, all of one shape.

    Args:
        current: [B, ...] of the window's last step; gradients flow.
        earlier: of the steps before it; no gradient.
    """
    return torch.stack([current, *(one.detach() for one in earlier)]).mean(0)


def relation_error(
    student: Tensor,
    teacher: Tensor,
    *,
    ch_axis: int,
    temperature: float = 1.0,
    reduce: Reduce = Reduce.MEAN,
    chunk: int | None = None,
) -> Tensor:
    """``KL(softmax(S_teacher / temperature) || softmax(S_student / temperature))``, S the cosines between pixels.

    The maps are quadratic in the pixels: they are made a few rows at a time, and made again in the backward pass.

    Args:
        student: [B, C, ...], or [B, ..., C]; gradients flow.
        teacher: the same shape; no gradient.
        ch_axis: channel axis: 1 for maps, the last for tokens.
        temperature: of both distributions.
        reduce: mean over the rows of the map, one a pixel, or their sum, as published.
        chunk: rows at a time; None for as many as keep a map at 32 MiB. The result does not depend on it.

    Returns:
        [B], in the dtype of ``student``.

    Raises:
        ValueError: for shapes that differ, features without an axis of pixels, or a ``chunk`` below 1.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    if student.dim() < 3:
        raise ValueError(f"features need axes of samples, pixels and channels, got {tuple(student.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    student, teacher = _directions(student, ch_axis), _directions(teacher.detach(), ch_axis)
    pixels = student.shape[1]
    rows = chunk or max(1, MAP_BYTES // (student.element_size() * len(student) * pixels))
    parts = [
        checkpoint(_divergence, *some, student, teacher, temperature, use_reentrant=False, preserve_rng_state=False)
        for some in zip(student.split(rows, 1), teacher.split(rows, 1), strict=True)
    ]
    total = torch.stack(parts).sum(0)
    return total / pixels if reduce is Reduce.MEAN else total


def _directions(features: Tensor, ch_axis: int) -> Tensor:
    """Pixels as unit vectors [B, pixels, C]; zeros, without gradient, where a pixel is too short to point anywhere."""
    pixels = features.movedim(ch_axis, -1).flatten(1, -2)
    length = pixels.norm(dim=-1, keepdim=True)
    return torch.where(length > MIN_LENGTH, pixels / length.clamp_min(MIN_LENGTH), 0.0)


def _divergence(
    student: Tensor, teacher: Tensor, all_student: Tensor, all_teacher: Tensor, temperature: float
) -> Tensor:
    """Divergence [B], summed over some rows of the map: unit vectors [B, rows, C] against all of them."""
    ours = log_softmax(student @ all_student.mT / temperature, -1)
    theirs = log_softmax(teacher @ all_teacher.mT / temperature, -1)
    divergence: Tensor = (theirs.exp() * (theirs - ours)).sum((1, 2))
    return divergence
