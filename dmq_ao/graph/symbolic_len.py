"""``len(x)`` of a tensor during an export: its size, which stays a symbol, where Python's own makes it a number."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_len = builtins.len
_lock = threading.Lock()
_exports = 0  # under way, in all threads


def _length(x: Any, /) -> Any:
    """``x.shape[0]`` of a tensor [N, ...], else Python's ``len``."""
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else _len(x)


@contextmanager
def symbolic_len() -> Iterator[None]:
    """The block in which ``t.expand(len(x))`` does not fix the batch: ``len`` may return nothing but an ``int``.

    Of tensors that have values, which is all that other threads hold, the result is the same.
    """
    global _exports
    with _lock:
        _exports += 1
        builtins.len = _length
    try:
        yield
    finally:
        with _lock:
            _exports -= 1
            if not _exports:
                builtins.len = _len
