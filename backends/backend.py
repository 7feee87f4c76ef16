"""What a backend is: a name, what it can do, and a lowering of the quantize/dequantize graph.

All that the rest of the package asks of a backend is asked here, never by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from dmq_ao.graph.kernels import KernelOperator
from dmq_ao.records import Kernel, LayerPlan, LayerRecord

OK, NOTE, SLOW, BROKEN = "ok", "note", "slow", "broken"

Lowered = tuple[GraphModule, dict[str, Kernel]]
"""A graph made to run on a backend, and the kernel of each layer by name."""
MeasuredLowering = Callable[[GraphModule, Mapping[str, LayerRecord], Sequence[Tensor]], Lowered]
"""As ``Backend.lower``, with inputs of the graph, on which it times kernels to choose among them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was examined. ``level``: ``ok``, ``note``, ``slow`` (works, not at full speed) or ``broken``."""

    level: str
    subject: str
    text: str


@dataclass(frozen=True)
class MaxPlan:
    """The plan of ``dmq_ao.compile(mode="max")`` on a backend.

    Attributes:
        rewrite: the fastest graph that means what a lowered one means, of the same tensors; that one stays as it is.
        options: of ``torch.compile``, that the plan wants.
    """

    rewrite: Callable[[GraphModule], GraphModule]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PeakProduct:
    """A large integer product by which the peak of a machine is measured: a call, and its multiply-accumulates."""

    call: Callable[[], object]
    macs: int


class Backend(ABC):
    """A backend; the defaults are those of one without kernels.

    Attributes:
        name: by which users ask for it.
        automatic: whether ``"auto"`` may take it.
        keeps_packed: whether it runs codes that stay packed in memory.
        kernels: the operators that only its graphs hold.
        measured: the lowering that chooses among kernels by the clock; None where there is no choice.
        max_plan: of ``dmq_ao.compile(mode="max")``; None where there is no plan faster than the default.
    """

    name: str
    automatic: bool = False
    keeps_packed: bool = False
    kernels: tuple[KernelOperator, ...] = ()
    measured: MeasuredLowering | None = None
    max_plan: MaxPlan | None = None

    @abstractmethod
    def why_not_on(self, device: torch.device) -> str:
        """Why it does not run on a device, and what to do; empty when it does."""

    @abstractmethod
    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run, one sentence each; what runs slower, or in float, is no reason."""

    @abstractmethod
    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
        """A q/dq graph made to run here, and the kernel of each layer.

        Args:
            gm: the graph, changed in place.
            records: of its layers.
        """

    def multiplies_integers(self) -> bool:
        """Whether integer products run on this machine."""
        return False

    def peak_products(self, device: torch.device) -> list[PeakProduct]:
        """Products on which ``device`` does well; empty where it has none of integers."""
        del device
        return []

    def examine(self) -> list[Finding]:
        """What this machine has of what the backend wants, for ``dmq-ao doctor``."""
        return []
