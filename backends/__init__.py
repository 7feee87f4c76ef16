"""How a quantized graph runs on a device. ``ALL_BACKENDS`` names them; ``choose`` picks one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch.fx import GraphModule

from dmq_ao.backends.cuda import measured as cuda_measured
from dmq_ao.backends.cuda.backend import Cuda
from dmq_ao.backends.onednn import measured as onednn_measured
from dmq_ao.backends.onednn.backend import OneDNN
from dmq_ao.backends.reference import Reference
from dmq_ao.config import UnsupportedByBackend
from dmq_ao.records import Kernel, LayerPlan, LayerRecord


class Backend(Protocol):
    """What a backend is: a name, reasons against a plan, and a lowering of the q/dq graph."""

    name: str

    def why_not_on(self, device: torch.device) -> str:
        """Why it does not run on a device, and what to do; empty when it does."""

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run here; empty when it can."""

    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> tuple[GraphModule, dict[str, Kernel]]:
        """A q/dq graph made to run here, and the kernel of each layer."""


# The lowering that chooses among kernels by the clock, where there is a choice.
MEASURED = {"onednn": onednn_measured.lower, "cuda": cuda_measured.lower}
ALL_BACKENDS: dict[str, Backend] = {"reference": Reference(), "onednn": OneDNN(), "cuda": Cuda()}


def choose(
    name: str,
    device: torch.device,
    plan: Mapping[str, LayerPlan],
    packed: bool = False,
    latency_aware: bool = False,
) -> Backend:
    """The backend called ``name``; ``"auto"`` takes oneDNN's integer kernels on a CPU if they can run ``plan``.

    Args:
        name: of a backend, or ``"auto"``.
        device: where the denoiser is.
        plan: what the recipe does with each layer.
        packed: whether 4-bit codes are to stay packed in memory, which only ``"onednn"`` does.
        latency_aware: whether its kernels are to be chosen by the clock, among those of a backend in ``MEASURED``.

    Raises:
        ValueError: for an unknown name, a backend of another device, one that does not keep codes packed or has no
            choice of kernels, or for both wishes at once.
        UnsupportedByBackend: with the reasons, when the named backend cannot run the plan.
    """
    if packed and latency_aware:
        raise ValueError(
            "packed=True saves memory at the cost of time, and latency_aware=True saves time and keeps some weights in"
            " float for it; leave one of them out"
        )
    backend = _choose(name, device, plan)
    if packed and backend.name != "onednn":
        raise ValueError(
            f"packed=True keeps codes packed on the 'onednn' backend only, and this denoiser on {device} would run on"
            f" {backend.name!r}; leave packed out, or use a recipe that backend='onednn' takes, on a CPU"
        )
    if latency_aware and backend.name not in MEASURED:
        raise ValueError(
            f"latency_aware=True chooses among kernels of the backends {sorted(MEASURED)}, and this denoiser on"
            f" {device} would run on {backend.name!r}; leave latency_aware out, or use a recipe and a device that such"
            " a backend takes"
        )
    return backend


def _choose(name: str, device: torch.device, plan: Mapping[str, LayerPlan]) -> Backend:
    if name == "auto":
        # Not yet "cuda", which has run in Triton's interpreter but on no GPU: it is asked for by name.
        integer = ALL_BACKENDS["onednn"]
        runs = not integer.why_not_on(device) and not integer.unsupported(plan)
        return integer if runs else ALL_BACKENDS["reference"]
    if name not in ALL_BACKENDS:
        raise ValueError(f"backend {name!r} is not known; the backends are {['auto', *ALL_BACKENDS]}")
    backend = ALL_BACKENDS[name]
    why = backend.why_not_on(device)
    if why:
        raise ValueError(f"backend {name!r} does not run here: {why}, or use 'reference'")
    reasons = backend.unsupported(plan)
    if reasons:
        raise UnsupportedByBackend(name, reasons)
    return backend


__all__ = ["ALL_BACKENDS", "MEASURED", "Backend", "Cuda", "OneDNN", "Reference", "choose"]
