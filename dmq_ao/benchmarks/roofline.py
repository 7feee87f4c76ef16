"""How near integer kernels come to what the machine can do: multiply-accumulates of a call over its int8 peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import clock_of, latency


def integer_macs(quantized: QuantizedDenoiser, inputs: Mapping[str, Any]) -> int:
    """Integer multiply-accumulates of one call, from the shapes that its integer kernels are called with.

    Taps on padding count; an input of more than 8 bits counts once a byte. What runs in float does not count, so that
    a denoiser without integer kernels has 0. The call is made, uncompiled.

    Args:
        quantized: from ``convert`` or ``load``.
        inputs: keyword arguments of the call.
    """
    formulas = {
        kernel.target.overloadpacket: kernel.integer_macs
        for kernel in ALL_BACKENDS[quantized.backend].kernels
        if kernel.integer_macs is not None
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        quantized(**inputs)
    counts = counter.get_flop_counts().get("Global", {})
    return sum(int(count) for operator, count in counts.items() if operator in formulas)


def int8_peak(repeats: int = 15, device: torch.device | str = "cpu") -> float | None:
    """Integer multiply-accumulates per second that a machine reaches on large products of int8.

    The best of the products that its backends measure it by, each by the median of ``repeats`` calls: on a CPU
    through the project's own operators, on as many threads as torch has; on a GPU by PyTorch's own product of square
    matrices. None where no backend multiplies integers, as on a CPU without int8 instructions (VNNI).

    Args:
        repeats: timed calls of each.
        device: to measure.
    """
    device = torch.device(device)
    able = [backend for backend in ALL_BACKENDS.values() if not backend.why_not_on(device)]
    products = [product for backend in able for product in backend.peak_products(device)]
    if not products:
        return None
    calls = {str(place): product.call for place, product in enumerate(products)}
    times = latency(calls, repeats=repeats, clock=clock_of(device))
    return max(product.macs / times[str(place)].median_ms * 1e3 for place, product in enumerate(products))
