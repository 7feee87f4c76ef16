"""What codes add to the mean of a layer's output, taken out of its bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmq_ao.algorithms.moments import Moments
from dmq_ao.records import WeightRecord


def own_correction(weight: Tensor, record: WeightRecord, moments: Sequence[Moments]) -> Tensor:
    """What takes the mean error of the codes themselves out of the output: [out]."""
    difference = (record.dequantize() - weight).flatten(1).chunk(len(moments))
    return -torch.cat([part @ one.mean_x().to(part.dtype) for part, one in zip(difference, moments, strict=True)])


def correction(weight: Tensor, record: WeightRecord, moments: Sequence[Moments]) -> Tensor:
    """What to add to the bias so that the mean output is the teacher's: [out], weighted as the moments are."""
    return torch.cat([one.mean_r() for one in moments]).float() + own_correction(weight, record, moments)
