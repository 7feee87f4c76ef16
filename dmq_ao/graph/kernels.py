"""Operators that only graphs lowered to a backend hold, as passes and measurements see them: by what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmq_ao.graph.private import OpOverload


@dataclass(frozen=True)
class KernelOperator:
    """An operator of a backend.

    Attributes:
        target: the operator, as nodes hold it.
        writes_dtype: its last argument is the floating dtype that it writes, whatever it reads. Without, it is a
            product of floats that writes the dtype it reads.
        integer_macs: integer multiply-accumulates of a call, given its arguments with shapes instead of tensors and
            the keyword ``out_shape``; None where its products are of floats.
    """

    target: OpOverload
    writes_dtype: bool = False
    integer_macs: Callable[..., int] | None = None
