"""The Triton kernels of the integer products (``triton_matmul`` calls them): one tile, one part of a sum, its end.

A kernel computes a tile of ``y^T = W x^T``: transposed, so that weights, which are unpacked in registers, are the
operand that tensor cores take from registers. Lower-case arguments are pointers and sizes; what is None has no code.
Upper-case ones are compiled in.

* operands: x, packed, order, middle, shifts, partial.
* x: int8 codes less 128; or floats, where FLOATS, which are multiplied by the codes in their own type.
* partial: sums that wait to be finished, where PARTS share one.
* result: y, scale, zero_point, weight_scale, sums, bias, residual.
* size: rows, outs, rows per item, 1 where items have scales of their own, input height, input width, output width.
* segment: first output, outputs, input channels, bytes of a tap's codes.
* TILE: rows, outs, bytes of a row of codes; parts of a sum, tiles of rows that share a tile of weights.
* GEOMETRY: kernel height and width, then of each both: stride, padding, dilation.
"""

import triton
import triton.language as tl

# Four codes at a time, for the compiler takes bytes apart one by one: shift, mask, and take the middle off. A byte of
# 128 more than the code does not borrow from the next, and turning its top bit makes it signed.
_CODES = "{{ .reg .b32 t; shr.u32 t, $1, {shift}; and.b32 t, t, {mask}; or.b32 t, t, 0x80808080;"
_CODES += " sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }}"
_2_0, _2_1, _2_2, _2_3 = (tl.constexpr(_CODES.format(shift=2 * i, mask="0x03030303")) for i in range(4))
_4_0, _4_1 = (tl.constexpr(_CODES.format(shift=4 * i, mask="0x0f0f0f0f")) for i in range(2))


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
def _at(tap, top, left, size, GEOMETRY: tl.constexpr):
    """Where each output pixel's tap is, and whether that is inside the image."""
    KERNEL_W: tl.constexpr = GEOMETRY[1]
    DILATION_H: tl.constexpr = GEOMETRY[6]
    DILATION_W: tl.constexpr = GEOMETRY[7]
    h, w = top + tap // KERNEL_W * DILATION_H, left + tap % KERNEL_W * DILATION_W
    return h, w, (h >= 0) & (h < size[4]) & (w >= 0) & (w < size[5])


@triton.jit
def _write(acc, first, out, inside, result, size, GEOMETRY: tl.constexpr, CONVOLUTION: tl.constexpr):
    """Write sums ``acc`` [outs, rows], of rows from ``first`` on, as real values."""
    y, scale, zero_point, weight_scale, sums, bias, residual = result
    place = tl.arange(0, acc.shape[1])
    row = first + place
    factor = tl.load(weight_scale + out, mask=out < size[1], other=0.0)[:, None]
    if scale is not None:
        item = row // size[2] * size[3]
        shift = tl.load(zero_point + item, mask=row < size[0], other=128) - 128
        top, left = _corner(row, size, GEOMETRY)
        TAPS: tl.constexpr = GEOMETRY[0] * GEOMETRY[1]
        for tap in range(TAPS):
            off = shift
            if CONVOLUTION:
                h, w, there = _at(tap, top, left, size, GEOMETRY)
                off = tl.where(there, shift, 0)
            acc -= tl.load(sums + tap * size[1] + out, mask=out < size[1], other=0)[:, None] * off[None, :]
        factor = factor * tl.load(scale + item, mask=row < size[0], other=0.0)[None, :]
    value = acc.to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + out, mask=out < size[1], other=0.0).to(tl.float32)[:, None]
    # Whole tensors may need 64 bits to be counted through, a tile does not.
    start = tl.cast(first, tl.int64) * size[1]
    offset = place[None, :] * size[1] + out[:, None]
    if residual is not None:
        value += tl.load(residual + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _four_at_a_time(packed, middle, CODES: tl.constexpr):
    return tl.inline_asm_elementwise(CODES, "=r,r,r", [packed, middle], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _unpacked(packed, middle, PLACE: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The codes at one place of the bytes ``packed``, less ``middle``, as int8."""
    if INTERPRETED:  # which knows no machine code
        codes = ((packed >> (BITS * PLACE)) & (2**BITS - 1)).to(tl.int8) - middle
    elif BITS == 4:
        codes = _four_at_a_time(packed, middle, _4_0 if PLACE == 0 else _4_1)
    elif PLACE < 2:
        codes = _four_at_a_time(packed, middle, _2_0 if PLACE == 0 else _2_1)
    else:
        codes = _four_at_a_time(packed, middle, _2_2 if PLACE == 2 else _2_3)
    return codes


@triton.jit
def matmul(
    operands,
    result,
    size,
    segment,
    GEOMETRY: tl.constexpr,
    CONVOLUTION: tl.constexpr,
    FLOATS: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of the product with the outputs [start, start + count) of ``order``, or one part of its sum."""
    x, packed, order, middle, shifts, partial = operands
    start, count, channels, row_bytes = segment
    TILE_ROWS: tl.constexpr = TILE[0]
    TILE_OUTS: tl.constexpr = TILE[1]
    TILE_BYTES: tl.constexpr = TILE[2]
    PARTS: tl.constexpr = TILE[3]
    GROUP: tl.constexpr = TILE[4]
    rows = size[0]
    TAPS: tl.constexpr = GEOMETRY[0] * GEOMETRY[1]
    EACH: tl.constexpr = 8 // BITS
    program, across = tl.program_id(0), tl.cdiv(count, TILE_OUTS)
    band = program // (GROUP * across) * GROUP
    down = tl.minimum(tl.cdiv(rows, TILE_ROWS) - band, GROUP)
    top_row = (band + program % (GROUP * across) % down) * TILE_ROWS
    row = top_row + tl.arange(0, TILE_ROWS)
    index = program % (GROUP * across) // down * TILE_OUTS + tl.arange(0, TILE_OUTS)
    out = index
    if order is not None:
        out = tl.load(order + start + index, mask=index < count, other=0)
    if BITS < 8:
        centre = tl.load(middle + out, mask=index < count, other=0)[:, None]
        centre = tl.broadcast_to(centre, (TILE_OUTS, TILE_BYTES))
    if CONVOLUTION:
        top, left = _corner(row, size, GEOMETRY)
        image = (row // size[2]).to(tl.int64) * size[4]
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
            h, w, within = _at(tap, top, left, size, GEOMETRY)
            pixel, there = (image + h) * size[5] + w, there & within
        for i in tl.static_range(EACH):
            channel = byte // LANES * (EACH * LANES) + i * LANES + byte % LANES
            mask = (channel < channels)[:, None] & there[None, :]
            codes = tl.load(x + (pixel * channels)[None, :] + channel[:, None], mask=mask, other=0)
            part = weight
            if BITS < 8:
                part = _unpacked(weight, centre, i, BITS, INTERPRETED)
            if shifts is not None:
                part = part << tl.load(shifts + channel, mask=channel < channels, other=0)[None, :]
            if FLOATS:
                part = part.to(x.dtype.element_ty)
            acc = tl.dot(part, codes, acc, out_dtype=SUM)
    inside = (index < count)[:, None] & (row < rows)[None, :]
    if PARTS == 1:
        _write(acc, top_row, out, inside, result, size, GEOMETRY, CONVOLUTION)
    else:
        tl.atomic_add(partial + row.to(tl.int64)[None, :] * size[1] + out[:, None], acc, mask=inside)


@triton.jit
def finish(partial, result, size, GEOMETRY: tl.constexpr, CONVOLUTION: tl.constexpr, TILE: tl.constexpr):
    """Write sums that were added up in parts."""
    first = tl.program_id(0) * TILE
    row = first + tl.arange(0, TILE)
    out = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (out < size[1])[:, None] & (row < size[0])[None, :]
    acc = tl.load(partial + row.to(tl.int64)[None, :] * size[1] + out[:, None], mask=inside, other=0)
    _write(acc, first, out, inside, result, size, GEOMETRY, CONVOLUTION)
