"""The arithmetic of quantization: tensors in, tensors out, nothing remembered.

Uniform affine quantization (arXiv 1712.05877): codes are integers ``q``, and the real value of a code is
``(q - zero_point) * scale``. Every range contains zero, so a zero point is itself a code and padding with it is
padding with zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Smallest scale: an all-zero channel keeps a finite, harmless step.
EPS = float(torch.finfo(torch.float32).eps)


FLOAT8 = torch.float8_e4m3fn


FLOAT8_MAX = float(torch.finfo(FLOAT8).max)


def code_dtype(symmetric: bool, float8: bool = False) -> torch.dtype:
    """What a weight's codes are stored as in memory: signed bytes where symmetric, else unsigned ones."""
    return FLOAT8 if float8 else torch.int8 if symmetric else torch.uint8


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code: signed around zero when symmetric, else from 0.

    >>> code_range(4, symmetric=False), code_range(4, symmetric=True)
    ((0, 15), (-8, 7))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def choose_qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges ``[low, high]``, extended to contain zero.

    Args:
        low: [...] smallest values, any shape, float.
        high: [...] largest values, the same shape.
        bits: width of a code; one-bit symmetric codes are refused (their grid {-1, 0} has no positive value).
        symmetric: signed codes with zero point 0.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, both [...] of the shape of ``low``.

    Raises:
        ValueError: for symmetric codes of one bit.
    """
    quant_min, quant_max = code_range(bits, symmetric)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if symmetric:
        if bits == 1:
            raise ValueError("symmetric codes need at least 2 bits; use asymmetric codes for 1 bit")
        scale = (torch.maximum(-low, high) / quant_max).clamp_min(EPS)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (quant_max - quant_min)).clamp_min(EPS)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    # A range that is NaN has a scale of NaN, which says so; its zero point must still be a code.
    return scale, zero_point.nan_to_num(quant_min).to(torch.int32)


def quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int | Tensor, quant_max: int | Tensor
) -> Tensor:
    """Codes ``clamp(round(x / scale) + zero_point)`` of ``x`` [...] as float32; all others broadcast against ``x``.

    Computed in float32 whatever the dtype of ``x``; ties go to even.
    """
    return torch.clamp(torch.round(x.float() / scale) + zero_point, quant_min, quant_max)  # type: ignore[arg-type]


def float8_qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of float8 codes for ranges ``[low, high]``: the largest magnitude is the largest number.

    Args:
        low: [...] smallest values, any shape, float.
        high: [...] largest values, the same shape.

    Returns:
        ``scale`` float32 and ``zero_point`` int32, all zero, both [...] of the shape of ``low``.
    """
    scale = (torch.maximum(-low.float(), high.float()) / FLOAT8_MAX).clamp_min(EPS)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` [...] in float8 (e4m3 of OCP's 8-bit floating point, 1.0), to nearest; clipped to its range."""
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


class RowLimits(NamedTuple):
    """Smallest and largest code of rows, and which rows have one bit; each a number, or [rows, 1, ...]."""

    low: int | Tensor
    high: int | Tensor
    one_bit: Tensor | None

    @staticmethod
    def of(bits: int | Tensor, symmetric: bool, like: Tensor) -> "RowLimits":
        """Limits of the rows of ``like`` [rows, ...], all of ``bits`` bits or each of its own, [rows]."""
        if isinstance(bits, int) and bits > 1:
            return RowLimits(*code_range(bits, symmetric), None)
        widths = torch.as_tensor(bits, device=like.device).reshape(-1, *[1] * (like.dim() - 1))
        levels = torch.exp2(widths.float())
        one_bit = widths == 1
        low, high = (-levels / 2, levels / 2 - 1) if symmetric else (torch.zeros_like(levels), levels - 1)
        return RowLimits(low, high, one_bit if bool(one_bit.any()) else None)


def quantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor, limits: RowLimits) -> Tensor:
    """Codes of the rows of a weight as float32, each row of its own width.

    One bit is a sign: the codes ``zero_point - 1`` and ``zero_point + 1``, for {0, d} has no negative value, or no
    positive one, and more than twice the error.

    Args:
        x: [rows, ...], float.
        scale: broadcasts against ``x``, and so does ``zero_point``.
        zero_point: integer codes; 1 in asymmetric rows of one bit.
        limits: of the codes.
    """
    codes = quantize_affine(x, scale, zero_point, limits.low, limits.high)
    if limits.one_bit is None:
        return codes
    return torch.where(limits.one_bit, zero_point + torch.where(x < 0, -1.0, 1.0), codes)


def sign_qparams(rows: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows] of one-bit rows [rows, n]: the mean absolute value is the least-squares scale."""
    scale = rows.float().abs().mean(1).clamp_min(EPS)
    return scale, torch.full_like(scale, 0 if symmetric else 1, dtype=torch.int32)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values ``(codes - zero_point) * scale`` in float32, of the shape [...] of ``codes``."""
    return (codes.float() - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and come back: the float32 values that the codes of ``x`` [...] stand for."""
    return dequantize_affine(quantize_affine(x, scale, zero_point, quant_min, quant_max), scale, zero_point)


def along(values: Tensor, ch_axis: int, ndim: int) -> Tensor:
    """``values`` [C] shaped to broadcast along axis ``ch_axis`` of a tensor with ``ndim`` dimensions."""
    shape = [1] * ndim
    shape[ch_axis] = -1
    return values.reshape(shape)


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB over all elements of two tensors [...]; infinite when equal.

    >>> round(sqnr(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0])), 1)
    23.0
    """
    signal = expected.double().square().sum()
    noise = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if noise != 0 else float("inf")


def input_peak(weight: Tensor, groups: int) -> Tensor:
    """Largest absolute weight [C] of each input channel."""
    peaks = weight.abs().reshape(*weight.shape[:2], -1).amax(2)
    return peaks.reshape(groups, len(weight) // groups, -1).amax(1).flatten()
