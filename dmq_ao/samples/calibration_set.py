"""What a denoiser is given while its sampler runs, kept as rows and saved as one safetensors file.

A row is one sample at one timestep; a guided batch of 2B is 2B rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmq_ao.config import InvalidFile
from dmq_ao.graph.arguments import flatten_inputs, nested, unflatten_inputs
from dmq_ao.graph.capture import SAMPLE_NAMES
from dmq_ao.graph.containers import nesting_from_json, nesting_to_json
from dmq_ao.samples.set_file import FIRST_VERSION, FORMAT_VERSION, HEADER, read_set
from dmq_ao.samples.windows import too_few_steps

Shared: TypeAlias = Tensor | int | float | bool | str | None
SHARED_TYPES = (Tensor, int, float, bool, str, type(None))
# What tensors and names that are no calibration set may end in.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError)


@dataclass(frozen=True, eq=False, repr=False)
class CalibrationSet:
    """Inputs of a denoiser, row by row, with the denoising step of each row.

    Attributes:
        inputs: [N, ...] each, by the dotted path of the keyword argument (``added_cond_kwargs.text_embeds``).
        shared: arguments without a batch axis, stored once: tensors of any shape, or plain values.
        timestep: [N] float32 or int64, the value given to the denoiser.
        step: [N] int64, row of ``timesteps``; 0 is the first that the sampler visited, the noisiest.
        timestep_arg: name of the argument that held the timestep.
        visited: [S], all of ``timesteps`` where some have no row in this set; None reads them off the rows.
        trajectory: [N] int64, the same number for rows that one run of the sampler gave at one place of its batch;
            None where that was not recorded.
        nesting: the arguments with dotted paths for values, where these alone do not tell how arguments nest: tuples,
            named tuples, keys that are numbers or have dots. None for lists, and dicts by plain names.

    Raises:
        TypeError: for inputs that are no tensors or plain values, or a timestep, step or trajectory of another dtype.
        ValueError: for an empty set, NaN or infinity, unequal numbers of rows, steps that do not fit the timesteps.
    """

    inputs: dict[str, Tensor]
    shared: dict[str, Shared]
    timestep: Tensor
    step: Tensor
    timestep_arg: str = "timestep"
    visited: Tensor | None = None
    trajectory: Tensor | None = None
    nesting: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_rows(self)
        _check_finite(self)
        _check_steps(self)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {layout(value, per_row=True)}" for name, value in self.inputs.items())
        shared = ", ".join(f"{name} {describe(value)}" for name, value in self.shared.items()) or "nothing"
        return f"CalibrationSet({len(self)} rows at {len(self.timesteps)} timesteps: {rows}; shared: {shared})"

    @property
    def timesteps(self) -> Tensor:
        """[S], each timestep once, in the order the sampler visited them: ``timesteps[step]`` equals ``timestep``."""
        if self.visited is not None:
            return self.visited
        first = [int((self.step == step).nonzero()[0]) for step in self.step.unique()]
        return self.timestep[first]

    def batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Keyword arguments for ``denoiser(**kwargs)``, rows in order, timestep [b]; the last batch may be smaller.

        Raises:
            ValueError: for a ``batch_size`` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        for rows in torch.arange(len(self), device="cpu").split(batch_size):
            yield self._arguments(rows)

    def example(self, batch_size: int = 2) -> dict[str, Any]:
        """Keyword arguments of at least two rows, for ``prepare``; rows repeat where the set has too few."""
        return self._arguments(torch.arange(max(batch_size, 2), device="cpu") % len(self))

    def select(self, indices: Sequence[int] | Tensor) -> CalibrationSet:
        """The rows at ``indices`` [M], in that order; ``timesteps`` stays whole.

        Raises:
            TypeError: for indices that are no integers.
            ValueError: for no indices, or one that is no row of the set.
        """
        rows = torch.as_tensor(indices, device="cpu")
        if rows.numel() and (rows.dtype is torch.bool or rows.is_floating_point()):
            raise TypeError(f"indices must be row numbers, got {rows.dtype}; of a mask, pass mask.nonzero()[:, 0]")
        outside = rows[(rows < 0) | (rows >= len(self))].tolist()
        if rows.ndim != 1 or not rows.numel() or outside:
            got = f"also {outside}" if outside else f"shape {list(rows.shape)}"
            raise ValueError(f"indices must be a list of one or more rows from 0 to {len(self) - 1}, got {got}")
        inputs = {name: take(value, rows) for name, value in self.inputs.items()}
        timestep, step = take(self.timestep, rows), take(self.step, rows)
        trajectory = None if self.trajectory is None else take(self.trajectory, rows)
        chosen = (inputs, self.shared, timestep, step, self.timestep_arg, self.timesteps, trajectory)
        return CalibrationSet(*chosen, self.nesting)

    def split(self, num_held_out: int, seed: int = 0) -> tuple[CalibrationSet, CalibrationSet]:
        """Two sets: the rest, and ``num_held_out`` rows drawn at random. Both keep the order of rows.

        Raises:
            ValueError: when either would be empty.
        """
        if not 0 < num_held_out < len(self):
            raise ValueError(f"num_held_out must be from 1 to {len(self) - 1} of {len(self)} rows, got {num_held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")
        return self.select(order[num_held_out:].sort().values), self.select(order[:num_held_out].sort().values)

    def earlier(self, window: int) -> Tensor:
        """The rows that came before each row in its trajectory.

        Args:
            window: steps in a row, the row's own included.

        Returns:
            [N, window - 1] int64, row numbers at the steps before, nearest first; -1 in rows that lack any of them.

        Raises:
            ValueError: for a ``window`` below 1, or where all rows lack some.
        """
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        numbers = torch.arange(len(self)) if self.trajectory is None else self.trajectory
        places = list(zip(numbers.tolist(), self.step.tolist(), strict=True))
        row_at = {place: row for row, place in enumerate(places)}
        found = [[row_at.get((number, step - back), -1) for back in range(1, window)] for number, step in places]
        rows = torch.tensor(found, dtype=torch.int64, device="cpu").reshape(len(self), window - 1)
        incomplete = (rows < 0).any(1)
        if bool(incomplete.all()) and len(self.timesteps) < window:
            raise ValueError(too_few_steps(window, len(self.timesteps)))
        if bool(incomplete.all()):
            raise ValueError(
                f"no {window} rows of the samples are of one trajectory at steps one after the other; record with"
                f" select=Selection(window={window})"
            )
        return rows.masked_fill(incomplete[:, None], -1)

    def digest(self) -> str:
        """Sha256, in hex, of every name, shape, dtype and byte; the same before ``save`` and after ``load``."""
        nesting = [] if self.nesting is None else [nesting_to_json(self.nesting)]
        sha = hashlib.sha256(json.dumps([self.timestep_arg, sorted(self._plain().items()), *nesting]).encode())
        for name, tensor in sorted(self._tensors().items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all: a failed write leaves what was there before."""
        path = Path(path)
        header = {
            "format_version": FIRST_VERSION if self.trajectory is None else FORMAT_VERSION,
            "inputs": list(self.inputs),
            "shared": self._plain(),
            "timestep_arg": self.timestep_arg,
            "digest": self.digest(),
        }
        if self.nesting is not None:
            header["nesting"] = nesting_to_json(self.nesting)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(self._tensors(), temporary, metadata={HEADER: json.dumps(header)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationSet:
        """Read what ``save`` wrote.

        Raises:
            InvalidFile: for a file that is truncated, damaged, of another version, or no calibration set.
        """
        try:
            header, tensors = read_set(path)
            shared = {name[len("shared.") :]: x for name, x in tensors.items() if name.startswith("shared.")}
            known = {"timestep", "step", "visited", "trajectory"}
            known |= {f"inputs.{name}" for name in header.inputs} | {f"shared.{name}" for name in shared}
            if unknown := sorted(set(tensors) - known):
                raise ValueError(f"it holds tensors {unknown} that are of nothing")
            samples = cls(
                inputs={name: tensors[f"inputs.{name}"] for name in header.inputs},
                shared=header.shared | shared,
                timestep=tensors["timestep"],
                step=tensors["step"],
                timestep_arg=header.timestep_arg,
                visited=tensors["visited"],
                trajectory=tensors.get("trajectory"),
                nesting=None if header.nesting is None else nesting_from_json(header.nesting),
            )
            if samples.digest() != header.digest:
                raise ValueError("the contents do not match their checksum")
        except (SafetensorError, RecursionError, *_DAMAGE) as error:
            raise InvalidFile(
                f"{os.fspath(path)}: {type(error).__name__}: {error}. Expected a calibration set of format version"
                f" {FIRST_VERSION} or {FORMAT_VERSION}, as CalibrationSet.save writes it; copy the file anew, or"
                " record and save again"
            ) from error
        return samples

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Shared] = {f"inputs.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"shared.{name}": value for name, value in self.shared.items()}
        tensors |= {"timestep": self.timestep, "step": self.step, "visited": self.timesteps}
        tensors["trajectory"] = self.trajectory
        return {
            name: value.detach().cpu().contiguous() for name, value in tensors.items() if isinstance(value, Tensor)
        }

    def _plain(self) -> dict[str, Shared]:
        return {name: value for name, value in self.shared.items() if not isinstance(value, Tensor)}

    def _arguments(self, rows: Tensor) -> dict[str, Any]:
        inputs = {name: take(value, rows) for name, value in self.inputs.items()}
        return nested(self.nesting, {**inputs, **self.shared, self.timestep_arg: take(self.timestep, rows)})


def _check_types(samples: CalibrationSet) -> None:
    for name, value in samples.inputs.items():
        if not isinstance(value, Tensor) or not value.ndim:
            raise TypeError(f"input {name} must be a tensor [rows, ...], got {describe(value)}; give it as shared")
    for name, shared in samples.shared.items():
        if not isinstance(shared, SHARED_TYPES):
            raise TypeError(f"shared {name} must be a tensor, int, float, bool, str or None, got {describe(shared)}")
    if samples.timestep.dtype not in (torch.float32, torch.int64) or samples.timestep.dim() != 1:
        raise TypeError(f"timestep must be [rows] float32 or int64, got {describe(samples.timestep)}")
    if samples.step.dtype is not torch.int64 or samples.step.dim() != 1:
        raise TypeError(f"step must be [rows] int64, got {describe(samples.step)}")
    if samples.visited is not None and (samples.visited.dtype, samples.visited.dim()) != (samples.timestep.dtype, 1):
        raise TypeError(f"visited must be [steps] of the timestep's dtype, got {describe(samples.visited)}")
    if samples.trajectory is not None and (samples.trajectory.dtype, samples.trajectory.dim()) != (torch.int64, 1):
        raise TypeError(f"trajectory must be [rows] int64, got {describe(samples.trajectory)}")


def _check_rows(samples: CalibrationSet) -> None:
    if not samples.inputs or not len(samples):
        raise ValueError(
            f"a calibration set needs inputs with rows, got {len(samples)} rows of {list(samples.inputs)}"
        )
    names = [*samples.inputs, *samples.shared, samples.timestep_arg]
    if len(set(names)) < len(names):
        raise ValueError(f"each argument is either an input, shared or the timestep, got a name twice in {names}")
    if samples.nesting is not None and sorted(flatten_inputs(samples.nesting).values()) != sorted(names):
        raise ValueError(f"nesting holds the arguments {samples.nesting}, and the set has {names}")
    try:
        unflatten_inputs(dict.fromkeys(names))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"arguments are dotted paths, none inside another; got {names}") from error
    columns = {**samples.inputs, "timestep": samples.timestep}
    if samples.trajectory is not None:
        columns["trajectory"] = samples.trajectory
    for name, value in columns.items():
        if len(value) != len(samples):
            raise ValueError(
                f"{name} has {len(value)} rows, step has {len(samples)}; give each sample one row of both, and what"
                " has no batch axis as shared"
            )


def _is_mask(value: Tensor) -> bool:
    """Whether a tensor [...] may be what is added to attention's scores: nothing, or less, or minus infinity."""
    finite = value[value.isfinite()]
    return value.dim() > 1 and len(finite) > 0 and bool((finite <= 0).all())


def _check_finite(samples: CalibrationSet) -> None:
    for name, value in {**samples.inputs, "timestep": samples.timestep}.items():
        wrong = value.isnan() | value.isposinf() if name not in SAMPLE_NAMES and _is_mask(value) else ~value.isfinite()
        bad = wrong.unsqueeze(-1).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} is NaN or infinite in row {bad[0]} (timestep {samples.timestep[bad[0]].item()}), and so in"
                f" {len(bad)} of {len(samples)} rows; check the denoiser's dtype, or leave these rows out"
            )
    for name, shared in samples.shared.items():
        values = torch.as_tensor(shared) if isinstance(shared, (Tensor, float)) else torch.zeros(())
        allowed = values.isfinite() | values.isneginf() if _is_mask(values) else values.isfinite()
        if not allowed.all():
            raise ValueError(f"shared {name} is NaN or infinite ({describe(shared)}); give finite values")


def _check_steps(samples: CalibrationSet) -> None:
    timesteps, step = samples.timesteps, samples.step
    if not 0 <= int(step.min()) <= int(step.max()) < len(timesteps):
        raise ValueError(
            f"step must be rows of the {len(timesteps)} timesteps, got {int(step.min())} to {int(step.max())}; where"
            " some timesteps have no rows, give all of them as visited"
        )
    for row in (timesteps[step] != samples.timestep).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"row {row} is of step {int(step[row])}, timestep {timesteps[step[row]].item()}, but has timestep"
            f" {samples.timestep[row].item()}; give each timestep one step, in visiting order"
        )


def take(value: Tensor, rows: Tensor) -> Tensor:
    """The rows of ``value`` [N, ...] at ``rows`` [M]."""
    return value.index_select(0, rows.to(value.device))


def describe(value: object) -> str:
    """Shape and dtype of a tensor, anything else as it prints; for messages."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def layout(value: object, per_row: bool) -> str:
    """What must stay the same from call to call: dtype, shape without the batch, or the type of a plain value."""
    if per_row and isinstance(value, Tensor):
        return f"[{', '.join(['batch', *map(str, value.shape[1:])])}] {value.dtype}"
    return f"{describe(value) if isinstance(value, Tensor) else type(value).__name__} without batch axis"
