"""What the CUDA backend can do: integers on NVIDIA GPUs, and when it can."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from dmq_ao.backends.backend import OK, SLOW, Backend, Finding, Lowered, MaxPlan, PeakProduct
from dmq_ao.backends.cuda.lowering import lower_to_cuda
from dmq_ao.backends.cuda.measured import lower_by_linear_times
from dmq_ao.backends.cuda.ops import CUDA_KERNELS
from dmq_ao.backends.cuda.peak import gpu_products
from dmq_ao.backends.products import unfoldable
from dmq_ao.passes import join_projections
from dmq_ao.records import LayerPlan, LayerRecord

FLOAT8_CAPABILITY = (8, 9)
MIN_CAPABILITY = (8, 0)  # Triton's integer products on the tensor cores of older ones are not tried


def why_not_here(device: torch.device) -> str:
    """Why a device does not run these kernels; empty when it does."""
    if device.type != "cuda":
        return f"it runs on CUDA devices and the denoiser is on {device}; move the denoiser"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; check torch.cuda.is_available(), install a build of PyTorch with CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} of {device} is below {MIN_CAPABILITY}; use another device"
    return ""


def fastest_on_gpu(gm: GraphModule) -> GraphModule:
    """The graph of ``mode="max"`` for a graph that this backend lowered, of the same tensors."""
    plan = GraphModule(gm, copy.deepcopy(gm.graph))
    join_projections(plan)
    return plan


class Cuda(Backend):
    """Triton kernels on int8 tensor cores.

    Not ``automatic``: it has run in Triton's interpreter more than on GPUs, and is asked for by name.
    """

    name = "cuda"
    kernels = CUDA_KERNELS
    measured = staticmethod(lower_by_linear_times)
    max_plan = MaxPlan(fastest_on_gpu, {"triton.cudagraphs": True})

    def why_not_on(self, device: torch.device) -> str:
        """Why it does not run on a device, and what to do; empty when it does."""
        return why_not_here(device)

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run, one sentence each; what runs in float is no reason."""
        reasons = unfoldable(plan)
        float8 = any(item.weight is not None and item.weight.float8 for item in plan.values())
        if float8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
            minimum, capability = FLOAT8_CAPABILITY, torch.cuda.get_device_capability()
            reasons.append(f"float8 needs compute capability {minimum} and this GPU has {capability}; use w8a8")
        return reasons

    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
        """Replace layers of a q/dq graph by integer kernels, in place; the rest stays as it is, with the reason."""
        return lower_to_cuda(gm, records)

    def multiplies_integers(self) -> bool:
        """Whether there is a GPU that runs the kernels."""
        return not self.why_not_on(torch.device(self.name))

    def peak_products(self, device: torch.device) -> list[PeakProduct]:
        """int8 products of square matrices that fill a GPU."""
        return gpu_products(device) if device.type == self.name else []

    def examine(self) -> list[Finding]:
        """Whether there is a GPU, and kernels for it."""
        if not torch.cuda.is_available():
            return [Finding(OK, "cuda", "none; not needed")]
        name, why = torch.cuda.get_device_name(), self.why_not_on(torch.device("cuda"))
        if why:
            return [Finding(SLOW, "cuda", f"{name}: no integer kernels here: {why}")]
        return [Finding(OK, "cuda", f"{name}: backend 'cuda' has integer kernels for it")]
