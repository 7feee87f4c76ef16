"""How near integer kernels come to what the machine can do: multiply-accumulates of a call over its int8 peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dmq_ao.backends.onednn import backend as onednn
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import cuda_ms, latency

# What the peak is measured on, shapes on which oneDNN does well: rows, inputs and outputs of linears; batch, channels
# (in and out) and pixels a side of 3x3 convolutions.
LINEARS = ((1024, 2048, 2048), (2048, 1024, 4096), (512, 512, 512))
CUDA_SIZES = (4096, 8192)
CONVOLUTIONS = ((4, 256, 32), (4, 512, 16), (4, 128, 64))


def integer_macs(quantized: QuantizedDenoiser, inputs: Mapping[str, Any]) -> int:
    """Integer multiply-accumulates of one call, from the shapes that its integer kernels are given.

    Taps on padding count; an input of more than 8 bits counts once a byte. What runs in float does not count, so that
    a denoiser without integer kernels has 0. The call is made, uncompiled.

    Args:
        quantized: from ``convert`` or ``load``.
        inputs: keyword arguments of the call.
    """
    kernels = torch.ops.dmq_ao
    formulas = {
        kernels.int_conv: partial(_conv_macs, groups=9, kernel_size=10),
        kernels.int_linear: _linear_macs,
        kernels.cuda_conv: partial(_conv_macs, groups=None, kernel_size=12),
        kernels.cuda_linear: _linear_macs,
        kernels.library_linear: _linear_macs,
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        quantized(**inputs)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(int(count) for operator, count in counts.items() if operator in formulas)


def _conv_macs(
    codes: Sequence[int], *args: Any, out_shape: Sequence[int], groups: int | None, kernel_size: int, **kwargs: Any
) -> int:
    """``groups`` and ``kernel_size``: where among the arguments after the codes they are."""
    each: int = codes[1] // (1 if groups is None else args[groups]) * prod(args[kernel_size])
    return prod(out_shape) * each


def _linear_macs(codes: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return prod(out_shape) * codes[-1]


def int8_peak(
    repeats: int = 15,
    linears: Sequence[tuple[int, int, int]] = LINEARS,
    convolutions: Sequence[tuple[int, int, int]] = CONVOLUTIONS,
    device: torch.device | str = "cpu",
) -> float | None:
    """Integer multiply-accumulates per second that this machine reaches on large products of int8.

    On a CPU measured through the project's own operators, on as many threads as torch has: the best of all, each by
    the median of ``repeats`` calls. None where the CPU has no int8 instructions (VNNI). On a GPU measured by PyTorch's
    own int8 product of square matrices.

    Args:
        repeats: timed calls of each.
        linears: rows, inputs, outputs.
        convolutions: batch, channels, pixels a side.
        device: to measure.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak(repeats, torch.device(device))
    if not onednn.has_vnni():
        return None
    products = [_linear(*shape) for shape in linears] + [_convolution(*shape) for shape in convolutions]
    times = latency({str(place): call for place, (call, _) in enumerate(products)}, repeats=repeats)
    return max(macs / times[str(place)].median_ms * 1e3 for place, (_, macs) in enumerate(products))


def _cuda_peak(repeats: int, device: torch.device) -> float:
    """The best over sizes that fill a GPU."""
    calls = {}
    for size in CUDA_SIZES:
        left, right = (_random(torch.int8, size, size).to(device) for _ in range(2))
        calls[str(size)] = partial(torch._int_mm, left, right.T)  # the right one by columns, as tensor cores want it
    times = latency(calls, repeats=repeats, clock=cuda_ms)
    return max(size**3 / times[str(size)].median_ms * 1e3 for size in CUDA_SIZES)


_Product = tuple[Callable[[], object], int]


def _linear(rows: int, inputs: int, outputs: int) -> _Product:
    """A linear of random codes as a call without arguments, and its multiply-accumulates."""
    codes, weight = _random(torch.uint8, rows, inputs), _random(torch.int8, outputs, inputs)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    call = partial(torch.ops.dmq_ao.int_linear, codes, *_scales(packed, outputs), None, torch.float32)
    return call, rows * inputs * outputs


def _convolution(batch: int, channels: int, side: int) -> _Product:
    """A 3x3 convolution likewise; taps on padding count, as in ``integer_macs``."""
    codes = _random(torch.uint8, batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = _random(torch.int8, channels, channels, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, torch.ones(channels), 1.0, 0, *geometry, None)
    arguments = (codes, *_scales(packed, channels), None, *geometry, [3, 3], torch.float32)
    return partial(torch.ops.dmq_ao.int_conv, *arguments), batch * side**2 * channels**2 * 9


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _scales(packed: Tensor, outputs: int) -> tuple[Tensor, ...]:
    """What stands between the codes and the bias of an integer operator."""
    return torch.ones(1), torch.zeros(1, dtype=torch.int32), packed, torch.ones(outputs), torch.zeros(outputs)
