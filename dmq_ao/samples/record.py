"""Recording what a sampling loop gives its denoiser: a hook that keeps a share of every timestep."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.config import MissingStatistics, Selection, SelectMethod
from dmq_ao.graph.containers import is_told_by_paths, paths_of
from dmq_ao.samples.calibration_set import CalibrationSet
from dmq_ao.samples.call_arguments import (
    arguments_of_call,
    by_batch,
    flat_arguments,
    residuals_note,
    timestep_name,
    timestep_of_rows,
)
from dmq_ao.samples.quota import Plan
from dmq_ao.samples.select import counts_of
from dmq_ao.samples.shapes import Bucket, CallShapes
from dmq_ao.samples.values import take
from dmq_ao.samples.windows import Row, Windows, too_few_steps


class _Enough(BaseException):
    """The trajectory has given all it is to give; nothing between the denoiser and ``trajectory`` should catch it."""


class Recorder:
    """Holds a share of the rows of every timestep seen; made by ``record``, which says what the arguments mean.

    Each row draws a random priority. A timestep keeps its lowest ones, up to its share of ``num_samples``. Equal
    shares shrink as further timesteps appear; where these outnumber the samples, one row each competes for a place.
    For uneven shares twice as many rows are held until the shares are known. Windows hold whole runs of rows, and all
    rows of the last calls beside.

    Attributes:
        num_calls: calls of the denoiser seen so far.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        num_samples: int,
        seed: int,
        timestep_arg: str | None,
        select: str | Selection = SelectMethod.UNIFORM,
    ) -> None:
        if not isinstance(denoiser, nn.Module):
            raise TypeError(
                f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}; of a diffusers pipeline, pass"
                " pipe.unet or pipe.transformer"
            )
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        self.num_calls = 0
        self._num_samples = num_samples
        self._generator = torch.Generator().manual_seed(seed)
        self._timestep_arg = timestep_arg
        self._signature = inspect.signature(denoiser.forward)
        parameters = self._signature.parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            self._timestep_arg = timestep_name(parameters, timestep_arg)
        self._steps: dict[int | float, int] = {}
        self._rows: list[Row] = []
        self._shapes, self._bucket = CallShapes(), 0  # that of the call under way
        self._nesting: dict[str, Any] | None = None
        selection = _selection(select)
        uneven = selection.method is not SelectMethod.UNIFORM
        self._plan = Plan(denoiser, selection, num_samples, self._generator) if uneven else None
        self._windows = Windows(selection.window, num_samples) if selection.window > 1 else None
        self._inside = False
        self._part: float | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode(False)
    def calibration_set(self) -> CalibrationSet:
        """The rows held, ordered by step and then by priority; calls of several sizes in buckets, the largest first.

        Raises:
            MissingStatistics: when the denoiser was not called.

        Warns:
            UserWarning: where trajectories have fewer steps than a window; for residuals that other calls may lack.
        """
        if self._windows is not None and 0 < self._windows.longest < self._windows.length:
            warnings.warn(too_few_steps(self._windows.length, self._windows.longest), stacklevel=2)
        if self._timestep_arg is None or not self._rows:
            raise MissingStatistics(
                "the recorder saw no call of the denoiser: run the sampling loop inside `with dmq_ao.record(denoiser)"
                " as recorder:`, on that very module, before torch.compile"
            )
        note = residuals_note(name for bucket in self._shapes.buckets.values() for name in bucket.layouts)
        if note is not None:
            warnings.warn(note, stacklevel=2)
        rows = sorted(self._final_rows(), key=lambda row: (row.step, row.priority))
        dtype = torch.float32 if any(isinstance(timestep, float) for timestep in self._steps) else torch.int64
        visited = torch.tensor(list(self._steps), dtype=dtype, device="cpu")
        by_bucket = [(one, [row for row in rows if row.bucket == one.number]) for one in self._shapes.buckets.values()]
        sets = [
            self._set_of(one, own, visited)
            for one, own in sorted(by_bucket, key=lambda pair: -len(pair[1]))  # of equally many the first seen
            if own
        ]
        return sets[0] if len(sets) == 1 else replace(sets[0], others=tuple(sets[1:]))

    def _set_of(self, bucket: Bucket, rows: list[Row], visited: Tensor) -> CalibrationSet:
        """The rows of one bucket."""
        assert self._timestep_arg is not None
        inputs = {name: torch.stack([row.inputs[name] for row in rows]) for name in rows[0].inputs}
        step = torch.tensor([row.step for row in rows], device="cpu")
        trajectory = None
        if self._windows is not None:
            trajectory = torch.tensor([row.trajectory for row in rows], device="cpu")
        nesting = None if is_told_by_paths(self._nesting) else self._nesting
        columns = (inputs, dict(bucket.shared), visited[step], step, self._timestep_arg, visited, trajectory)
        return CalibrationSet(*columns, nesting=nesting)

    @contextmanager
    def trajectory(self, part: float | None = None) -> Iterator[None]:
        """Tell that what runs inside the ``with`` is one trajectory, of one row or of a batch.

        Args:
            part: its part of all that are still to run, itself included: 1 for the last. Where it is given and the
                shares are uneven, the samples are spread over these trajectories, of each timestep the first call
                counts, and a trajectory that has given its part is left early: the ``with`` ends there, as if by
                ``break``. Without it every trajectory runs to its end.

        Raises:
            ValueError: for a ``part`` that is not above 0 and at most 1, or inside another trajectory.
        """
        if part is not None and not 0 < part <= 1:
            raise ValueError(f"part must be above 0 and at most 1, got {part}")
        if self._inside:
            raise ValueError("a trajectory is under way; end its `with` before the next")
        self._end_trajectory()
        self._inside, self._part = True, part
        try:
            yield
        except _Enough:
            pass
        finally:
            self._end_trajectory()
            self._inside, self._part = False, None

    def _end_trajectory(self) -> None:
        for follower in (self._plan, self._windows):
            if follower is not None:
                follower.end()

    def _close(self) -> None:
        if self._plan is not None and self._plan.features is not None:
            self._plan.features.close()

    # Outside of inference mode, so that what is kept can be used under autograd later.
    @torch.inference_mode(False)
    def _observe(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of_call(self._signature, args, kwargs)
        self._timestep_arg = timestep_name(arguments, self._timestep_arg)
        if self._nesting is None:
            self._nesting = paths_of(arguments)
        timestep = arguments.pop(self._timestep_arg)
        inputs, shared = by_batch(flat_arguments(arguments), earlier_shared=self._shapes.shared_names)
        timesteps = timestep_of_rows(self._timestep_arg, timestep, batch=len(next(iter(inputs.values()))))
        self._bucket = self._shapes.place(inputs, shared, f"call {self.num_calls + 1} of the denoiser")
        steps = [self._steps.setdefault(timestep, len(self._steps)) for timestep in timesteps]
        if self._plan is not None:
            self._follow(self._plan, steps, timesteps, args, kwargs)
        elif self._windows is not None:
            self._extend(self._windows, steps)
        else:
            self._offer(steps, range(len(steps)))
        self._copy(inputs)
        self.num_calls += 1

    def _follow(
        self,
        plan: Plan,
        steps: list[int],
        timesteps: list[int | float],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Offer what the plan wants of a call."""
        step, rows = self._only_step(steps), len(steps)
        if not self._inside and plan.begins(step):
            plan.end()
        if plan.starts:
            pilot_counts = plan.begin(rows, self._part, self._row_counts())
            if pilot_counts is not None:
                self._thin(pilot_counts.__getitem__, self._num_samples)
        if plan.enough():
            raise _Enough
        places = plan.visit(step)
        if plan.counts is None and plan.features is not None:
            plan.features.expect(step, timesteps[0], rows, args, kwargs)
        self._offer(steps, range(rows) if places is None else places)

    def _extend(self, windows: Windows, steps: list[int]) -> None:
        """Let the runs that end with a call compete for those held."""
        if not self._inside and windows.begins(self._only_step(steps)):
            windows.end()
        windows.add(self._candidates(steps))
        self._rows = windows.rows()

    def _only_step(self, steps: list[int]) -> int:
        if set(steps) != {steps[0]}:
            raise ValueError(
                f"call {self.num_calls + 1} of the denoiser has rows at {len(set(steps))} timesteps; uneven selection"
                " and windows follow trajectories, which are at one timestep in every call: use select='uniform' for"
                " this loop"
            )
        return steps[0]

    def _row_counts(self) -> list[int]:
        counts = [0] * len(self._steps)
        for row in self._rows:
            counts[row.step] += 1
        return counts

    def _final_rows(self) -> list[Row]:
        """The rows held, or as many of them as were asked for where the pilot was all there was."""
        plan, row_counts = self._plan, self._row_counts()
        if plan is None or plan.counts is not None:
            return self._rows
        counts = counts_of(plan.weights(len(row_counts)), self._num_samples, plan.selection, row_counts)
        return self._lowest(self._rows, counts.__getitem__)

    def _offer(self, steps: list[int], places: Iterable[int]) -> None:
        """Let the rows at ``places`` of a batch compete for those held."""
        rows = self._candidates(steps)
        self._rows += [rows[i] for i in places]
        pilot = self._plan is not None and self._plan.counts is None
        self._thin(self._quota, self._num_samples * (2 if pilot else 1))

    def _candidates(self, steps: list[int]) -> list[Row]:
        """The rows of a call, each with a priority."""
        priorities = torch.rand(len(steps), generator=self._generator, dtype=torch.float64, device="cpu").tolist()
        return [
            Row(step, priority, place, self._bucket)
            for place, (step, priority) in enumerate(zip(steps, priorities, strict=True))
        ]

    def _quota(self, step: int) -> int:
        """The most rows of a step to hold."""
        if self._plan is None:
            return _even_share(step, len(self._steps), self._num_samples)
        counts = self._plan.counts
        if counts is None:
            return _even_share(step, len(self._steps), 2 * self._num_samples)
        return counts[step] if step < len(counts) else self._plan.selection.minimum

    def _thin(self, quota: Callable[[int], int], limit: int) -> None:
        self._rows = sorted(self._lowest(self._rows, quota), key=lambda row: row.priority)[:limit]

    @staticmethod
    def _lowest(rows: list[Row], quota: Callable[[int], int]) -> list[Row]:
        """Of each step the ``quota(step)`` rows of lowest priority."""
        rows = sorted(rows, key=lambda row: (row.step, row.priority))
        return [
            row
            for step, group in itertools.groupby(rows, key=lambda row: row.step)
            for row in itertools.islice(group, quota(step))
        ]

    def _copy(self, inputs: Mapping[str, Tensor]) -> None:
        rows = self._rows if self._windows is None else self._windows.pending()
        new = [row for row in rows if not row.inputs]
        index = torch.tensor([row.position for row in new], dtype=torch.int64, device="cpu")
        for name, value in inputs.items():
            for row, item in zip(new, take(value.detach(), index).cpu(), strict=True):
                row.inputs[name] = item.clone()  # a row dropped later gives its memory back


@contextmanager
def record(
    denoiser: nn.Module,
    num_samples: int = 256,
    seed: int = 0,
    timestep_arg: str | None = None,
    select: str | Selection = SelectMethod.UNIFORM,
) -> Iterator[Recorder]:
    """Record what ``denoiser`` is given by whatever sampling loop runs inside the ``with``.

    Calls of other sizes (resolution, frames, tokens of the prompt) may follow each other: rows are chosen from all of
    them alike, and the set has a bucket of each size.

    Args:
        denoiser: any module with a timestep among its arguments, called by position or keyword.
        num_samples: the most rows to hold, spread over the timesteps.
        seed: decides which rows; the same seed and loop give the same bytes.
        timestep_arg: name of the timestep, when it is not ``timestep``, ``timesteps`` or ``t``.
        select: how the rows are spread: ``"uniform"``, ``"normal"`` or ``"tdac"``, or a ``Selection`` with more to
            say. Uneven shares are decided once ``Selection.pilot`` rows have run through all timesteps; a loop that
            says where its trajectories begin, with ``Recorder.trajectory``, can leave them early from then on. With a
            ``Selection.window`` every row comes with the rows before it, which count among ``num_samples``.

    Yields:
        A ``Recorder``; its ``calibration_set()`` is what was recorded. Tensors are copied to the CPU.

    Raises:
        TypeError: for a denoiser that is no module, or arguments that cannot be recorded.
        ValueError: for ``num_samples`` below 1 or below a window, an unknown selection, a timestep that is not found,
            calls that do not go together, or features that are NaN or infinite.
    """
    recorder = Recorder(denoiser, num_samples, seed, timestep_arg, select)
    handle = denoiser.register_forward_pre_hook(recorder._observe, with_kwargs=True)
    try:
        yield recorder
    finally:
        handle.remove()
        recorder._close()


def _selection(select: str | Selection) -> Selection:
    if isinstance(select, Selection):
        return select
    methods = [method.value for method in SelectMethod]
    if select not in methods:
        raise ValueError(f"select must be one of {methods} or a Selection, got {select!r}")
    return Selection(SelectMethod(select))


def _even_share(step: int, num_steps: int, num_samples: int) -> int:
    # ceil((num_samples - step) / num_steps): sums to num_samples, and never grows with num_steps, so that what was
    # dropped is never missed.
    return max(1, (num_samples - step + num_steps - 1) // num_steps)
