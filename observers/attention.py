"""The observer of what attention multiplies: nothing is remembered, its range is the sample's own or known."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase

from dmq_ao import graph, numerics
from dmq_ao.numerics import ops
from dmq_ao.observers.channel_scale import round_ste


class AttentionObserver(ObserverBase):
    """Stands on a factor of a product inside attention and lowers itself to quantize and dequantize nodes.

    Queries, keys and values have the range of each sample; the softmax is unsigned, from 0 to 1.
    """

    def __init__(self, bits: int, unit_range: bool, **spec: Any) -> None:
        """``spec`` is what torchao passes to every observer; all of it follows from ``bits``."""
        super().__init__(dtype=torch.uint8, is_dynamic=not unit_range)
        del spec
        self.bits, self.unit_range = bits, unit_range

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, ...] itself."""
        return x

    def simulate(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` [B, ...] stand for, in the dtype of ``x``; rounding lets the gradient through."""
        with torch.no_grad():
            scale, zero_point = (numerics.along(t, 0, x.dim()) for t in self._qparams(x))
        codes = torch.clamp(round_ste(x.float() / scale) + zero_point, 0, 2**self.bits - 1)
        return ((codes - zero_point) * scale).to(x.dtype)

    def _qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.unit_range:
            return self._unit(x.device)
        scale, zero_point = ops.dynamic_qparams(x, self.bits)
        return scale, zero_point

    def _unit(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        scale = torch.full((1,), 1 / (2**self.bits - 1), device=device)
        return scale, torch.zeros(1, dtype=torch.int32, device=device)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``zero_point`` [1] of the softmax; [0] where each sample has its own."""
        return self._unit() if self.unit_range else (torch.zeros(0), torch.zeros(0, dtype=torch.int32))

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace this observer's node by quantize and dequantize nodes; torchao's convert calls it."""
        source = node.args[0]
        assert isinstance(source, Node)
        call = model.graph.call_function
        with model.graph.inserting_before(node):
            if self.unit_range:
                scale, zero_point = (
                    graph.add_tensor(model, f"softmax_{what}", tensor)
                    for what, tensor in zip(("scale", "zero_point"), self._unit(), strict=True)
                )
            else:
                both = call(ops.dynamic_qparams, (source, self.bits))
                scale, zero_point = (call(operator.getitem, (both, place)) for place in (0, 1))
            codes = call(ops.quantize, (source, scale, zero_point, None, 1, 0, 2**self.bits - 1))
            dtype = source.meta["val"].dtype
            real = call(ops.dequantize, (codes, scale, zero_point, None, 1, dtype))
        node.replace_all_uses_with(real)
        model.graph.erase_node(node)
