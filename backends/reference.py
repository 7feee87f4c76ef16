"""The quantize/dequantize graph run as it is: the meaning that every other backend must equal."""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from dmq_ao.backends.backend import Backend, Lowered
from dmq_ao.backends.products import FLOAT_KERNEL
from dmq_ao.records import Kernel, LayerPlan, LayerRecord


class Reference(Backend):
    """Float arithmetic on dequantized values; any device, any width, any granularity."""

    name = "reference"
    automatic = True

    def why_not_on(self, device: torch.device) -> str:
        """Nothing: the reference runs everywhere."""
        del device
        return ""

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Nothing: the reference runs every recipe."""
        del plan
        return []

    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
        """The graph itself."""
        why = "the reference backend multiplies dequantized values"
        return gm, {name: Kernel(FLOAT_KERNEL, why) for name in records}
