"""Where a call meets the graph: dtypes of the caller, rows that are not finite, batches of none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmq_ao.graph import Signature

Answer = TypeVar("Answer")


def on_tensors(answer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A graph's answer, a tensor [...] or a nest of them, with each tensor changed."""
    if isinstance(answer, Tensor):
        return change(answer)
    if isinstance(answer, dict):
        return {key: on_tensors(item, change) for key, item in answer.items()}
    if isinstance(answer, (tuple, list)):
        return type(answer)(on_tensors(item, change) for item in answer)
    return answer


def not_finite(signature: Signature, tensors: Sequence[Tensor]) -> Tensor:
    """Which rows [B] of a call hold NaN, which codes have no word for; in the sample and the timestep infinity too.

    An argument without a row for each sample counts for all rows. Infinity elsewhere is the way to write a mask.
    """
    by_name = dict(zip(signature.names, tensors, strict=True))
    sample = by_name[signature.batch]
    examples = {name: shape for name, (shape, _) in signature.example.items()}
    rows = torch.zeros(sample.shape[0], dtype=torch.bool, device=sample.device)
    for name, x in by_name.items():
        if not x.is_floating_point():
            continue
        shape = examples[name]
        per_row = len(shape) > 0 and shape[0] == examples[signature.batch][0] and x.shape[0] == sample.shape[0]
        # One pass and no copy: a sum is NaN where a term is, and infinite where a term is.
        total = x.sum(list(range(int(per_row), x.dim())), dtype=torch.float32) if x.dim() > int(per_row) else x
        rows = rows | (~total.isfinite() if name in (signature.batch, signature.timestep) else total.isnan())
    return rows


def with_nan(answer: Any, rows: Tensor) -> Any:
    """The answer with NaN in those rows; where an output has other rows, in all of it when there is any.

    Args:
        answer: of the graph.
        rows: [B] bool, from ``not_finite``.
    """

    def marked(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0:
            return x
        own = rows if x.shape[0] == rows.shape[0] else rows.any()
        return torch.where(own.reshape(-1, *[1] * (x.dim() - 1)), float("nan"), x)

    return on_tensors(answer, marked)


def stand_ins(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One row [1, ...] of zeros in place of no rows [0, ...], which no kernel takes and graphs have no shapes for."""
    return [x.new_zeros((1, *x.shape[1:])) if x.dim() and not x.shape[0] else x for x in tensors]


def no_rows(answer: Any) -> Any:
    """What is left of the answer to ``stand_ins``: its shape, without rows."""
    return on_tensors(answer, lambda x: x[:0] if x.dim() else x)
