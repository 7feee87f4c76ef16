"""The range of what was seen: smallest and largest value."""

import torch
from torch import Tensor


class MinMax:
    """Running minimum and maximum of a stream, zero included."""

    def __init__(self) -> None:
        """Start clean: the empty range [0, 0]."""
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> None:
        """See one tensor [...] of any shape; float."""
        low, high = torch.aminmax(x.detach())
        self.low = torch.minimum(self.low, low.float().cpu())
        self.high = torch.maximum(self.high, high.float().cpu())

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, scalars [] float32; the width does not matter here."""
        del bits
        return self.low, self.high

    def state(self) -> dict[str, Tensor]:
        """``low`` and ``high``, scalars [] float32."""
        return {"low": self.low, "high": self.high}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned: scalars []."""
        self.low, self.high = state["low"], state["high"]

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Range of each row of ``rows`` [rows, values]; returns low and high [rows]."""
        del bits, symmetric
        low, high = torch.aminmax(rows, dim=1)
        return low, high
