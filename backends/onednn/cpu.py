"""What this CPU and this build of PyTorch have of what oneDNN's kernels want."""

from __future__ import annotations

import torch

from dmq_ao.graph.private import cpu_has


def has_kernels() -> bool:
    """Whether this PyTorch was built with oneDNN's int8 kernels."""
    return hasattr(torch.ops.onednn, "qconv_pointwise") and hasattr(torch.ops.onednn, "qlinear_pointwise")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX)."""
    return cpu_has("avx512_bf16") or cpu_has("amx_tile")
