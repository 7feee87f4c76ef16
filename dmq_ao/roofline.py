"""How near integer kernels come to what the machine can do: multiply-accumulates of a call over its int8 peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dmq_ao.backends import onednn
from dmq_ao.evaluation import latency
from dmq_ao.module import QuantizedDenoiser

# Rows, inputs and outputs of the linears that the peak is measured on: shapes on which oneDNN does best.
SHAPES = ((1024, 2048, 2048), (2048, 1024, 4096), (2048, 4096, 1024))


def integer_macs(quantized: QuantizedDenoiser, inputs: Mapping[str, Any]) -> int:
    """Integer multiply-accumulates of one call, from the shapes that its integer kernels are given.

    Taps on padding count; an input of more than 8 bits counts once a byte. What runs in float does not count, so that
    a denoiser without integer kernels has 0. The call is made, uncompiled.

    Args:
        quantized: from ``convert`` or ``load``.
        inputs: keyword arguments of the call.
    """
    formulas = {torch.ops.dmq_ao.int_conv: _conv_macs, torch.ops.dmq_ao.int_linear: _linear_macs}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        quantized(**inputs)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(int(count) for operator, count in counts.items() if operator in formulas)


def _conv_macs(codes: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    groups: int = args[9]
    kernel_size: list[int] = args[10]
    return prod(out_shape) * codes[1] // groups * prod(kernel_size)


def _linear_macs(codes: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return prod(out_shape) * codes[-1]


def int8_peak(repeats: int = 15, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> float | None:
    """Integer multiply-accumulates per second that this machine reaches on large uint8 x int8 linears.

    Measured through the project's own operator, on as many threads as torch has: the best of ``shapes`` (rows, inputs,
    outputs), each by the median of ``repeats`` calls. None where the CPU has no int8 instructions (VNNI).
    """
    if not onednn.has_vnni():
        return None
    times = latency({str(shape): _Linear(*shape) for shape in shapes}, repeats=repeats)
    return max(prod(shape) / times[str(shape)].median_ms * 1e3 for shape in shapes)


class _Linear:
    """A linear of random codes as a call without arguments."""

    def __init__(self, rows: int, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(256, (rows, inputs), generator=generator, dtype=torch.uint8)
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        ones, sums = torch.ones(outputs), torch.zeros(outputs)
        self.arguments = (codes, scale, zero_point, packed, ones, sums, None, torch.float32)

    def __call__(self) -> Tensor:
        result: Tensor = torch.ops.dmq_ao.int_linear(*self.arguments)
        return result
