"""``torch.compile`` with what a quantized denoiser wants, and the fastest plan that the CPU has."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from dmq_ao.backends.onednn import fused as onednn_fused
from dmq_ao.backends.onednn import packed as onednn_packed
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.passes import fast_gelu, join_projections, lower_precision

Mode = Literal["default", "max"]


def compile(quantized: QuantizedDenoiser, mode: Mode = "default", **given: Any) -> nn.Module:
    """Compile a converted denoiser for any batch size, resolution and timestep at once.

    Args:
        quantized: from ``convert`` or ``load``. It is not changed, and shares its tensors with the result.
        mode: ``"default"`` keeps the numbers of the converted graph (float32 rounding apart). ``"max"`` also keeps
            bfloat16 between integer layers where the CPU multiplies it (norms and sums stay in float32), and runs
            norm, SiLU, quantize and attention in kernels of our own, compiled for the machine on first use: it needs a
            C++ compiler and ninja, and the ``onednn`` backend. On the ``cuda`` backend it replays CUDA graphs, one for
            each shape.
        **given: further arguments of ``torch.compile``; ``dynamic=False`` compiles each shape on its own.

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
    if mode == "max" and quantized.backend not in _PLANS:
        raise ValueError(
            f"mode='max' is a plan of the backends {sorted(_PLANS)}, and this denoiser runs on {quantized.backend!r}"
        )
    planned = _with_graph(quantized, _PLANS[quantized.backend](quantized.graph_module)) if mode == "max" else quantized
    options: dict[str, Any] = {"guard_filter_fn": _without_own_tensors, "size_asserts": False}
    if mode == "max" and quantized.backend == "cuda":
        options["triton.cudagraphs"] = True
    options |= given.pop("options", {})
    compiled = torch.compile(planned, **{"dynamic": True, "fullgraph": True, **given}, options=options)
    assert isinstance(compiled, nn.Module)
    return compiled


def _without_own_tensors(guards: Sequence[Any]) -> list[bool]:
    """Codes and scales never change once converted: to check them all would cost a millisecond a call."""
    own = re.compile(r"\._(buffers|parameters)\b")
    return [not (guard.guard_type == "TENSOR_MATCH" and own.search(guard.name)) for guard in guards]


def fastest(gm: GraphModule) -> GraphModule:
    """The plan of ``"max"`` on CPUs: another graph of the same tensors."""
    plan = GraphModule(gm, copy.deepcopy(gm.graph))
    join_projections(plan)
    if multiplies_bfloat16():
        plan = lower_precision(onednn_packed.use_int4(plan))
    fast_gelu(plan)
    return onednn_fused.fuse(plan)


def fastest_on_cuda(gm: GraphModule) -> GraphModule:
    """The plan of ``"max"`` on GPUs."""
    plan = GraphModule(gm, copy.deepcopy(gm.graph))
    join_projections(plan)
    return plan


_PLANS = {"onednn": fastest, "cuda": fastest_on_cuda}


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _with_graph(quantized: QuantizedDenoiser, gm: GraphModule) -> QuantizedDenoiser:
    twin = copy.copy(quantized)
    twin.__dict__["_modules"] = {**quantized._modules, "graph_module": gm}
    return twin
