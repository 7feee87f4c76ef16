"""The range that holds all but a small share of what was seen on either side."""

import torch
from torch import Tensor

from dmq_ao.observers.histogram import Histogram

SHARE = 0.9999


class Percentile(Histogram):
    """The central 99.99 % of the stream: one hundredth of a percent may be clipped, half on each side."""

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest value inside, scalars [] float32, never outside what was seen."""
        del bits
        total = self.counts.sum()
        below = self.counts.cumsum(0).double() / total.clamp_min(1)
        tail = (1 - SHARE) / 2
        half = self.centres()[1] - self.centres()[0]
        first = torch.searchsorted(below, torch.tensor(tail, dtype=below.dtype), right=True).clamp(max=len(below) - 1)
        last = torch.searchsorted(below, torch.tensor(1 - tail, dtype=below.dtype)).clamp(max=len(below) - 1)
        low = (self.centres()[first] - half / 2).float()
        high = (self.centres()[last] + half / 2).float()
        return torch.maximum(low, self.low).clamp(max=0), torch.minimum(high, self.high).clamp(min=0)

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Range of each row of ``rows`` [rows, values]; returns low and high [rows]."""
        del bits, symmetric
        tail = (1 - SHARE) / 2
        shares = torch.tensor([tail, 1 - tail], device=rows.device)
        # torch.quantile refuses more than 16 million values at once.
        size = max(1, 2**24 // rows.shape[1])
        low, high = torch.cat([torch.quantile(part.float(), shares, dim=1) for part in rows.split(size)], dim=1)
        return low, high
