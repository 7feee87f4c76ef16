"""A weight from codes that stay, differentiable in its scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmq_ao import numerics


class DequantizedCodes(torch.autograd.Function):
    """A weight from its codes, with a gradient for ``scale`` [out, groups] alone; keeps codes, not their floats."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Values of ``codes`` [out, ...] by ``scale`` and ``zero_point`` [out, groups]."""
        ctx.save_for_backward(codes, zero_point)
        grouped = codes.reshape(*scale.shape, -1)
        return numerics.dequantize_affine(grouped, scale.unsqueeze(-1), zero_point.unsqueeze(-1)).reshape(codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the scale [out, groups]; none of the codes."""
        codes, zero_point = ctx.saved_tensors
        grouped = codes.reshape(*zero_point.shape, -1).float() - zero_point.unsqueeze(-1)
        return (gradients[0].reshape(grouped.shape) * grouped).sum(-1), None, None
