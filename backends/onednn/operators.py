"""The integer operators of a graph lowered to oneDNN: ``dmq_ao::int_conv`` and ``dmq_ao::int_linear``.

They are operators of our own because Inductor lowers oneDNN's only under global freezing. Scales and zero points are
tensors, so a table looked up by timestep needs no recompilation. The zero point never reaches oneDNN, whose
compensation for it is slow: padding is written as codes, and the rest, ``zero_point`` times the sum of the weights, is
taken off the bias. The weight is one that oneDNN prepacked once, or plain int8 codes, prepacked for the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmq_ao.graph.kernels import KernelOperator

_library = torch.library.Library("dmq_ao", "FRAGMENT")
_library.define(
    "int_conv(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int[] kernel_size, ScalarType dtype)"
    " -> Tensor"
)
_library.define(
    "int_linear(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? bias, ScalarType dtype) -> Tensor"
)


def _by_rows(
    kernel: Callable[[Tensor, float, int], Tensor], codes: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Run a kernel that takes one scale and zero point; rows of other timesteps go in calls of their own."""
    pairs = list(zip(scale.tolist(), zero_point.tolist(), strict=True))
    if all(pair == pairs[0] for pair in pairs):
        return kernel(codes, *pairs[0])
    return torch.cat([kernel(codes[i : i + 1], *pair) for i, pair in enumerate(pairs)])


def _offset(shift: float, weight_sum: Tensor, bias: Tensor | None) -> Tensor:
    """What is left of the bias once the zero point is off every code: oneDNN's own way costs up to half the time."""
    offset = weight_sum * -shift
    return offset if bias is None else offset + bias.to(offset.dtype)


class ConvCall(NamedTuple):
    """The arguments of an integer convolution, in order.

    Attributes:
        codes: [N, channels, H, W] uint8.
        scale: [1] or [N] float32, of the codes.
        zero_point: the same in int32.
        weight: prepacked, or [out, channels / groups, h, w] int8.
        weight_scale: [out] float32.
        weight_sum: [out] float32, sums of each output's weight codes times its scale.
        bias: [out], or None.
        stride: one number a spatial axis, and so are padding, dilation and kernel_size.
        padding: zeros on each side.
        dilation: distance of the window's taps.
        groups: of a grouped convolution.
        kernel_size: of the window, which a prepacked weight does not tell.
        dtype: of the result [N, out, H, W].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    kernel_size: Sequence[int]
    dtype: torch.dtype


PADDING = ConvCall._fields.index("padding")


def _int_conv(*arguments: Any) -> Tensor:
    call = ConvCall(*arguments)
    weight, groups = call.weight, call.groups
    if not weight.is_mkldnn:
        geometry = (call.stride, call.padding, call.dilation, groups)
        weight = torch.ops.onednn.qconv_prepack(weight, call.weight_scale, 1.0, 0, *geometry, None)
    scales = (call.weight_scale, torch.zeros_like(call.weight_scale, dtype=torch.int32))

    def kernel(part: Tensor, x_scale: float, x_zero: int) -> Tensor:
        around = list(call.padding)
        if x_zero and any(around):
            part, around = F.pad(part, [pad for pad in reversed(around) for _ in range(2)], value=x_zero), [0, 0]
        offset = _offset(x_scale * x_zero, call.weight_sum, call.bias)
        args = (part, x_scale, 0, weight, *scales, offset, call.stride, around, call.dilation, groups)
        result: Tensor = torch.ops.onednn.qconv_pointwise.default(*args, 1.0, 0, call.dtype, "none", [], "")
        return result

    return _by_rows(kernel, call.codes, call.scale, call.zero_point)


def _int_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if not weight.is_mkldnn:
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
    weight_zero = torch.zeros_like(weight_scale, dtype=torch.int32)

    def multiply(part: Tensor, x_scale: float, offset: Tensor | None, out: torch.dtype) -> Tensor:
        args = (part, x_scale, 0, weight, weight_scale, weight_zero, offset)
        result: Tensor = torch.ops.onednn.qlinear_pointwise.default(*args, 1.0, 0, out, "none", [], "")
        return result

    def kernel(part: Tensor, x_scale: float, x_zero: int) -> Tensor:
        return multiply(part, x_scale, _offset(x_scale * x_zero, weight_sum, bias), dtype)

    if codes.dim() > 2 or len(scale) == 1:
        return _by_rows(kernel, codes, scale, zero_point)
    # Vectors: a call for each would read the whole weight for one product a row.
    product = multiply(codes, 1.0, None, torch.float32)
    result = (product - zero_point.unsqueeze(1) * weight_sum) * scale.unsqueeze(1)
    return (result if bias is None else result + bias).to(dtype)


# Prepacked weights are opaque oneDNN tensors, which dispatch on a key of their own.
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("int_conv", _int_conv, _key)
    _library.impl("int_linear", _int_linear, _key)


def fake_conv(*arguments: Any) -> Tensor:
    """Shape [N, out, ...] and layout of an integer convolution called as ``ConvCall`` has it, for the compiler."""
    call = ConvCall(*arguments)
    windows = zip(call.codes.shape[2:], call.padding, call.dilation, call.kernel_size, call.stride, strict=True)
    sizes = [(size + 2 * pad - dil * (kernel - 1) - 1) // step + 1 for size, pad, dil, kernel, step in windows]
    layout = torch.channels_last if len(sizes) == 2 else torch.contiguous_format
    shape = (call.codes.shape[0], call.weight_scale.shape[0], *sizes)
    return torch.empty(shape, dtype=call.dtype, device=call.codes.device, memory_format=layout)


def fake_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Shape [..., out] of an integer linear of ``codes`` [..., in], for the compiler."""
    return codes.new_empty((*codes.shape[:-1], weight_scale.shape[0]), dtype=dtype)


torch.library.register_fake("dmq_ao::int_conv", fake_conv)
torch.library.register_fake("dmq_ao::int_linear", fake_linear)

int_conv = torch.ops.dmq_ao.int_conv.default
"""Real values [N, out, H, W] of a convolution of uint8 codes; see ``ConvCall``."""
int_linear = torch.ops.dmq_ao.int_linear.default
"""Real values [N, ..., out] of uint8 codes [N, ..., in] times int8 codes [out, in]."""


def _conv_macs(*arguments: Any, out_shape: Sequence[int], **keywords: Any) -> int:
    """Taps on padding count."""
    del keywords
    call = ConvCall(*arguments)
    codes: Any = call.codes  # a shape
    return prod(out_shape) * (int(codes[1]) // call.groups * prod(call.kernel_size))


def _linear_macs(codes: Sequence[int], *arguments: Any, out_shape: Sequence[int], **keywords: Any) -> int:
    del arguments, keywords
    return prod(out_shape) * codes[-1]


INTEGER_KERNELS = (
    KernelOperator(int_conv, writes_dtype=True, integer_macs=_conv_macs),
    KernelOperator(int_linear, writes_dtype=True, integer_macs=_linear_macs),
)
