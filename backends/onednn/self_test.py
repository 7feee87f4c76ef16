"""Whether oneDNN's integer operators make the sums that they should, found by running ours on codes of every size.

Without VNNI oneDNN adds two products at a time in int16, which saturates. Neither the CPU nor PyTorch tells whether it
does: ``ONEDNN_MAX_CPU_ISA`` keeps oneDNN from instructions that are there, and some have only AVX-VNNI. Our compiled
operators reach the same kernels of oneDNN as the ones that are run here.
"""

from __future__ import annotations

import enum
import functools
import os
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmq_ao.backends.backend import BROKEN, OK, SLOW, Finding
from dmq_ao.backends.onednn import cpu
from dmq_ao.backends.onednn.operators import int_conv, int_linear

Word = Literal["linear", "convolution"]
Limits = tuple[int, int, int]
WORDS: tuple[Word, ...] = ("linear", "convolution")

_ZERO_POINT = 128
# Largest input code, and the range of weight codes: all there are; and the widest of which any two products fit int16.
_EVERY_CODE = (255, -128, 127)
_PAIRS_IN_INT16 = ((255, -64, 64), (127, -128, 127))
# Inputs, outputs, kernel, groups, stride: oneDNN has an implementation for each kind.
_TRIED_CONVOLUTIONS = ((3, 8, 3, 1, 1), (32, 16, 3, 1, 1), (8, 5, 1, 1, 2), (6, 4, 3, 2, 1), (16, 16, 3, 16, 1))
_TRIED_LINEARS = ((1, 5, 3), (4, 64, 32), (33, 37, 10), (64, 256, 64))  # rows, inputs, outputs


class Sums(enum.Enum):
    """Which sums of an integer operator are exact: all, those of which any two products fit int16, or not even those.

    None of them where the operators are missing or fail.
    """

    EXACT = "exact"
    PAIRS = "exact while any two products fit int16"
    WRONG = "wrong"


@functools.cache
def sums(word: Word) -> Sums:
    """The verdict on an operator, once a process: tens of milliseconds the first time."""
    if not cpu.has_kernels():
        return Sums.WRONG
    if not _misses(word, _EVERY_CODE):
        return Sums.EXACT
    return Sums.WRONG if any(_misses(word, limits) for limits in _PAIRS_IN_INT16) else Sums.PAIRS


def findings() -> list[Finding]:
    """What was decided for linears and convolutions, and why; one line where PyTorch has no integer kernels."""
    if not cpu.has_kernels():
        text = "this PyTorch build has no oneDNN int8 operators: the reference backend runs, in float, slowly"
        return [Finding(SLOW, "kernels", text)]
    usable = [word for word in WORDS if sums(word) is not Sums.WRONG]
    if not usable:
        return [Finding(BROKEN, "kernels", "no int8 kernel of oneDNN is right: layers run in float"), *_self_tests()]
    text = f"backend 'auto' uses oneDNN's int8 kernels (onednn): {' and '.join(usable)}"
    return [Finding(OK, "kernels", text), *_self_tests()]


def _self_tests() -> list[Finding]:
    return [_finding(word) for word in WORDS]


def _finding(word: Word) -> Finding:
    """The verdict on one operator in words."""
    verdict = sums(word)
    if verdict is Sums.EXACT:
        return Finding(OK, "self-test", f"an int8 {word} equals the sum of its integers, whatever the codes")
    if verdict is Sums.PAIRS:
        text = (
            f"an int8 {word} is exact only while any two products add up within int16: oneDNN uses no VNNI{_limit()};"
            " layers whose codes stay within run on integers (4-bit weights do), the others in float, no faster than"
            " float32; files are as small, pictures the same"
        )
        return Finding(SLOW, "self-test", text)
    text = f"an int8 {word} {_misses(word, _PAIRS_IN_INT16[0]) or _misses(word, _PAIRS_IN_INT16[1])}{_limit()}"
    return Finding(BROKEN, "self-test", f"{text}; its layers run in float")


def _limit() -> str:
    """What may keep oneDNN from this CPU's instructions."""
    name = "ONEDNN_MAX_CPU_ISA"
    return f" ({name}={os.environ[name]} is set)" if os.environ.get(name) else ""


def _misses(word: Word, limits: Limits) -> str:
    """How an operator misses the exact sums for codes up to ``limits``; empty when it makes them.

    Args:
        word: the operator.
        limits: largest code of the input, smallest and largest of the weight.
    """
    generator = torch.Generator().manual_seed(0)
    runs = _convolution_sums if word == "convolution" else _linear_sums
    shapes = _TRIED_CONVOLUTIONS if word == "convolution" else _TRIED_LINEARS
    with torch.no_grad(), torch.device("cpu"):
        try:
            pairs = [runs(shape, limits, generator) for shape in shapes]
        except Exception as error:  # whatever a kernel raises that does not run, it is the finding
            return f"fails: {type(error).__name__}: {error}"
    wrong = sum(int((actual.double() != exact).sum()) for actual, exact in pairs)
    total = sum(exact.numel() for _, exact in pairs)
    return f"makes {wrong} of {total} sums that are not those of its integers" if wrong else ""


def _codes(limits: Limits, generator: torch.Generator, *shapes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes [N, ...] uint8 and [O, ...] int8, up to the limits, every second row only of the largest ones."""
    largest, low, high = limits
    x = torch.randint(0, largest + 1, shapes[0], generator=generator, dtype=torch.uint8)
    weight = torch.randint(low, high + 1, shapes[1], generator=generator, dtype=torch.int8)
    x[::2], weight[::3], weight[1::3] = largest, low, high
    return x, weight


def _unit_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of one, and the sums of the codes of each output: [O] float32."""
    total = weight.flatten(1).sum(1, dtype=torch.int32).to(torch.float32)
    return torch.ones_like(total), total


def _input_scale() -> tuple[Tensor, Tensor]:
    return torch.ones(1, dtype=torch.float32), torch.full((1,), _ZERO_POINT, dtype=torch.int32)


def _linear_sums(shape: tuple[int, ...], limits: Limits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sums [N, O] by the operator and in float64; float32 holds them."""
    rows, inputs, outputs = shape
    x, weight = _codes(limits, generator, (rows, inputs), (outputs, inputs))
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    actual = int_linear(x, *_input_scale(), packed, *_unit_scales(weight), None, torch.float32)
    return actual, (x.double() - _ZERO_POINT) @ weight.double().T


def _convolution_sums(shape: tuple[int, ...], limits: Limits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sums [2, O, H, W] by the operator, padded with the zero point, and in float64; float32 holds them."""
    inputs, outputs, kernel, groups, stride = shape
    x, weight = _codes(limits, generator, (2, inputs, 9, 7), (outputs, inputs // groups, kernel, kernel))
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    scale, total = _unit_scales(weight)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *geometry, None)
    codes = x.contiguous(memory_format=torch.channels_last)
    args = (codes, *_input_scale(), packed, scale, total, None, *geometry, [kernel] * 2, torch.float32)
    exact = F.conv2d(x.double() - _ZERO_POINT, weight.double(), None, *geometry)
    return int_conv(*args), exact
