"""Uneven shares of the timesteps: a pilot runs through all of them, then each trajectory gives what is still wanted.

A trajectory is a run of calls from one set of noises. Where the recorder is not told, a timestep that comes again, but
for a call or two in a row, begins the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dmq_ao.config import Selection, SelectMethod
from dmq_ao.samples.select import counts_of, deal, normal_weights, pair_sums, tdac_scores
from dmq_ao.samples.tap import as_features, find_tap, hook_tap

FEATURE_BYTES = 64 << 20


def begins_another(visited: list[int], step: int) -> bool:
    """Whether a call at ``step`` begins another trajectory than the one that ``visited`` these steps."""
    return step in visited[:-1] and step != visited[-1]


class Features:
    """What the pilot saw at the tap, as sums over pairs of steps; holds the features of one trajectory at a time."""

    def __init__(self, denoiser: nn.Module, selection: Selection) -> None:
        """Of a denoiser about to be sampled."""
        self._denoiser, self._tap = denoiser, selection.tap
        self._selection = selection
        self._handle: RemovableHandle | None = None
        self._now: dict[int, Tensor] = {}
        self._step: int | None = None
        self._timestep: int | float = 0
        self._sums: list[Tensor] = []  # squared, elements, angular, positions: [steps, steps] each

    def expect(
        self, step: int, timestep: int | float, rows: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """The tap's next output belongs to ``step``, unless this trajectory had one there; finds the tap first."""
        if self._handle is None:
            self._tap = self._tap or find_tap(self._denoiser, args, kwargs, rows)
            self._handle = hook_tap(self._denoiser, self._tap, self._see)
        self._step, self._timestep = None if step in self._now else step, timestep

    def _see(self, output: Any) -> None:
        if self._step is None:
            return
        rows = len(next(iter(self._now.values()))) if self._now else self._selection.pilot
        features = as_features(output, str(self._tap), rows)
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"{self._tap} gives NaN or infinity at timestep {self._timestep}; check the denoiser's dtype, name"
                " another module with Selection(tap=...), or use select='uniform'"
            )
        self._now[self._step] = features
        self._step = None
        if sum(x.nbytes for x in self._now.values()) > FEATURE_BYTES:
            self._now = {step: x[: max(1, len(x) // 2)].clone() for step, x in self._now.items()}

    def end(self) -> None:
        """The trajectory is over: add its pairs to the sums."""
        self._sums, self._now = self._summed(), {}

    def close(self) -> None:
        """Take the hook off; no more is seen."""
        self.end()
        if self._handle is not None:
            self._handle.remove()
        self._step = None

    def scores(self, steps: int) -> Tensor:
        """TDAC scores [steps], the trajectory under way included.

        Raises:
            ValueError: where the tap gave nothing for some steps.
        """
        sums = self._summed()
        if steps < 2:
            return torch.zeros(steps, dtype=torch.float64)
        count = len(sums[1]) if sums else 0
        others = ~torch.eye(steps, dtype=torch.bool)
        if count != steps or not bool((sums[1][others] > 0).all()):
            raise ValueError(
                f"tap {self._tap} gave features of {count} of {steps} timesteps, or never of all in one trajectory;"
                " name a module that runs in every call with Selection(tap=...), or use select='uniform'"
            )
        squared, elements, angular, positions = sums
        return tdac_scores(squared / elements.clamp_min(1), angular / positions.clamp_min(1), self._selection)

    def _summed(self) -> list[Tensor]:
        if not self._now:
            return self._sums
        present = torch.tensor(sorted(self._now))
        rows = min(len(x) for x in self._now.values())
        features = torch.stack([self._now[int(step)][:rows] for step in present])
        squared, angular = pair_sums(features)
        new = [squared, torch.full_like(squared, features[0].numel()), angular]
        new.append(torch.full_like(squared, features[0, ..., 0].numel()))
        before = len(self._sums[0]) if self._sums else 0
        size = max(before, int(present.max()) + 1)
        sums = []
        for place, pairs in enumerate(new):
            total = torch.zeros(size, size, dtype=torch.float64)
            if before:
                total[:before, :before] = self._sums[place]
            total[present[:, None], present] += pairs
            sums.append(total)
        return sums


class Plan:
    """How many rows of each timestep to hold, and which rows a trajectory gives; for selections that are not uniform.

    Attributes:
        counts: rows of each step; None while the pilot runs.
    """

    def __init__(
        self, denoiser: nn.Module, selection: Selection, num_samples: int, generator: torch.Generator
    ) -> None:
        """A plan for ``num_samples`` rows; ``generator`` draws which trajectory gives what."""
        self.selection, self.num_samples, self._generator = selection, num_samples, generator
        self.features = Features(denoiser, selection) if selection.method is SelectMethod.TDAC else None
        self.counts: list[int] | None = None
        self._shares: list[tuple[int, ...]] | None = None
        self._row_steps: list[tuple[int, ...]] | None = None
        self._visited: list[int] = []
        self._rows = self._pilot_rows = 0

    @property
    def starts(self) -> bool:
        """Whether the next call is the first of a trajectory."""
        return not self._visited

    def begins(self, step: int) -> bool:
        """Whether a call at ``step`` cannot belong to the trajectory under way."""
        return begins_another(self._visited, step)

    def end(self) -> None:
        """The trajectory under way is over."""
        if self.counts is None:
            self._pilot_rows += self._rows
            if self.features is not None:
                self.features.end()
        self._visited, self._rows, self._row_steps = [], 0, None

    def begin(self, rows: int, share: float | None, row_counts: list[int]) -> list[int] | None:
        """A trajectory of ``rows`` rows begins; once the pilot is over, decide the counts.

        Args:
            rows: of its first call.
            share: its part of all trajectories still to run; None where that is not known.
            row_counts: rows held of each step.

        Returns:
            How many rows to keep of those of the pilot, where that was decided now.
        """
        self._rows = rows
        pilot_counts = None
        left = None if share is None else max(rows, round(rows / share))
        if self.counts is None and self._pilot_rows >= self.selection.pilot:
            pilot_counts = self._decide(row_counts, left)
        if self.counts is not None and self._shares is not None:
            self._row_steps = self._take(rows)
        return pilot_counts

    def _decide(self, row_counts: list[int], left: int | None) -> list[int]:
        maximum = None if left is None else [count + left for count in row_counts]
        self.counts = counts_of(self.weights(len(row_counts)), self.num_samples, self.selection, maximum)
        if self.features is not None:
            self.features.close()
        if left is None:
            return self.counts
        # Trajectories of the pilot give no more than the others, unless these are too few.
        part = self._pilot_rows / (self._pilot_rows + left)
        pilot_counts = [
            max(min(n, round(count * part)), count - left) for n, count in zip(row_counts, self.counts, strict=True)
        ]
        need = [max(0, count - n) for n, count in zip(pilot_counts, self.counts, strict=True)]
        self._shares = deal([min(count, left) for count in need], left)
        return pilot_counts

    def _take(self, rows: int) -> list[tuple[int, ...]]:
        """The share of ``rows`` trajectories that run together: neighbours on the list, from a place drawn."""
        assert self._shares is not None
        start = int(torch.randint(max(1, len(self._shares) - rows + 1), (), generator=self._generator))
        shares, self._shares = self._shares[start : start + rows], self._shares[:start] + self._shares[start + rows :]
        # In any order: the halves of a guided batch must not differ in how late their steps are.
        shares += [()] * (rows - len(shares))
        return [shares[int(place)] for place in torch.randperm(rows, generator=self._generator)]

    def visit(self, step: int) -> list[int] | None:
        """A call at ``step``: the rows of the batch that are wanted of it; None for as many as fit."""
        again = step in self._visited
        self._visited.append(step)
        if self._row_steps is None:
            return None
        return [] if again else [row for row, steps in enumerate(self._row_steps) if step in steps]

    def enough(self) -> bool:
        """Whether the trajectory under way has given all it is to give."""
        return self._row_steps is not None and not {s for steps in self._row_steps for s in steps} - set(self._visited)

    def weights(self, steps: int) -> Tensor:
        """Weight of each step, [steps], by what was seen so far."""
        if self.features is not None:
            return self.features.scores(steps)
        return normal_weights(steps, self.selection.mean, self.selection.deviation)
