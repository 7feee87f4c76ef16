"""The range rule of the published code: a moving average of batch extremes (DMQ reference; kept for comparison).

It covers less than the true extremes and depends on the batch size; use ``minmax`` or ``mse`` for anything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmq_ao.observers.minmax import MinMax

MOMENTUM = 0.95


class MovingAverage:
    """Smallest and largest value of each batch, averaged with momentum 0.95; the first batch starts it."""

    def __init__(self) -> None:
        """Start clean."""
        self.ends = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        """See one batch [...]; float."""
        ends = torch.stack(torch.aminmax(x.detach().float())).cpu()
        self.ends = ends if not len(self.ends) else MOMENTUM * self.ends + (1 - MOMENTUM) * ends

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Averages of the extremes, scalars [] float32, zero included; the same for any width."""
        del bits
        if not len(self.ends):
            return torch.zeros(()), torch.zeros(())
        return self.ends[0].clamp(max=0), self.ends[1].clamp(min=0)

    def state(self) -> dict[str, Tensor]:
        """The averages so far: ``ends`` [2], or [0] before the first batch."""
        return {"ends": self.ends}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned: ``ends`` [2]."""
        self.ends = state["ends"]

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Extremes [rows] of ``rows`` [rows, values]: a weight has no batches."""
        return MinMax.weight_range(rows, bits, symmetric)
