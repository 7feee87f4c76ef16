"""Gradients through a q/dq graph: rounding passes them as if nothing had happened, clipping does not.

The straight-through estimator (Bengio et al., arXiv 1308.3432); past the range the gradient is zero, as in LSQ (arXiv
1902.08153, eq. 3). Ranges that are taken from the sample itself count as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from dmq_ao import numerics
from dmq_ao.numerics import ops
from dmq_ao.observers.channel_scale import round_ste

_DIFFERENTIABLE = {
    ops.quantize,
    ops.quantize_float8,
    ops.dequantize,
    ops.dequantize_weight,
    ops.look_up,
    ops.row,
    ops.dynamic_qparams,
}


def has_opaque_operators(gm: GraphModule) -> bool:
    """Whether a graph has operators that are neither PyTorch's own nor of a q/dq graph: they know no gradient."""
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"} - _DIFFERENTIABLE
    return any(getattr(target, "namespace", "aten") not in ("aten", "prims") for target in targets)


class StraightThrough(Interpreter):
    """Runs a q/dq graph on codes that are floating numbers: the same values, with gradients."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.instead: dict[Any, Callable[..., Any]] = {
            ops.quantize: _code_values,
            ops.quantize_float8: _codes_float8,
            ops.dynamic_qparams: _constant_qparams,
        }

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The node's value; of a quantize node, codes in float32."""
        return super().call_function(self.instead.get(target, target), args, kwargs)


def _code_values(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    ch_axis: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    divided = x.float() / ops.channel_steps(x, scale, channel_scale, ch_axis)
    return torch.clamp(round_ste(divided) + numerics.along(zero_point, 0, x.dim()), quant_min, quant_max)


def _codes_float8(x: Tensor, scale: Tensor, channel_scale: Tensor | None, ch_axis: int) -> Tensor:
    divided = x.float() / ops.channel_steps(x, scale, channel_scale, ch_axis)
    clipped = divided.clamp(-numerics.FLOAT8_MAX, numerics.FLOAT8_MAX)
    return clipped + (clipped.to(numerics.FLOAT8).float() - clipped).detach()


def _constant_qparams(x: Tensor, bits: int) -> Any:
    return ops.dynamic_qparams(x.detach(), bits)
