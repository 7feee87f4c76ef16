"""Whether oneDNN's integer kernels are there, and make the sums that they should: an int8 convolution of all codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dmq_ao.backends.backend import BROKEN, NOTE, OK, SLOW, Finding
from dmq_ao.backends.onednn import cpu


def kernels() -> Finding:
    """Whether PyTorch has integer kernels, and the CPU instructions for which they are exact."""
    if not cpu.has_kernels():
        text = "this PyTorch build has no oneDNN int8 operators: the reference backend runs, in float, slowly"
        return Finding(SLOW, "kernels", text)
    if not cpu.has_vnni():
        text = (
            "this CPU has no VNNI: its int8 products saturate, so layers run as float on dequantized values, no faster"
            " than float32; files are as small, pictures the same"
        )
        return Finding(SLOW, "kernels", text)
    return Finding(OK, "kernels", "backend 'auto' uses oneDNN's int8 kernels (onednn)")


def convolution() -> Finding:
    """An int8 convolution against the sum of its integers: u8 and s8 over their whole ranges."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1, 64, 9, 9), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-128, 128, (32, 64, 3, 3), generator=generator, dtype=torch.int8)
    exact = functional.conv2d(codes.double() - 128, weight.double(), padding=1)
    try:
        actual = raw_sums(codes, weight, zero_point=128)
    except Exception as error:  # a kernel that does not run is the finding
        return Finding(BROKEN, "self-test", f"the int8 convolution fails: {type(error).__name__}: {error}")
    if torch.equal(actual.double(), exact):
        return Finding(OK, "self-test", "an int8 convolution equals the sum of its integers")
    if not cpu.has_vnni():
        return Finding(NOTE, "self-test", "int8 products saturate on this CPU, as said above; they are not used")
    return Finding(
        BROKEN, "self-test", "an int8 convolution differs from the sum of its integers; use backend 'reference'"
    )


def raw_sums(codes: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """The sums [N, O, H, W] of a padded 3x3 convolution on oneDNN, all scales one. Sums here are exact in float32."""
    onednn: Any = torch.ops.onednn
    ones = torch.ones(weight.shape[0])
    geometry = ([1, 1], [1, 1], [1, 1])
    packed = onednn.qconv_prepack(weight, ones, 1.0, 0, *geometry, 1, None)
    codes = codes.contiguous(memory_format=torch.channels_last)
    inputs = (codes, 1.0, zero_point, packed, ones, torch.zeros_like(ones, dtype=torch.int32), None)
    # One group, scale and zero point of the output, nothing fused.
    plain: tuple[Any, ...] = (1, 1.0, 0, torch.float32, "none", [], "")
    result: Tensor = onednn.qconv_pointwise.default(*inputs, *geometry, *plain)
    return result
