"""Rounding in closed form: the error of a rounded weight is fed back into the weights not rounded yet.

For a weight row ``w`` and inputs with second moments ``H``, rounding column by column and moving the columns that are
left by ``-(w_i - w_hat_i) / U_ii * U_i`` keeps ``(w - w_hat) H (w - w_hat)`` small (Optimal Brain Quantization; GPTQ,
arXiv 2210.17323, section 3, with ``U`` the upper Cholesky factor of the inverse of ``H``).
"""

import torch
from torch import Tensor

from dmq_ao import numerics

BLOCK = 128


def damped(moments: Tensor, damping: float) -> Tensor:
    """``moments`` [K, K] plus ``damping`` times their mean diagonal, so that columns never seen keep their weights."""
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    return moments + torch.eye(len(moments), dtype=moments.dtype) * torch.where(mean > 0, damping * mean, 1.0)


def upper_factor(moments: Tensor) -> Tensor:
    """Upper triangular ``U`` [K, K] with ``U.T @ U`` the inverse of positive definite ``moments`` [K, K]."""
    # inverse = L^-T L^-1; reversing rows and columns twice turns a lower factor of H into the upper one of its inverse
    lower = torch.linalg.cholesky(moments.flip(0, 1))
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return factor


def round_with_feedback(
    weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool
) -> Tensor:
    """Codes of ``weight`` that keep the layer's output, not the weight, close.

    Args:
        weight: [out, K] float.
        moments: [K, K] positive definite second moments of the layer's input, in the dtype to compute in.
        scale: [out, groups] float32; groups run over K.
        zero_point: [out, groups] int32.
        bits: width of a code.
        symmetric: signed codes.

    Returns:
        codes [out, K] int32.
    """
    low, high = numerics.code_range(bits, symmetric)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = upper_factor(moments[order][:, order])
    group = torch.arange(weight.shape[1]) // (weight.shape[1] // scale.shape[1])
    columns = group[order]
    left = weight.to(moments.dtype)[:, order].clone()
    codes = torch.empty_like(left, dtype=torch.int32)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        block, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        for i in range(stop - start):
            at = start + i
            step, zero = scale[:, columns[at]], zero_point[:, columns[at]]
            code = numerics.quantize(block[:, i], step, zero, low, high)
            codes[:, at] = code.to(torch.int32)
            errors[:, i] = (block[:, i] - numerics.dequantize(code, step, zero)) / factor[at, at]
            block[:, i + 1 :] -= errors[:, i, None] * factor[at, at + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return unordered
