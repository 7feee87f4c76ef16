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


class MSE(Histogram):
    """Range of least error ``|x_hat - x| ** 2.4`` among 80 shrinks of min and max, on a histogram of the stream."""

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Best smallest and largest value for codes of ``bits`` bits; scalars [] float32."""
        used = self.counts > 0
        values, counts = self.centres()[used].float(), self.counts[used]
        lows, highs = self.low * SHRINKS, self.high * SHRINKS
        errors = torch.stack(
            [(_error(values, low, high, bits, False) * counts).sum() for low, high in zip(lows, highs, strict=True)]
        )
        best = int(errors.argmin())
        return lows[best], highs[best]

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Best range of each row of ``rows`` [rows, values]; returns low and high [rows]."""
        low, high = torch.aminmax(rows.float(), dim=1)
        best_error = torch.full_like(low, torch.inf)
        best_low, best_high = low.clone(), high.clone()
        for shrink in SHRINKS:
            error = _error(rows, (low * shrink)[:, None], (high * shrink)[:, None], bits, symmetric).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_low = torch.where(better, low * shrink, best_low)
            best_high = torch.where(better, high * shrink, best_high)
        return best_low, best_high


def _error(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, zero_point = numerics.choose_qparams(low, high, bits, symmetric)
    quant_min, quant_max = numerics.code_range(bits, symmetric)
    return (numerics.fake_quantize(x, scale, zero_point, quant_min, quant_max) - x.float()).abs() ** POWER
