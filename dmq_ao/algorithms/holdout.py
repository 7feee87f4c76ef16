"""Which samples are held out: nothing is fitted to them; they stop the learning and decide what of it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

CHECK_EVERY = 20
HELD_OUT_SHARE = 8


def held_out(count: int, generator: torch.Generator) -> Tensor:
    """[count] bool: one sample in eight, at least one; a single sample is both fitted and held out."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: max(1, count // HELD_OUT_SHARE)]] = True
    return mask


def fitted(holdout: Tensor) -> Tensor:
    """Indices [M] of the samples that may be fitted to, from the mask ``holdout`` [N]."""
    return torch.nonzero(~holdout)[:, 0] if len(holdout) > 1 else torch.arange(1)
