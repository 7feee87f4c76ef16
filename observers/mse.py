"""The range whose quantization error is smallest: shrink min and max together and keep the best.

80 shrinks of 1 % each and errors to the power of 2.4, as in the published code of DMQ (arXiv 2507.12933) and MPQ-DM
(arXiv 2412.11549).
"""

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.observers.histogram import Histogram

SHRINKS = 1 - 0.01 * torch.arange(80)
POWER = 2.4
# Values of rows, times shrinks, that are tried together: on a CPU they stay in the cache, elsewhere calls cost more.
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 17, 1 << 24


class MSE(Histogram):
    """Range of least error ``|x_hat - x| ** 2.4`` among 80 shrinks of min and max, on a histogram of the stream."""

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Best smallest and largest value for codes of ``bits`` bits; scalars [] float32."""
        used = self.counts > 0
        values, counts = self.centres()[used].float(), self.counts[used]
        shrinks = SHRINKS.to(values.device)
        lows, highs = self.low * shrinks, self.high * shrinks
        errors = (_error(values, lows[:, None], highs[:, None], bits, False) * counts).sum(1)
        best = int(errors.argmin())
        return lows[best], highs[best]

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Best range of each row of ``rows`` [rows, values]; returns low and high [rows]."""
        low, high = torch.aminmax(rows.float(), dim=1)
        some = max(1, _at_once(rows) // rows.shape[1])
        parts = zip(rows.split(some), low.split(some), high.split(some), strict=True)
        best = torch.cat([_best_shrink(*part, bits, symmetric) for part in parts])
        return low * best, high * best


def _at_once(rows: Tensor) -> int:
    return AT_ONCE if rows.device.type == "cpu" else AT_ONCE_ELSEWHERE


def _best_shrink(rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """[rows] the shrink of ``low`` to ``high`` [rows] of least error for ``rows`` [rows, values]; the first of two."""
    best_error, best = torch.full_like(low, torch.inf), torch.ones_like(low)
    for shrinks in SHRINKS.to(rows.device).split(max(1, _at_once(rows) // rows.numel())):
        lows, highs = low * shrinks[:, None], high * shrinks[:, None]
        error = _error(rows, lows[..., None], highs[..., None], bits, symmetric).sum(2)
        least, index = error.nan_to_num(torch.inf, torch.inf).min(0)
        better = least < best_error
        best_error, best = torch.where(better, least, best_error), torch.where(better, shrinks[index], best)
    return best


def _error(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, zero_point = numerics.choose_qparams(low, high, bits, symmetric)
    quant_min, quant_max = numerics.code_range(bits, symmetric)
    return (numerics.fake_quantize(x, scale, zero_point, quant_min, quant_max) - x.float()).abs() ** POWER
