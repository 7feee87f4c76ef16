"""Inputs of a denoiser where nobody has samples at hand: to time it, the right shapes will do."""

from __future__ import annotations

import torch
from torch import Tensor

from dmq_ao.graph import Signature


def noise_tensors(signature: Signature, batch_size: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Normal noise in the shapes of the example inputs; ones for whole numbers (labels, masks) and the timestep.

    Args:
        signature: of the denoiser.
        batch_size: rows; None for those of the example inputs.
        seed: of the noise.

    Returns:
        Tensors [B, ...] by dotted argument name, in the graph's order.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = signature.example[signature.batch][0][0]
    inputs = {}
    for name in signature.names:
        shape, dtype = signature.example[name]
        if batch_size is not None and shape and shape[0] == rows:
            shape = (batch_size, *shape[1:])
        value = torch.ones(shape)
        if dtype.is_floating_point and name != signature.timestep:
            value = torch.randn(shape, generator=generator)
        inputs[name] = value.to(dtype)
    return inputs
