"""What a graph knows of its values without holding any: shape and dtype on the nodes of a converted graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

VAL = "val"


@dataclass(frozen=True)
class Value:
    """A tensor's shape, None where it depends on the inputs, and its dtype."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def to(self, dtype: torch.dtype) -> Value:
        """The same shape in another floating dtype; whole numbers stay what they are."""
        return replace(self, dtype=dtype) if self.dtype.is_floating_point else self


def value_of(val: Any) -> Any:
    """``Value`` of a tensor, a tuple of them for several, None for anything else.

    >>> value_of(torch.zeros(2, 3))
    Value(shape=(2, 3), dtype=torch.float32)
    """
    if isinstance(val, Tensor):
        return Value(tuple(size if isinstance(size, int) else None for size in val.shape), val.dtype)
    if isinstance(val, (tuple, list)):
        return tuple(value_of(item) for item in val)
    return val if isinstance(val, Value) else None


def replace_fake_tensors(gm: GraphModule, keep: Collection[str]) -> None:
    """Replace the fake tensors on a graph's nodes by ``Value``s, in place; of the other notes only ``keep`` stay.

    Export hangs its whole symbolic world on every node, which a converted graph has no use for.
    """
    for node in gm.graph.nodes:
        meta = {key: node.meta[key] for key in keep if key in node.meta}
        if VAL in node.meta:
            meta[VAL] = value_of(node.meta[VAL])
        node.meta = meta
