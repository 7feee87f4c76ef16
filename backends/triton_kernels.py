"""The Triton kernels of the integer products (``triton_matmul`` calls them): one tile, one part of a sum, its end.

A kernel computes a tile of ``y^T = W x^T``: transposed, so that weights, which are unpacked in registers, are the
operand that tensor cores take from registers. Lower-case arguments are pointers and sizes; what is None has no code.
Upper-case ones are compiled in.

* x: int8 codes less 128; or floats, where FLOATS, which are multiplied by the codes in their own type.
* result: y, scale, zero_point, weight_scale, sums, bias, residual.
* size: rows, outs, rows per item, 1 where items have scales of their own, input height, input width, output width.
* GEOMETRY: kernel height and width, then of each both: stride, padding, dilation.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(first, size, TAPS: tl.constexpr, DILATION: tl.constexpr):
    """The taps [low, high) of a kernel that are inside an image, the first of them at ``first``."""
    low = tl.minimum((tl.maximum(-first, 0) + DILATION - 1) // DILATION, TAPS)
    high = tl.minimum((tl.maximum(size - first, 0) + DILATION - 1) // DILATION, TAPS)
    return low, tl.maximum(low, high)


@triton.jit
def _corner(row, size, GEOMETRY: tl.constexpr):
    """Where in the image the first tap of each output pixel is."""
    STRIDE_H: tl.constexpr = GEOMETRY[2]
    STRIDE_W: tl.constexpr = GEOMETRY[3]
    PADDING_H: tl.constexpr = GEOMETRY[4]
    PADDING_W: tl.constexpr = GEOMETRY[5]
    pixel = row % size[2]
    return pixel // size[6] * STRIDE_H - PADDING_H, pixel % size[6] * STRIDE_W - PADDING_W


@triton.jit
def _sums_inside(sums, row, out, inside, size, GEOMETRY: tl.constexpr):
    """Sums [outs, rows] of the weight's codes at the taps inside the image."""
    KERNEL_H: tl.constexpr = GEOMETRY[0]
    KERNEL_W: tl.constexpr = GEOMETRY[1]
    DILATION_H: tl.constexpr = GEOMETRY[6]
    DILATION_W: tl.constexpr = GEOMETRY[7]
    top, left = _corner(row, size, GEOMETRY)
    h0, h1 = _inside(top, size[4], KERNEL_H, DILATION_H)
    w0, w1 = _inside(left, size[5], KERNEL_W, DILATION_W)
    line: tl.constexpr = KERNEL_W + 1
    table = sums + out[:, None] * ((KERNEL_H + 1) * line)
    whole = tl.load(table + (h1 * line + w1)[None, :], mask=inside, other=0)
    whole -= tl.load(table + (h0 * line + w1)[None, :], mask=inside, other=0)
    whole -= tl.load(table + (h1 * line + w0)[None, :], mask=inside, other=0)
    whole += tl.load(table + (h0 * line + w0)[None, :], mask=inside, other=0)
    return whole


@triton.jit
def _write(acc, row, out, inside, result, size, GEOMETRY: tl.constexpr, CONVOLUTION: tl.constexpr):
    """Write sums ``acc`` [outs, rows] as real values."""
    y, scale, zero_point, weight_scale, sums, bias, residual = result
    factor = tl.load(weight_scale + out, mask=out < size[1], other=0.0)[:, None]
    if scale is not None:
        item = row // size[2] * size[3]
        shift = tl.load(zero_point + item, mask=row < size[0], other=128) - 128
        if CONVOLUTION:
            acc -= _sums_inside(sums, row, out, inside, size, GEOMETRY) * shift[None, :]
        else:
            acc -= tl.load(sums + out, mask=out < size[1], other=0)[:, None] * shift[None, :]
        factor = factor * tl.load(scale + item, mask=row < size[0], other=0.0)[None, :]
    value = acc.to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + out, mask=out < size[1], other=0.0).to(tl.float32)[:, None]
    place = row.to(tl.int64)[None, :] * size[1] + out[:, None]
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def matmul(
    x,
    packed,
    order,
    middle,
    shifts,
    partial,
    result,
    size,
    start,
    count,
    channels,
    row_bytes,
    GEOMETRY: tl.constexpr,
    CONVOLUTION: tl.constexpr,
    FLOATS: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    """One tile of the product with the outputs [start, start + count) of ``order``, or one part of its sum."""
    rows, height, width = size[0], size[4], size[5]
    KERNEL_W: tl.constexpr = GEOMETRY[1]
    TAPS: tl.constexpr = GEOMETRY[0] * GEOMETRY[1]
    DILATION_H: tl.constexpr = GEOMETRY[6]
    DILATION_W: tl.constexpr = GEOMETRY[7]
    EACH: tl.constexpr = 8 // BITS
    CODE: tl.constexpr = 2**BITS - 1
    program, across = tl.program_id(0), tl.cdiv(count, TILE_OUTS)
    band = program // (GROUP * across) * GROUP
    down = tl.minimum(tl.cdiv(rows, TILE_ROWS) - band, GROUP)
    row = (band + program % (GROUP * across) % down) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    index = program % (GROUP * across) // down * TILE_OUTS + tl.arange(0, TILE_OUTS)
    out = index
    if order is not None:
        out = tl.load(order + start + index, mask=index < count, other=0)
    if BITS < 8:
        centre = tl.load(middle + out, mask=index < count, other=0)
    if CONVOLUTION:
        top, left = _corner(row, size, GEOMETRY)
        image = (row // size[2]).to(tl.int64) * height
    SUM: tl.constexpr = tl.float32 if FLOATS else tl.int32
    acc = tl.zeros((TILE_OUTS, TILE_ROWS), dtype=SUM)
    per_tap = tl.cdiv(row_bytes, TILE_BYTES)
    share = tl.cdiv(TAPS * per_tap, PARTS)
    first = tl.program_id(1) * share
    for step in range(first, tl.minimum(first + share, TAPS * per_tap)):
        tap = step // per_tap
        byte = step % per_tap * TILE_BYTES + tl.arange(0, TILE_BYTES)
        place = index.to(tl.int64)[:, None] * (TAPS * row_bytes) + (tap * row_bytes + byte)[None, :]
        weight = tl.load(packed + place, mask=(index < count)[:, None] & (byte < row_bytes)[None, :], other=0)
        pixel, there = row.to(tl.int64), row < rows
        if CONVOLUTION:
            h, w = top + tap // KERNEL_W * DILATION_H, left + tap % KERNEL_W * DILATION_W
            pixel = (image + h) * width + w
            there = there & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        for i in tl.static_range(EACH):
            channel = byte // LANES * (EACH * LANES) + i * LANES + byte % LANES
            mask = (channel < channels)[:, None] & there[None, :]
            codes = tl.load(x + (pixel * channels)[None, :] + channel[:, None], mask=mask, other=0)
            part = weight
            if BITS < 8:
                part = ((weight >> (BITS * i)) & CODE).to(tl.int8) - centre[:, None]
            if shifts is not None:
                part = part << tl.load(shifts + channel, mask=channel < channels, other=0)[None, :]
            if FLOATS:
                part = part.to(x.dtype.element_ty)
            acc = tl.dot(part, codes, acc, out_dtype=SUM)
    inside = (index < count)[:, None] & (row < rows)[None, :]
    if PARTS == 1:
        _write(acc, row, out, inside, result, size, GEOMETRY, CONVOLUTION)
    else:
        tl.atomic_add(partial + row.to(tl.int64)[None, :] * size[1] + out[:, None], acc, mask=inside)


@triton.jit
def finish(partial, result, size, GEOMETRY: tl.constexpr, CONVOLUTION: tl.constexpr, TILE: tl.constexpr):
    """Write sums that were added up in parts."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    out = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (out < size[1])[:, None] & (row < size[0])[None, :]
    acc = tl.load(partial + row.to(tl.int64)[None, :] * size[1] + out[:, None], mask=inside, other=0)
    _write(acc, row, out, inside, result, size, GEOMETRY, CONVOLUTION)
