"""AdaRound's regulariser: it drives soft roundings to 0 or 1 (arXiv 2004.10568, eq. 24)."""

from torch import Tensor


def rounding_regularizer(soft: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1| ** beta)`` over all soft roundings ``h`` [...] in 0..1; 0 when all are hard."""
    total: Tensor = (1 - (2 * soft - 1).abs().pow(beta)).sum()
    return total


def temperature(step: int, steps: int, warmup: float, start: float = 20.0, stop: float = 2.0) -> float:
    """Exponent ``beta`` at ``step`` of ``steps``: ``start`` until ``warmup * steps``, then linear down to ``stop``.

    >>> [temperature(step, 100, 0.2) for step in (0, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]
    """
    begin = warmup * steps
    share = 1 - (step - begin) / (steps - begin)
    return stop + (start - stop) * min(1.0, max(0.0, share))
