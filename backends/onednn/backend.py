"""What the oneDNN backend can do: int8 on CPUs, on the kernels that PyTorch brings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from dmq_ao.backends.backend import Backend, Finding, Lowered, MaxPlan, PeakProduct
from dmq_ao.backends.onednn import cpu, self_test
from dmq_ao.backends.onednn.fused import fastest_on_cpu
from dmq_ao.backends.onednn.lowering import lower_to_onednn
from dmq_ao.backends.onednn.measured import lower_by_layer_times
from dmq_ao.backends.onednn.operators import INTEGER_KERNELS
from dmq_ao.backends.onednn.packed import FLOAT_KERNELS
from dmq_ao.backends.onednn.peak import cpu_products
from dmq_ao.backends.products import unfoldable
from dmq_ao.records import LayerPlan, LayerRecord


class OneDNN(Backend):
    """int8 kernels of oneDNN, reached through PyTorch."""

    name = "onednn"
    automatic = True
    keeps_packed = True
    kernels = (*INTEGER_KERNELS, *FLOAT_KERNELS)
    measured = staticmethod(lower_by_layer_times)
    max_plan = MaxPlan(fastest_on_cpu)

    def why_not_on(self, device: torch.device) -> str:
        """Why it does not run on a device, and what to do; empty when it does."""
        return "" if device.type == "cpu" else f"it runs on CPUs and the denoiser is on {device}; move the denoiser"

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run, one sentence each; what runs slower is no reason."""
        if cpu.has_kernels():
            return unfoldable(plan)
        missing = "this PyTorch build has no oneDNN quantized kernels (torch.ops.onednn); use backend='reference'"
        return [missing, *unfoldable(plan)]

    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
        """Replace layers of a q/dq graph by integer kernels, in place; the rest stays as it is, with the reason."""
        return lower_to_onednn(gm, records)

    def multiplies_integers(self) -> bool:
        """Whether PyTorch has the kernels, and the self-test found integer products whose sums are exact."""
        return any(self_test.sums(word) is not self_test.Sums.WRONG for word in self_test.WORDS)

    def peak_products(self, device: torch.device) -> list[PeakProduct]:
        """Linears and convolutions on which oneDNN does well; empty where none of their sums is exact."""
        return cpu_products() if device.type == "cpu" and self.multiplies_integers() else []

    def examine(self) -> list[Finding]:
        """Whether there are integer kernels, and which of their sums are those of the integers."""
        return self_test.findings()
