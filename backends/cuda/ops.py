"""The operators of a graph lowered to CUDA: ``dmq_ao::cuda_linear``, ``cuda_conv`` and ``signed_codes``.

They are opaque to the compiler and need no value from the device, so a compiled graph has no breaks and can be a CUDA
graph. Triton is imported when one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from dmq_ao.backends.cuda.operands import Operands
from dmq_ao.graph.kernels import KernelOperator
from dmq_ao.graph.private import scaled_mm

_OPERANDS = (
    "Tensor? scale, Tensor? zero_point, Tensor[] packed, int[] widths, Tensor? order, Tensor middle, Tensor? shifts,"
    " Tensor sums, Tensor weight_scale, Tensor? bias, Tensor? residual"
)
_cuda_library = torch.library.Library("dmq_ao", "FRAGMENT")
_cuda_library.define(f"cuda_linear(Tensor codes, {_OPERANDS}, ScalarType dtype) -> Tensor")
_cuda_library.define(f"library_linear(Tensor codes, {_OPERANDS}, ScalarType dtype) -> Tensor")
_cuda_library.define(
    f"cuda_conv(Tensor codes, {_OPERANDS}, int[] kernel_size, int[] stride, int[] padding, int[] dilation,"
    " ScalarType dtype) -> Tensor"
)
_cuda_library.define("signed_codes(Tensor codes) -> Tensor")
_cuda_library.define(
    "float8_linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor"
)


def _signed_codes(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _float8_linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = scale.reshape(-1, *[1] * (codes.dim() - 2)).expand(codes.shape[:-1]).reshape(-1, 1)
    flat = codes.reshape(-1, codes.shape[-1])
    # The product by rows and columns of scales is there in bfloat16 only, which is finer than any float8.
    y = scaled_mm(flat, weight.t(), rows.contiguous(), weight_scale[None], torch.bfloat16)
    y = y.to(dtype).reshape(*codes.shape[:-1], -1)
    return y if bias is None else y + bias


def _linear(*arguments: Any, library: bool) -> Tensor:
    from dmq_ao.backends.cuda.triton_matmul import library_takes, multiply

    *fields, dtype = arguments
    operands = Operands(*fields)
    codes, residual = operands.codes, operands.residual
    flat = codes.reshape(-1, codes.shape[-1]).contiguous()
    added = None if residual is None else residual.reshape(len(flat), -1).contiguous()
    product = _contiguous(operands, flat, added)
    y = multiply(product, codes.shape[0], len(flat), None, 1, dtype, by_library=library and library_takes(product))
    return y.reshape(*codes.shape[:-1], -1)


def _conv(*arguments: Any) -> Tensor:
    from dmq_ao.backends.cuda.triton_matmul import multiply

    *fields, kernel_size, stride, padding, dilation, dtype = arguments
    operands = Operands(*fields)
    codes, residual = operands.codes, operands.residual
    items, high, wide = len(codes), *_out_size(codes.shape, kernel_size, stride, padding, dilation)
    added = None if residual is None else _pixels(residual).flatten(0, 2)
    geometry = (*kernel_size, *stride, *padding, *dilation)
    product = _contiguous(operands, _pixels(codes), added)
    y = multiply(product, items, items * high * wide, geometry, wide, dtype)
    return y.reshape(items, high, wide, -1).movedim(-1, 1)


def _contiguous(operands: Operands, codes: Tensor, residual: Tensor | None) -> Operands:
    """The operands as ``multiply`` takes them."""
    scale, zero_point = (None if one is None else one.contiguous() for one in (operands.scale, operands.zero_point))
    return operands._replace(codes=codes, scale=scale, zero_point=zero_point, residual=residual)


def _pixels(images: Tensor) -> Tensor:
    """[N, C, H, W] as contiguous [N, H, W, C]; a view where it is laid out channels last."""
    return images.movedim(1, -1).contiguous()


def _out_size(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    sizes = zip(shape[2:], kernel_size, stride, padding, dilation, strict=True)
    high, wide = ((size + 2 * pad - dil * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dil in sizes)
    return high, wide


def _fake_cuda_linear(*arguments: Any) -> Tensor:
    *fields, dtype = arguments
    operands = Operands(*fields)
    return operands.codes.new_empty((*operands.codes.shape[:-1], operands.weight_scale.shape[0]), dtype=dtype)


def _fake_conv(*arguments: Any) -> Tensor:
    *fields, kernel_size, stride, padding, dilation, dtype = arguments
    operands = Operands(*fields)
    codes, outs = operands.codes, operands.weight_scale.shape[0]
    high, wide = _out_size(codes.shape, kernel_size, stride, padding, dilation)
    return codes.new_empty((codes.shape[0], high, wide, outs), dtype=dtype).movedim(-1, 1)


_cuda_library.impl("signed_codes", _signed_codes, "CompositeImplicitAutograd")
_cuda_library.impl("float8_linear", _float8_linear, "CompositeImplicitAutograd")
for _key in ("CUDA", "CPU"):  # the CPU: for Triton's interpreter
    _cuda_library.impl("cuda_linear", partial(_linear, library=False), _key)
    _cuda_library.impl("library_linear", partial(_linear, library=True), _key)
    _cuda_library.impl("cuda_conv", _conv, _key)
torch.library.register_fake("dmq_ao::cuda_linear", _fake_cuda_linear)
torch.library.register_fake("dmq_ao::library_linear", _fake_cuda_linear)
torch.library.register_fake("dmq_ao::cuda_conv", _fake_conv)

signed_codes = torch.ops.dmq_ao.signed_codes.default
"""uint8 codes less 128, as int8: what tensor cores multiply."""
float8_linear = torch.ops.dmq_ao.float8_linear.default
"""Real values [B, ..., out] of float8 codes [B, ..., in] times float8 codes [out, in], by PyTorch's scaled product.

``scale`` has one entry or one per row of axis 0, ``weight_scale`` one per output.
"""
cuda_linear = torch.ops.dmq_ao.cuda_linear.default
"""Real values [B, ..., out] of signed codes [B, ..., in] times a ``weights.KernelWeight``.

Floats of 16 bits may stand in the place of the codes; then there is no scale, and no zero point.
"""
library_linear = torch.ops.dmq_ao.library_linear.default
"""The same, with the sums of codes that take a byte made by PyTorch where it knows the sizes."""
cuda_conv = torch.ops.dmq_ao.cuda_conv.default
"""Real values [B, out, H, W], channels last, of a convolution of signed codes; pixels outside are real zeros."""


def _cuda_linear_macs(codes: Sequence[int], *arguments: Any, out_shape: Sequence[int], **keywords: Any) -> int:
    del arguments, keywords
    return prod(out_shape) * codes[-1]


def _cuda_conv_macs(codes: Sequence[int], *arguments: Any, out_shape: Sequence[int], **keywords: Any) -> int:
    """Taps on padding count."""
    del keywords
    kernel_size: Sequence[int] = arguments[len(Operands._fields) - 1]
    return prod(out_shape) * codes[1] * prod(kernel_size)


CUDA_KERNELS = (
    KernelOperator(cuda_conv, writes_dtype=True, integer_macs=_cuda_conv_macs),
    KernelOperator(cuda_linear, writes_dtype=True, integer_macs=_cuda_linear_macs),
    KernelOperator(library_linear, writes_dtype=True, integer_macs=_cuda_linear_macs),
    KernelOperator(float8_linear, writes_dtype=True),
)
