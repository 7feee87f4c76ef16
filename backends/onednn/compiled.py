"""Operators ``dmq_ao_cpu::*`` of our own in C++, compiled for the machine on first use.

Inductor's group norm over channels-last memory reads each group's few channels alone; here norm, SiLU and quantize are
two passes over contiguous rows, and uint8 is written once. The integer kernels are oneDNN's, reached without Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmq_ao.backends.onednn.operators import fake_conv, fake_linear

_SOURCE = Path(__file__).with_name("onednn_kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@functools.cache
def load_kernels() -> None:
    """Compile the operators ``dmq_ao_cpu::*``, or take them from PyTorch's cache of extensions, and register them.

    Raises:
        RuntimeError: without a C++ compiler or ninja, with what to install.
    """
    from torch.utils import cpp_extension

    try:
        # A build has a folder of its own for each source, torch and CPU: homes are shared, machine code is not.
        cpu: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        where = [*_FLAGS, torch.__version__, platform.machine(), str(sorted(cpu.items()))]
        key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(where).encode()).hexdigest()[:12]
        with _pip_ninja():
            cpp_extension.load(f"dmq_ao_cpu_{key}", [str(_SOURCE)], extra_cflags=_FLAGS, is_python_module=False)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            "the fused CPU kernels could not be compiled; install a C++ compiler (g++ or clang) and ninja (pip install"
            f' ninja), or use mode="default". The compiler said: {error}'
        ) from error
    torch.library.register_fake("dmq_ao_cpu::group_norm_quantize", _fake_norm)
    torch.library.register_fake("dmq_ao_cpu::float_linear", _fake_float_linear)
    torch.library.register_fake("dmq_ao_cpu::gelu_quantize", _fake_gelu)
    torch.library.register_fake("dmq_ao_cpu::attention", _fake_attention)
    torch.library.register_fake("dmq_ao_cpu::conv", fake_conv)
    torch.library.register_fake("dmq_ao_cpu::linear", fake_linear)
    torch.library.register_fake("dmq_ao_cpu::two_byte_linear", _fake_two_bytes)


@contextlib.contextmanager
def _pip_ninja() -> Iterator[None]:
    """The ninja that pip installed, found even where the environment is not activated."""
    before = os.environ.get("PATH", "")
    if importlib.util.find_spec("ninja") is not None:
        folder = importlib.import_module("ninja").BIN_DIR
        os.environ["PATH"] = os.pathsep.join([before, folder]) if before else folder
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fake_norm(
    x: Tensor,
    shift: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    quant_max: int,
    padding: Sequence[int],
) -> Tensor:
    sizes = [size + 2 * pad for size, pad in zip(x.shape[2:], padding[-(x.dim() - 2) :], strict=True)]
    return x.new_empty((x.shape[0], *sizes, x.shape[1]), dtype=torch.uint8).movedim(-1, 1)


def _fake_gelu(
    x: Tensor,
    factor: Tensor | None,
    tanh: bool,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    quant_max: int,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_two_bytes(
    high: Tensor,
    low: Tensor,
    scale: Tensor,
    zero_high: Tensor,
    zero_low: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    ratio: float,
) -> Tensor:
    return scale.new_empty((high.shape[0], weight_scale.shape[0]))


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, rows, width = query.shape
    return query.new_empty((batch, rows, heads, width)).transpose(1, 2)
