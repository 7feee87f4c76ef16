"""One range per timestep, or one for all: any range estimator as the rows of a table.

Ranges of their own for each denoising step are TFMQ-DM's, and DMQ (arXiv 2507.12933) keeps them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dmq_ao import numerics


class RangeEstimator(Protocol):
    """What ``MinMax``, ``MSE`` and ``Percentile`` have in common."""

    def update(self, x: Tensor) -> None:
        """See one tensor [...] of any shape."""

    def range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest value to represent with ``bits`` bits; scalars [] float32."""

    def state(self) -> dict[str, Tensor]:
        """Statistics of what was seen: tensors [...] by name."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned: tensors [...] by name."""

    @staticmethod
    def weight_range(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Low and high [rows] of a weight ``rows`` [rows, values]."""


class RangeTable:
    """An estimator per timestep. Without timesteps, the table has one row."""

    def __init__(self, estimator: type[RangeEstimator], per_step: bool) -> None:
        """Start clean."""
        self.estimator, self.per_step = estimator, per_step
        self.rows: dict[float, RangeEstimator] = {}

    def update(self, x: Tensor, timestep: Tensor | None) -> None:
        """See a batch ``x`` [B, ...] at ``timestep`` [B] (ignored by a table of one row)."""
        if not self.per_step:
            self._row(0.0).update(x)
            return
        assert timestep is not None
        timestep = timestep.reshape(-1).expand(len(x))
        for value in timestep.unique():
            self._row(float(value)).update(x[timestep == value])

    def _row(self, key: float) -> RangeEstimator:
        if key not in self.rows:
            self.rows[key] = self.estimator()
        return self.rows[key]

    def timesteps(self) -> Tensor | None:
        """[rows] float32, descending; None for a table of one row."""
        return torch.tensor(sorted(self.rows, reverse=True)) if self.per_step else None

    def qparams(self, bits: int, float8: bool = False) -> tuple[Tensor, Tensor]:
        """``scale`` [rows] float32 and ``zero_point`` [rows] int32, in the order of ``timesteps``."""
        ranges = [self.rows[key].range(bits) for key in sorted(self.rows, reverse=True)]
        low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        if float8:
            return numerics.float8_qparams(low, high)
        return numerics.choose_qparams(low, high, bits, symmetric=False)

    def state(self) -> dict[str, Tensor]:
        """Statistics of every row: tensors [...] by timestep and name."""
        return {f"{key}/{name}": value for key, row in self.rows.items() for name, value in row.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned: tensors [...] by timestep and name."""
        rows: dict[float, dict[str, Tensor]] = {}
        for path, value in state.items():
            key, _, name = path.partition("/")
            rows.setdefault(float(key), {})[name] = value
        self.rows = {}
        for row, tensors in rows.items():
            self._row(row).load_state(tensors)
