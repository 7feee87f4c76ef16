"""Runs of rows at consecutive steps of one trajectory, for what is smoothed over steps.

A row competes with the rows before it at its side, once it has as many as a run needs: they are kept together or not
at all. A row of several runs is held once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from dmq_ao.samples.quota import begins_another


@dataclass(eq=False)
class Row:
    """One row of a call of the denoiser.

    Attributes:
        step: its place on the list of timesteps.
        priority: drawn; the lowest are kept.
        position: in the batch it came with.
        bucket: number of the shape that it came in.
        trajectory: its number, where trajectories are followed.
        inputs: [...] without a batch axis, by argument name; empty until they are copied.
    """

    step: int
    priority: float
    position: int
    bucket: int = 0
    trajectory: int | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)


class Windows:
    """Which runs are held, and the calls that a next one may go on from.

    Where a timestep is called several times in a row, by guidance or a solver of second order, the first call goes on
    from the first at the step before, the second from the second.

    Attributes:
        length: rows of a run.
        longest: rows of the longest run so far, at most ``length``. Shorter runs are held until there is a longer one:
            a sampler may have fewer steps than a run was to have.
    """

    def __init__(self, length: int, num_samples: int) -> None:
        """Runs of ``length`` rows, of at most ``num_samples`` different rows together.

        Raises:
            ValueError: where not even one run fits.
        """
        if num_samples < length:
            raise ValueError(f"num_samples must be {length} or more to hold a window of {length}, got {num_samples}")
        self.length, self.longest, self._num_samples = length, 0, num_samples
        self._runs: list[tuple[Row, ...]] = []  # newest row first
        self._visited: list[int] = []
        self._again = self._trajectories = 0
        self._calls: dict[int, list[list[Row]]] = {}  # newest first

    def begins(self, step: int) -> bool:
        """Whether a call at ``step`` cannot belong to the trajectory under way."""
        return begins_another(self._visited, step)

    def end(self) -> None:
        """The trajectory under way is over."""
        self._visited, self._calls = [], {}

    def add(self, rows: list[Row]) -> None:
        """The next call of the trajectory, its ``rows`` all at one step."""
        step = rows[0].step
        self._again = self._again + 1 if step in self._visited[-1:] else 0
        self._visited.append(step)
        before = self._calls.get(self._again, [])
        if before and (before[0][0].step != step - 1 or len(before[0]) != len(rows)):
            before = []
        for place, row in enumerate(rows):
            row.trajectory = before[0][place].trajectory if before else self._trajectories + place
        self._trajectories += 0 if before else len(rows)
        calls = [rows, *before]
        if len(calls) > self.longest:
            self.longest, self._runs = len(calls), []
        if len(calls) == self.longest:
            self._runs = self._fitting([*self._runs, *zip(*calls, strict=True)])
        self._calls[self._again] = calls[: self.length - 1]

    def _fitting(self, runs: list[tuple[Row, ...]]) -> list[tuple[Row, ...]]:
        """The runs of lowest priority, from all steps alike, as long as their rows fit."""
        runs = sorted(runs, key=lambda run: (run[0].step, run[0].priority))
        ranked = [
            (rank, run[0].priority, run)
            for _, group in itertools.groupby(runs, key=lambda run: run[0].step)
            for rank, run in enumerate(group)
        ]
        selection, rows = [], set[Row]()
        for _, _, run in sorted(ranked, key=lambda one: one[:2]):
            if len(rows) + sum(row not in rows for row in run) > self._num_samples:
                break
            selection.append(run)
            rows.update(run)
        return selection

    def rows(self) -> list[Row]:
        """All rows of the runs."""
        return list(dict.fromkeys(row for run in self._runs for row in run))

    def pending(self) -> list[Row]:
        """Rows of the trajectory under way that a next call may bring along."""
        return [row for calls in self._calls.values() for call in calls for row in call]


def too_few_steps(window: int, steps: int) -> str:
    """What becomes of windows where no trajectory has as many steps."""
    return (
        f"a window is {window} timesteps in a row, and the denoiser was called at {steps}: windows have {steps} here."
        f" Sample in {window} steps or more for what smooths over steps, or leave it out, with select='uniform' and a"
        " recipe without Relation, such as recipes.default(...)"
    )
