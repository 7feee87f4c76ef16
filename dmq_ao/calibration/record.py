"""Recording what a sampling loop gives its denoiser: a hook that keeps an even share of every timestep."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.calibration.samples import SHARED_TYPES, CalibrationSet, Shared, describe, layout, take
from dmq_ao.config import MissingStatistics
from dmq_ao.graph import TIMESTEP_NAMES, find_timestep, flatten_inputs


@dataclass(eq=False)
class _Row:
    step: int
    priority: float
    position: int  # in the batch it came with
    inputs: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Holds an even share of the rows of every timestep seen; made by ``record``, which says what the arguments mean.

    Each row draws a random priority. A timestep keeps its lowest ones, up to an equal share of ``num_samples`` that
    shrinks as further timesteps appear; where these outnumber the samples, one row each competes for a place.

    Attributes:
        num_calls: calls of the denoiser seen so far.
    """

    def __init__(self, denoiser: nn.Module, num_samples: int, seed: int, timestep_arg: str | None) -> None:
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
            self._timestep_arg = _timestep_name(parameters, timestep_arg)
        self._steps: dict[int | float, int] = {}
        self._rows: list[_Row] = []
        self._shared: dict[str, Shared] = {}
        self._layouts: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode(False)
    def calibration_set(self) -> CalibrationSet:
        """The rows held, ordered by step and then by priority.

        Raises:
            MissingStatistics: when the denoiser was not called.
        """
        if self._timestep_arg is None or not self._rows:
            raise MissingStatistics(
                "the recorder saw no call of the denoiser: run the sampling loop inside `with dmq_ao.record(denoiser)"
                " as recorder:`, on that very module, before torch.compile"
            )
        rows = sorted(self._rows, key=lambda row: (row.step, row.priority))
        inputs = {name: torch.stack([row.inputs[name] for row in rows]) for name in rows[0].inputs}
        step = torch.tensor([row.step for row in rows], device="cpu")
        dtype = torch.float32 if any(isinstance(timestep, float) for timestep in self._steps) else torch.int64
        visited = torch.tensor(list(self._steps), dtype=dtype, device="cpu")
        return CalibrationSet(inputs, dict(self._shared), visited[step], step, self._timestep_arg, visited)

    # Outside of inference mode, so that what is kept can be used under autograd later.
    @torch.inference_mode(False)
    def _observe(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _named_arguments(self._signature, args, kwargs)
        self._timestep_arg = _timestep_name(arguments, self._timestep_arg)
        timestep = arguments.pop(self._timestep_arg)
        inputs, shared = _by_batch(_flat(arguments), known_shared=self._shared)
        timesteps = _per_row(self._timestep_arg, timestep, batch=len(next(iter(inputs.values()))))
        self._check_like_before(inputs, shared)
        self.num_calls += 1
        self._thin([self._steps.setdefault(timestep, len(self._steps)) for timestep in timesteps])
        self._copy(inputs)

    def _check_like_before(self, inputs: Mapping[str, Tensor], shared: Mapping[str, Shared]) -> None:
        layouts = {name: layout(value, per_row=name in inputs) for name, value in {**inputs, **shared}.items()}
        if not self._layouts:
            self._layouts = layouts
            self._shared = {name: _own(value) for name, value in shared.items()}
        call = f"call {self.num_calls + 1} of the denoiser"
        if layouts.keys() != self._layouts.keys():
            raise ValueError(
                f"{call} has the arguments {sorted(layouts)}, earlier ones {sorted(self._layouts)}; record loops that"
                " pass different arguments separately"
            )
        for name, now in layouts.items():
            if now != self._layouts[name]:
                raise ValueError(
                    f"{name} is {now} in {call}, and was {self._layouts[name]} in earlier ones; record one"
                    " resolution, one prompt length and one dtype at a time"
                )
        for name, value in shared.items():
            if not _same(value, self._shared[name]):
                raise ValueError(
                    f"{name} has no batch axis, so it must stay the same, but {call} changed it from"
                    f" {describe(self._shared[name])} to {describe(value)}; pass it as a tensor [batch, ...], or"
                    " record one value at a time"
                )

    def _thin(self, steps: list[int]) -> None:
        priorities = torch.rand(len(steps), generator=self._generator, dtype=torch.float64, device="cpu").tolist()
        new = [_Row(step, priority, i) for i, (step, priority) in enumerate(zip(steps, priorities, strict=True))]
        rows = sorted(self._rows + new, key=lambda row: (row.step, row.priority))
        kept = [
            row
            for step, group in itertools.groupby(rows, key=lambda row: row.step)
            for row in itertools.islice(group, _quota(step, len(self._steps), self._num_samples))
        ]
        self._rows = sorted(kept, key=lambda row: row.priority)[: self._num_samples]

    def _copy(self, inputs: Mapping[str, Tensor]) -> None:
        new = [row for row in self._rows if not row.inputs]
        index = torch.tensor([row.position for row in new], dtype=torch.int64, device="cpu")
        for name, value in inputs.items():
            for row, kept in zip(new, take(value.detach(), index).cpu(), strict=True):
                row.inputs[name] = kept.clone()  # a row dropped later gives its memory back


@contextmanager
def record(
    denoiser: nn.Module, num_samples: int = 256, seed: int = 0, timestep_arg: str | None = None
) -> Iterator[Recorder]:
    """Record what ``denoiser`` is given by whatever sampling loop runs inside the ``with``.

    Args:
        denoiser: any module with a timestep among its arguments, called by position or keyword.
        num_samples: the most rows to hold, spread evenly over the timesteps.
        seed: decides which rows; the same seed and loop give the same bytes.
        timestep_arg: name of the timestep, when it is not ``timestep``, ``timesteps`` or ``t``.

    Yields:
        A ``Recorder``; its ``calibration_set()`` is what was recorded. Tensors are copied to the CPU.

    Raises:
        TypeError: for a denoiser that is no module, or arguments that cannot be recorded.
        ValueError: for ``num_samples`` below 1, a timestep that is not found, or calls that do not go together.
    """
    recorder = Recorder(denoiser, num_samples, seed, timestep_arg)
    handle = denoiser.register_forward_pre_hook(recorder._observe, with_kwargs=True)
    try:
        yield recorder
    finally:
        handle.remove()


def _quota(step: int, num_steps: int, num_samples: int) -> int:
    # ceil((num_samples - step) / num_steps): sums to num_samples, and never grows with num_steps, so that what was
    # dropped is never missed.
    return max(1, (num_samples - step + num_steps - 1) // num_steps)


def _named_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ValueError(
                f"{len(value)} positional arguments of the denoiser have no name (forward{signature}); call it by"
                " keyword, and record before torch.compile"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= value
        elif not (value is None and parameter.default is None):
            arguments[name] = value
    arguments.pop("return_dict", None)
    return arguments


def _timestep_name(names: Iterable[str], timestep_arg: str | None) -> str:
    name = find_timestep(list(names), timestep_arg)
    if name is None:
        raise ValueError(
            f"none of the denoiser's arguments {list(names)} is a timestep ({', '.join(TIMESTEP_NAMES)}); say which"
            " it is with timestep_arg="
        )
    return name


def _flat(arguments: Mapping[str, Any]) -> dict[str, Shared]:
    flat = flatten_inputs(arguments)
    for name, value in flat.items():
        if not isinstance(value, SHARED_TYPES):
            raise TypeError(
                f"{name} is a {type(value).__name__}; a recording holds tensors, int, float, bool, str, None, and"
                " dicts or lists of those. Wrap the denoiser in a module that makes it from one of these"
            )
    return flat


def _by_batch(
    flat: Mapping[str, Shared], known_shared: Mapping[str, Shared]
) -> tuple[dict[str, Tensor], dict[str, Shared]]:
    tensors = {name: x for name, x in flat.items() if isinstance(x, Tensor) and x.ndim and name not in known_shared}
    batch = next((len(x) for x in tensors.values() if x.is_floating_point() and x.ndim >= 2), None)
    if batch is None:
        raise ValueError(
            "the denoiser was called without a floating tensor [batch, ...] besides the timestep; got"
            f" { {name: describe(value) for name, value in flat.items()} }"
        )
    inputs = {name: x for name, x in tensors.items() if len(x) == batch}
    return inputs, {name: value for name, value in flat.items() if name not in inputs}


def _per_row(name: str, timestep: Any, batch: int) -> list[int | float]:
    value = torch.as_tensor(timestep).detach().cpu()
    if list(value.shape) not in ([], [1], [batch]):
        raise ValueError(
            f"{name} must be a number or a tensor [], [1] or [{batch}], one value for each of the {batch} rows; got"
            f" {describe(value)}"
        )
    value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
    values: list[int | float] = value.expand(batch).tolist()
    return values


def _own(value: Shared) -> Shared:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _same(value: Shared, known: Shared) -> bool:
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        return torch.equal(value.detach().cpu(), known)
    return value == known
