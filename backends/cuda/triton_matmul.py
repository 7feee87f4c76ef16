"""Integer products in Triton: int8 codes times packed codes of 2, 4 or 8 bits, as linears and as convolutions.

``x`` are codes less 128, channels last. A convolution runs over taps and channels without unfolding (implicit GEMM);
pixels outside contribute the code 128, which is a zero here, and the zero point is taken off the taps inside alone:
with ``sums[t, o]`` of the codes of tap ``t``, ::

    y[m, o] = (acc[m, o] - (z_m - 128) * sum_t inside[m, t] * sums[t, o]) * scale_m * weight_scale_o + bias_o

Floats of 16 bits may stand for the codes: then only the weight is made of codes, and sums are of floats.
Needs a GPU, or Triton's interpreter: ``TRITON_INTERPRET=1``, set before anything imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dmq_ao.backends.cuda import tiles as cuda_tiles
from dmq_ao.backends.cuda import triton_kernels
from dmq_ao.backends.cuda.operands import Operands
from dmq_ao.backends.cuda.weights import LANES
from dmq_ao.graph.private import int_mm

_GROUP = 8  # tiles of rows that share a tile of weights while it is in the cache
_FINISHED = 64  # rows, and outputs, that a program of the second pass writes
# The interpreter knows no machine code.
INTERPRETED = not isinstance(triton_kernels.matmul, triton.JITFunction)
LINEAR_GEOMETRY = (1, 1, 1, 1, 0, 0, 1, 1)


def multiply(
    product: Operands,
    items: int,
    rows: int,
    geometry: Sequence[int] | None,
    out_width: int,
    dtype: torch.dtype,
    by_library: bool = False,
) -> Tensor:
    """Multiply, and return real values [rows, out].

    Args:
        product: the operands, all contiguous.
        items: of the batch.
        rows: of the result: tokens, or pixels.
        geometry: of a convolution, as the kernels take it; None for a linear.
        out_width: of the images that come out; any number for a linear.
        dtype: float, of the result.
        by_library: let PyTorch make the sums of a linear, for which ``library_takes`` its operands.
    """
    outs, device = len(product.weight_scale), product.codes.device
    height, width = product.codes.shape[1:3] if geometry is not None else (1, 1)
    each = int(product.scale is not None and len(product.scale) > 1)
    size = (rows, outs, max(1, rows // items), each, height, width, out_width)
    y = torch.empty(rows, outs, dtype=dtype, device=device)
    result = (y, product.scale, product.zero_point, product.weight_scale, product.sums, product.bias, product.residual)
    compiled: dict[str, Any] = {"GEOMETRY": tuple(geometry or LINEAR_GEOMETRY), "CONVOLUTION": geometry is not None}
    with torch.cuda.device_of(product.codes):  # Triton launches on the current device
        if geometry is None and by_library:
            partial: Tensor | None = int_mm(product.codes, product.packed[0][:, : product.codes.shape[-1]].T)
        else:
            partial = _kernel_sums(product, result, size, compiled)
        if partial is not None:
            grid = (triton.cdiv(rows, _FINISHED), triton.cdiv(outs, _FINISHED))
            triton_kernels.finish[grid](partial, result, size, **compiled, TILE=_FINISHED)
    return y


def library_takes(product: Operands) -> bool:
    """Whether PyTorch's own int8 product runs a linear: codes that take a byte, in sizes that it knows."""
    rows, channels, outs = *product.codes.shape, len(product.weight_scale)
    sizes = rows > 16 and channels % 8 == 0 and outs % 8 == 0
    return sizes and product.scale is not None and list(product.widths) == [8]


def _kernel_sums(
    product: Operands, result: tuple[Tensor | None, ...], size: tuple[int, ...], compiled: Mapping[str, Any]
) -> Tensor | None:
    """Sums that wait to be finished, where they are made in parts; else the result is written, and there are none."""
    tiles = _tiles(product, size[0], math.prod(compiled["GEOMETRY"][:2]))
    in_parts = tiles[0].parts > 1
    partial = torch.zeros(size[:2], dtype=torch.int32, device=product.codes.device) if in_parts else None
    start = 0
    for packed, bits, tile in zip(product.packed, product.widths, tiles, strict=True):
        _segment(product, packed, bits, tile, start, partial, result, size, compiled)
        start += packed.shape[0]
    return partial


def _tiles(product: Operands, rows: int, taps: int) -> list[cuda_tiles.Tile]:
    """A tile for each segment; either all sums are in parts, to be finished together, or none: floats never are.

    Parts are added in no fixed order, which whole numbers do not mind.
    """
    device = product.codes.device
    shapes = [
        cuda_tiles.Shape(rows, packed.shape[0], packed.shape[1] // taps, taps, bits)
        for packed, bits in zip(product.packed, product.widths, strict=True)
    ]
    tiles = [cuda_tiles.tile_for(shape, device) for shape in shapes]
    if product.scale is None:
        return [tile._replace(parts=1) for tile in tiles]
    least = 2 if any(tile.parts > 1 for tile in tiles) else 1
    return [tile._replace(parts=max(tile.parts, least)) for tile in tiles]


def _segment(
    product: Operands,
    packed: Tensor,
    bits: int,
    tile: cuda_tiles.Tile,
    start: int,
    partial: Tensor | None,
    result: tuple[Tensor | None, ...],
    size: tuple[int, ...],
    compiled: Mapping[str, Any],
) -> None:
    """The outputs of one width."""
    rows, count = size[0], packed.shape[0]
    taps = math.prod(compiled["GEOMETRY"][:2])
    middle, shifts = (product.middle, product.shifts) if bits < 8 else (None, None)
    triton_kernels.matmul[triton.cdiv(rows, tile.rows) * triton.cdiv(count, tile.outs), tile.parts](
        (product.codes, packed, product.order, middle, shifts, partial),
        result,
        size,
        (start, count, product.codes.shape[-1], packed.shape[1] // taps),
        **compiled,
        FLOATS=product.scale is None,
        BITS=bits,
        LANES=LANES,
        TILE=(tile.rows, tile.outs, tile.lanes, tile.parts, _GROUP),
        INTERPRETED=INTERPRETED,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
