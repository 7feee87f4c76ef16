"""Rounding in closed form: the error of a rounded weight is fed back into the weights not rounded yet.

For a weight row ``w`` and inputs with second moments ``H = L L^T``, the error of the output is ``|(w - w_hat) L|^2``.
Going from the last column to the first, each column is rounded where it best cancels what the columns after it left:
``w_i + sum_{j > i} (w_j - w_hat_j) L_ji / L_ii``. This is GPTQ (arXiv 2210.17323, section 3) in opposite order of
columns, and needs no inverse of ``H`` (arXiv 2507.18553).
"""

import torch
from torch import Tensor

from dmq_ao import numerics

BLOCK = 128
# Four to this power is far above one over the precision of any dtype.
_ATTEMPTS = 40


def damp(moments: Tensor, damping: float, least: float = 0.0) -> Tensor:
    """Add ``damping`` times the mean diagonal, or ``least``, to the diagonal of ``moments`` [K, K], in place.

    Columns never seen then keep their weights, and all factors exist.
    """
    diagonal = moments.diagonal()
    added = (damping * diagonal.mean()).clamp_min(least)
    diagonal += torch.where(added > 0, added, 1.0)
    return moments


def factor(moments: Tensor) -> Tensor:
    """Lower triangular ``L`` [K, K] with ``L L^T = moments``; where rounding left no such factor, of more damped ones.

    Args:
        moments: [K, K] symmetric, finite; its diagonal is raised in place until there is a factor.

    Raises:
        ValueError: for moments that are NaN or infinite.
    """
    more = float(moments.diagonal().abs().mean()) * torch.finfo(moments.dtype).eps or 1.0
    for _ in range(_ATTEMPTS):
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed):
            return lower
        moments.diagonal().add_(more)
        more *= 4
    raise ValueError("second moments are NaN or infinite; check the inputs that they are of")


def round_with_feedback(
    weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, symmetric: bool
) -> Tensor:
    """Codes of ``weight`` that keep the layer's output, not the weight, close.

    Args:
        weight: [out, K] float.
        moments: [K, K] positive definite second moments of the layer's input, in the dtype to compute in.
        scale: [out, groups] float32; groups run over K.
        zero_point: [out, groups] int32.
        bits: width of a code, or [out] of each row's.
        symmetric: signed codes.

    Returns:
        codes [out, K] int32.
    """
    order = moments.diagonal().argsort(stable=True)  # the columns that count most are rounded first, from the end
    lower = factor(moments[order[:, None], order])
    groups = (order // (weight.shape[1] // scale.shape[1])).tolist()
    columns = weight.to(moments.dtype)[:, order]
    limits = numerics.RowLimits.of(bits, symmetric, columns[:, 0])
    codes = torch.empty_like(columns, dtype=torch.int32)
    carry = torch.zeros_like(columns)
    for stop in range(columns.shape[1], 0, -BLOCK):
        start = max(0, stop - BLOCK)
        errors = torch.empty_like(columns[:, start:stop])
        for i in range(stop - 1, start - 1, -1):
            step, zero = scale[:, groups[i]], zero_point[:, groups[i]]
            code = numerics.quantize_rows(columns[:, i] + carry[:, i] / lower[i, i], step, zero, limits)
            codes[:, i] = code.to(torch.int32)
            error = columns[:, i] - numerics.dequantize_affine(code, step, zero)
            errors[:, i - start] = error
            carry[:, start:i] += error[:, None] * lower[i, start:i]
        carry[:, :start] += errors @ lower[start:stop, :start]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
