"""What a product on a GPU is made of: the arguments that all its operators begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """What a product multiplies; the first arguments of every operator, in order. All on one device.

    Attributes:
        codes: [rows, channels] int8, codes less 128, or floats; of images, [items, height, width, channels].
        scale: [1] or [items] float32; rows belong to items in equal shares. None for floats.
        zero_point: the same in int32, of codes that are not less 128. None for floats.
        packed: as ``KernelWeight``, and so are widths, order, middle, shifts and sums.
        weight_scale: [out] float32.
        bias: [out], any float, or None.
        residual: [rows, out], any float, added at the end; or None.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    packed: Sequence[Tensor]
    widths: Sequence[int]
    order: Tensor | None
    middle: Tensor
    shifts: Tensor | None
    sums: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
