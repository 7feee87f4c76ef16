"""Products on which oneDNN does well, by which the int8 peak of a CPU is measured: through our own operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dmq_ao.backends.backend import PeakProduct
from dmq_ao.backends.onednn.operators import ConvCall, int_conv, int_linear
from dmq_ao.backends.products import random_codes

# Rows, inputs and outputs of linears; batch, channels (in and out) and pixels a side of 3x3 convolutions.
PEAK_LINEARS = ((1024, 2048, 2048), (2048, 1024, 4096), (512, 512, 512))
PEAK_CONVOLUTIONS = ((4, 256, 32), (4, 512, 16), (4, 128, 64))


def cpu_products(
    linears: Sequence[tuple[int, int, int]] = PEAK_LINEARS,
    convolutions: Sequence[tuple[int, int, int]] = PEAK_CONVOLUTIONS,
) -> list[PeakProduct]:
    """Products of random codes as calls.

    Args:
        linears: rows, inputs, outputs.
        convolutions: batch, channels, pixels a side.
    """
    return [_peak_linear(*shape) for shape in linears] + [_peak_convolution(*shape) for shape in convolutions]


def _peak_linear(rows: int, inputs: int, outputs: int) -> PeakProduct:
    codes, weight = random_codes(torch.uint8, rows, inputs), random_codes(torch.int8, outputs, inputs)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    call = partial(int_linear, codes, *_scales(packed, outputs), None, torch.float32)
    return PeakProduct(call, rows * inputs * outputs)


def _peak_convolution(batch: int, channels: int, side: int) -> PeakProduct:
    """A 3x3 convolution; taps on padding count, as they do in the work of a denoiser."""
    codes = random_codes(torch.uint8, batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = random_codes(torch.int8, channels, channels, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, torch.ones(channels), 1.0, 0, *geometry, None)
    arguments = ConvCall(codes, *_scales(packed, channels), None, *geometry, [3, 3], torch.float32)
    return PeakProduct(partial(int_conv, *arguments), batch * side**2 * channels**2 * 9)


def _scales(packed: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What stands between the codes and the bias of an integer operator."""
    return torch.ones(1), torch.zeros(1, dtype=torch.int32), packed, torch.ones(outputs), torch.zeros(outputs)
