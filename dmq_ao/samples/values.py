"""Values of a denoiser's arguments: which may be recorded, their rows, and how messages name them."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Shared: TypeAlias = Tensor | int | float | bool | str | None
SHARED_TYPES = (Tensor, int, float, bool, str, type(None))


def is_mask(value: Tensor) -> bool:
    """Whether a tensor [...] may be what is added to attention's scores: nothing, or less, or minus infinity."""
    finite = value[value.isfinite()]
    return value.dim() > 1 and len(finite) > 0 and bool((finite <= 0).all())


def take(value: Tensor, rows: Tensor) -> Tensor:
    """The rows of ``value`` [N, ...] at ``rows`` [M]."""
    return value.index_select(0, rows.to(value.device))


def describe(value: object) -> str:
    """Shape and dtype of a tensor, anything else as it prints; for messages."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def layout(value: object, per_row: bool) -> str:
    """What must stay the same from call to call: dtype, shape without the batch, or the type of a plain value."""
    if per_row and isinstance(value, Tensor):
        return f"[{', '.join(['batch', *map(str, value.shape[1:])])}] {value.dtype}"
    return f"{describe(value) if isinstance(value, Tensor) else type(value).__name__} without batch axis"
