"""The largest sums of two products of a layer: what oneDNN adds in int16 where it has no VNNI."""

from __future__ import annotations

import torch
from torch import Tensor

INT16 = (-(2**15), 2**15 - 1)


def sums_of_two(weight: Tensor, largest: int) -> tuple[int, int]:
    """Bounds of ``a * v + b * w`` over two weights of one output, with a and b from 0 to ``largest``.

    Which codes are neighbours in a kernel is not asked: these are any two.

    Args:
        weight: [out, ...] int8 or int16 codes, shifts included.
        largest: code of the input.

    Returns:
        The smallest and the largest sum; both reached where the two extreme weights stand side by side.
    """
    rows = weight.flatten(1)
    count = min(2, rows.shape[1])
    low = -((-rows.to(torch.int16)).clamp_(min=0).topk(count, 1).values.sum(1).amax())
    high = rows.clamp(min=0).topk(count, 1).values.sum(1).amax()
    return int(low) * largest, int(high) * largest
