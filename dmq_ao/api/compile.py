"""``torch.compile`` with what a quantized denoiser wants, and the fastest plan that its backend has."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from dmq_ao.backends.backend import MaxPlan
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.graph.private import compiler_error, replace_child, sizes_apart

Mode = Literal["default", "max"]


def compile(quantized: QuantizedDenoiser, mode: Mode = "default", **arguments: Any) -> nn.Module:
    """Compile a converted denoiser for any batch size, resolution and timestep at once.

    A batch of one is compiled on its own, as is one of 16 and more where a convolution stays in float, and the side
    that a table of positions ends at (SD3): PyTorch tells these apart. Axes that are equal in the first call may
    differ in others.

    Args:
        quantized: from ``convert`` or ``load``. It is not changed, and shares its tensors with the result.
        mode: ``"default"`` keeps the numbers of the converted graph (float32 rounding apart). ``"max"`` also keeps
            bfloat16 between integer layers where the CPU multiplies it (norms and sums stay in float32), and runs
            norm, SiLU, quantize and attention in kernels of our own, compiled for the machine on first use: it needs a
            C++ compiler and ninja, and the ``onednn`` backend. On the ``cuda`` backend it replays CUDA graphs, one for
            each shape.
        **arguments: further arguments of ``torch.compile``; ``dynamic=False`` compiles each shape on its own.

    Returns:
        A module that is called like ``quantized``; compilation happens in its first call.

    Raises:
        TypeError: when ``quantized`` is not a converted denoiser.
        ValueError: for an unknown mode, or ``"max"`` on a backend that has no such plan.
        RuntimeError: when the kernels of ``"max"`` cannot be compiled, with what to install.
    """
    if not isinstance(quantized, QuantizedDenoiser):
        raise TypeError(
            f"compile takes what dmq_ao.convert or dmq_ao.load returned, got {type(quantized).__name__}; a float"
            " denoiser is compiled by torch.compile"
        )
    if mode not in ("default", "max"):
        raise ValueError(f"mode must be 'default' or 'max', got {mode!r}")
    options: dict[str, Any] = {"guard_filter_fn": _without_own_tensors, "size_asserts": False}
    planned = quantized
    if mode == "max":
        plan = _max_plan(quantized.backend)
        planned = _with_graph(quantized, plan.rewrite(quantized.graph_module))
        options |= plan.options
    options |= arguments.pop("options", {})
    compiled = torch.compile(planned, **{"dynamic": True, "fullgraph": True, **arguments}, options=options)
    assert isinstance(compiled, nn.Module)
    compiled.forward = _with_own_errors(compiled.forward, quantized)
    return compiled


def _with_own_errors(forward: Callable[..., Any], quantized: QuantizedDenoiser) -> Callable[..., Any]:
    """A compiled module's ``forward``, which compiles when called: axes of one size are not taken for one axis.

    Of arguments that ``quantized`` refuses, its own words are raised, not those of the compiler that traced them.
    """

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with sizes_apart():
                return forward(*args, **kwargs)
        except compiler_error():
            quantized.check_call(*args, **kwargs)
            raise

    return call


def _max_plan(name: str) -> MaxPlan:
    """The plan of ``"max"`` of a backend.

    Raises:
        ValueError: when it has none.
    """
    plan = ALL_BACKENDS[name].max_plan
    if plan is None:
        able = sorted(backend.name for backend in ALL_BACKENDS.values() if backend.max_plan is not None)
        raise ValueError(f"mode='max' is a plan of the backends {able}, and this denoiser runs on {name!r}")
    return plan


def _without_own_tensors(guards: Sequence[Any]) -> list[bool]:
    """Codes and scales never change once converted: to check them all would cost a millisecond a call."""
    own = re.compile(r"\._(buffers|parameters)\b")
    return [not (guard.guard_type == "TENSOR_MATCH" and own.search(guard.name)) for guard in guards]


def _with_graph(quantized: QuantizedDenoiser, gm: GraphModule) -> QuantizedDenoiser:
    twin = copy.copy(quantized)
    replace_child(twin, "graph_module", gm)
    return twin
