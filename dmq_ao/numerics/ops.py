"""The quantize and dequantize operators that stand in a converted graph: its meaning, whatever the backend.

They are compositions of plain torch operators, so any backend, compiler or exporter understands them, and nodes of
their own, so that a backend recognises a layer. Importing this module registers ``torch.ops.dmq_ao.*``.

Canonical form (design, section 4), for row r and channel c of an activation::

    q = clamp(round(x / (scale_r * channel_scale_c)) + zero_point_r, quant_min, quant_max)

``scale`` and ``zero_point`` have one entry, or one per row of axis 0; ``channel_scale`` is None, [C] along
``ch_axis``, or [B, C] with a factor for each row. Codes in float8 are ``x`` over the step, and have no zero point.
"""

import torch
from torch import Tensor

from dmq_ao import numerics

_operators = torch.library.Library("dmq_ao", "DEF")


def channel_steps(x: Tensor, scale: Tensor, channel_scale: Tensor | None, ch_axis: int) -> Tensor:
    """Steps of the codes of ``x`` [B, ...], to broadcast: ``scale`` [1] or [B], times those of ``channel_factor``."""
    step = numerics.along(scale, 0, x.dim())
    return step if channel_scale is None else step * channel_factor(channel_scale, ch_axis, x.dim())


def channel_factor(channel_scale: Tensor, ch_axis: int, ndim: int) -> Tensor:
    """Factors [C], or [B, C] with axis 0, shaped to broadcast along ``ch_axis`` of a tensor with ``ndim`` axes."""
    if channel_scale.dim() == 1:
        return numerics.along(channel_scale, ch_axis, ndim)
    shape = [1] * ndim
    shape[0], shape[ch_axis] = channel_scale.shape
    return channel_scale.reshape(shape)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    ch_axis: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    zero_point = numerics.along(zero_point, 0, x.dim())
    codes = numerics.quantize_affine(
        x, channel_steps(x, scale, channel_scale, ch_axis), zero_point, quant_min, quant_max
    )
    return codes.to(torch.uint8 if quant_max <= 255 else torch.int16)


def _quantize_float8(x: Tensor, scale: Tensor, channel_scale: Tensor | None, ch_axis: int) -> Tensor:
    return numerics.to_float8(x, channel_steps(x, scale, channel_scale, ch_axis))


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, channel_scale: Tensor | None, ch_axis: int, dtype: torch.dtype
) -> Tensor:
    zero_point = numerics.along(zero_point, 0, codes.dim())
    return numerics.dequantize_affine(codes, channel_steps(codes, scale, channel_scale, ch_axis), zero_point).to(dtype)


def _dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    groups = scale.shape[1]
    rows = codes.reshape(codes.shape[0], groups, -1)
    return (
        numerics.dequantize_affine(rows, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).reshape(codes.shape).to(dtype)
    )


def _look_up(codes: Tensor, scale: Tensor, zero_point: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    rows = (torch.nn.functional.embedding(indices, table) for table in (codes, scale, zero_point))
    return numerics.dequantize_affine(*rows).to(dtype)


def _row(timestep: Tensor, timesteps: Tensor) -> Tensor:
    return (timestep.reshape(-1, 1).to(timesteps.dtype) - timesteps).abs().argmin(-1)


def _dynamic_qparams(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows = x if x.dim() > 1 else x[None]
    low, high = torch.aminmax(rows.flatten(1), dim=1)
    return numerics.choose_qparams(low, high, bits, symmetric=False)


def _register(schema: str, function: object) -> None:
    _operators.define(schema)
    _operators.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")


_register(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor? channel_scale, int ch_axis,"
    " int quant_min, int quant_max) -> Tensor",
    _quantize,
)
_register("quantize_float8(Tensor x, Tensor scale, Tensor? channel_scale, int ch_axis) -> Tensor", _quantize_float8)
_register(
    "dequantize(Tensor codes, Tensor scale, Tensor zero_point, Tensor? channel_scale, int ch_axis,"
    " ScalarType dtype) -> Tensor",
    _dequantize,
)
_register(
    "dequantize_weight(Tensor codes, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor", _dequantize_weight
)
_register(
    "look_up(Tensor codes, Tensor scale, Tensor zero_point, Tensor indices, ScalarType dtype) -> Tensor", _look_up
)
_register("row(Tensor timestep, Tensor timesteps) -> Tensor", _row)
_register("dynamic_qparams(Tensor x, int bits) -> (Tensor, Tensor)", _dynamic_qparams)

quantize = torch.ops.dmq_ao.quantize.default
"""Codes of ``x`` [B, ...], uint8, or int16 where ``quant_max`` needs it; see the module docstring."""
quantize_float8 = torch.ops.dmq_ao.quantize_float8.default
"""Codes of ``x`` [B, ...] as float8_e4m3fn; ``dequantize`` takes them, with zero points of zero."""
dequantize = torch.ops.dmq_ao.dequantize.default
"""Real values of activation codes [B, ...], in ``dtype``."""
dequantize_weight = torch.ops.dmq_ao.dequantize_weight.default
"""Real values of weight codes [O, ...]; ``scale`` and ``zero_point`` are [O, groups] over the flattened rest."""
look_up = torch.ops.dmq_ao.look_up.default
"""Real values [*, C] of the rows of codes [O, C] that ``indices`` [*] name; one scale [O, 1] for each row."""
row = torch.ops.dmq_ao.row.default
"""Rows [B] of the table whose ``timesteps`` [R] are nearest to ``timestep`` [B]; the first on a tie."""
dynamic_qparams = torch.ops.dmq_ao.dynamic_qparams.default
"""Scale [B] float32 and zero point [B] int32 of each row of ``x`` [B, ...], zero included; a vector is one row."""
