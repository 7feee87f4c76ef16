"""What the oneDNN operators of this process multiply exactly: ``ONEDNN_MAX_CPU_ISA`` and the CPU decide."""

import pytest
import torch
from torch import Tensor

from dmq_ao.backends.onednn.self_test import WORDS, Sums, sums
from dmq_ao.records import LayerRecord, shifted_codes

EXACT = all(sums(word) is Sums.EXACT for word in WORDS)
"""Whether all codes are multiplied exactly."""
MULTIPLIES = all(sums(word) is not Sums.WRONG for word in WORDS)
"""Whether codes of which any two products fit int16 are."""
needs_exact_sums = pytest.mark.skipif(not EXACT, reason="oneDNN uses no VNNI here: wide codes are multiplied in float")
needs_integers = pytest.mark.skipif(not MULTIPLIES, reason="this PyTorch has no integer kernels that are right")


def random_weight(*shape: int) -> Tensor:
    """int8 codes [shape], up to the widest that any input may meet here."""
    return torch.randint(*((-128, 128) if EXACT else (-64, 65)), shape, dtype=torch.int8)


def two_fit_int16(record: LayerRecord, groups: int = 1) -> bool:
    """Whether all pairs of products of a layer's codes are in int16, found by going over them."""
    assert record.activation is not None
    exponents, weight = record.activation.exponents, record.weight
    widest = weight.bits + (0 if exponents is None else int(exponents.max()))
    folded = exponents if widest <= (8 if weight.symmetric else 7) else None
    rows = shifted_codes(weight, folded, groups)[0].flatten(1).long()
    ends = [0, (1 << min(record.activation.bits, 8)) - 1]
    for row in rows:
        products = torch.stack([row * end for end in ends])  # [2, K]
        pairs = products[:, None, :, None] + products[None, :, None, :]  # [2, 2, K, K]
        others = ~torch.eye(len(row), dtype=torch.bool) if len(row) > 1 else torch.ones(1, 1, dtype=torch.bool)
        both = pairs[:, :, others]
        if int(both.min()) < -(2**15) or int(both.max()) >= 2**15:
            return False
    return True
