"""Products by which the int8 peak of a GPU is measured: PyTorch's own, of square matrices."""

from __future__ import annotations

from functools import partial

import torch

from dmq_ao.backends.backend import PeakProduct
from dmq_ao.backends.products import random_codes
from dmq_ao.graph.private import int_mm

PEAK_SIZES = (4096, 8192)


def gpu_products(device: torch.device) -> list[PeakProduct]:
    """Calls on a device, over sizes that fill it."""
    products = []
    for size in PEAK_SIZES:
        left, right = (random_codes(torch.int8, size, size).to(device) for _ in range(2))
        call = partial(int_mm, left, right.T)  # the right one by columns, as tensor cores want it
        products.append(PeakProduct(call, size**3))
    return products
