"""A streaming histogram whose result does not depend on the order of what it sees.

Bins are equal parts of [-limit, limit) with ``limit`` a power of two. When a value lies outside, the limit doubles and
pairs of bins merge: the bins of a limit are nested in those of the next, so the final counts are those of one pass
with the final limit.
"""

import math

import torch
from torch import Tensor

BINS = 8192


class Histogram:
    """Counts of a stream of values in nested bins."""

    def __init__(self) -> None:
        """Start clean, with an empty range."""
        self.exponent = -64
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> None:
        """See one tensor [...] of any shape; float."""
        values = x.detach().float().reshape(-1).cpu()
        low, high = torch.aminmax(values)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        largest = float(values.abs().max())
        if largest > 0:
            self._grow(math.floor(math.log2(largest)) + 1)
        # In float64 the scaling is exact, so a value lands in the bin that its bin of a smaller limit merges into.
        index = (values.double() * (BINS // 2 * 2.0**-self.exponent)).floor().long() + BINS // 2
        self.counts = self.counts + torch.bincount(index, minlength=BINS)

    def _grow(self, exponent: int) -> None:
        for _ in range(min(exponent - self.exponent, int(math.log2(BINS)) + 1)):
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (BINS // 4, BINS // 4))
        self.exponent = max(self.exponent, exponent)

    def centres(self) -> Tensor:
        """Middle of each bin [bins], float64."""
        width = 2.0 ** (self.exponent + 1) / BINS
        return (torch.arange(BINS, dtype=torch.float64) - BINS // 2 + 0.5) * width

    def state(self) -> dict[str, Tensor]:
        """``counts`` [bins] int64, and scalars [] ``exponent``, ``low`` and ``high``."""
        return {"exponent": torch.tensor(self.exponent), "counts": self.counts, "low": self.low, "high": self.high}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned: ``counts`` [bins] and scalars."""
        self.exponent, self.counts = int(state["exponent"]), state["counts"]
        self.low, self.high = state["low"], state["high"]
