"""The backends by name, and the choice of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dmq_ao.backends import AUTO, NAMES
from dmq_ao.backends.backend import Backend
from dmq_ao.backends.cuda.backend import Cuda
from dmq_ao.backends.onednn.backend import OneDNN
from dmq_ao.backends.reference import Reference
from dmq_ao.config import UnsupportedByBackend
from dmq_ao.records import LayerPlan

ALL_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (OneDNN(), Cuda(), Reference())}
assert tuple(ALL_BACKENDS) == NAMES


def choose_backend(
    name: str,
    device: torch.device,
    plan: Mapping[str, LayerPlan],
    packed: bool = False,
    latency_aware: bool = False,
) -> Backend:
    """The backend called ``name``; ``"auto"`` takes the first that runs ``plan`` on ``device`` and may be taken.

    Args:
        name: of a backend, or ``"auto"``.
        device: where the denoiser is.
        plan: what the recipe does with each layer.
        packed: whether 4-bit codes are to stay packed in memory, which only backends that ``keeps_packed`` do.
        latency_aware: whether kernels are to be chosen by the clock, which only backends with ``measured`` do.

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
    backend = _first_that_runs(device, plan) if name == AUTO else _named(name, device, plan)
    where = f"this denoiser on {device} would run on {backend.name!r}"
    if packed and not backend.keeps_packed:
        able = sorted(one.name for one in ALL_BACKENDS.values() if one.keeps_packed)
        raise ValueError(
            f"packed=True keeps codes packed on the backends {able}, and {where}; leave packed out, or use a recipe"
            " and a device that such a backend takes"
        )
    if latency_aware and backend.measured is None:
        able = sorted(one.name for one in ALL_BACKENDS.values() if one.measured is not None)
        raise ValueError(
            f"latency_aware=True chooses among kernels of the backends {able}, and {where}; leave latency_aware out,"
            " or use a recipe and a device that such a backend takes"
        )
    return backend


def _first_that_runs(device: torch.device, plan: Mapping[str, LayerPlan]) -> Backend:
    """The first backend that may be taken unasked and runs; the last of all runs everything everywhere."""
    automatic = (one for one in ALL_BACKENDS.values() if one.automatic)
    return next(one for one in automatic if not one.why_not_on(device) and not one.unsupported(plan))


def _named(name: str, device: torch.device, plan: Mapping[str, LayerPlan]) -> Backend:
    if name not in ALL_BACKENDS:
        raise ValueError(f"backend {name!r} is not known; the backends are {[AUTO, *ALL_BACKENDS]}")
    backend = ALL_BACKENDS[name]
    why = backend.why_not_on(device)
    if why:
        raise ValueError(f"backend {name!r} is unavailable: {why}, or use 'reference'")
    reasons = backend.unsupported(plan)
    if reasons:
        raise UnsupportedByBackend(name, reasons)
    return backend
