"""What a denoiser is given while its sampler runs, kept as rows and saved as one safetensors file.

A row is one sample at one timestep; a guided batch of 2B is 2B rows. Rows of other sizes are sets of their own in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmq_ao.config import InvalidFile
from dmq_ao.graph.arguments import flatten_inputs, nested, unflatten_inputs
from dmq_ao.graph.capture import SAMPLE_NAMES
from dmq_ao.graph.containers import nesting_from_json, nesting_to_json
from dmq_ao.samples import set_file
from dmq_ao.samples.values import SHARED_TYPES, Shared, describe, is_mask, layout, take
from dmq_ao.samples.windows import too_few_steps

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
        others: sets of other sizes (resolution, frames, tokens) that belong to it. All above, and every method but
            ``digest`` and ``save``, is of this set's own rows; ``calibrate`` goes through all ``buckets``.
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
    others: tuple[CalibrationSet, ...] = ()
    nesting: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_rows(self)
        _check_finite(self)
        _check_steps(self)
        _check_others(self)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {layout(value, per_row=True)}" for name, value in self.inputs.items())
        shared = ", ".join(f"{name} {describe(value)}" for name, value in self.shared.items()) or "nothing"
        more = "".join(f"; and {one!r}" for one in self.others)
        return f"CalibrationSet({len(self)} rows at {len(self.timesteps)} timesteps: {rows}; shared: {shared}{more})"

    @property
    def buckets(self) -> tuple[CalibrationSet, ...]:
        """This set's own rows, and the sets of other sizes."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

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
        columns = (inputs, self.shared, timestep, step, self.timestep_arg, self.timesteps, trajectory)
        return CalibrationSet(*columns, nesting=self.nesting)

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
            window: steps in a row, the row's own included; the number of all timesteps where there are fewer.

        Returns:
            [N, window - 1] int64, row numbers at the steps before, nearest first; -1 in rows that lack any of them.

        Raises:
            ValueError: for a ``window`` below 1, or where all rows lack some.

        Warns:
            UserWarning: for fewer timesteps than ``window``.
        """
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        if window > len(self.timesteps):
            warnings.warn(too_few_steps(window, len(self.timesteps)), stacklevel=2)
            window = len(self.timesteps)
        numbers = torch.arange(len(self)) if self.trajectory is None else self.trajectory
        places = list(zip(numbers.tolist(), self.step.tolist(), strict=True))
        row_at = {place: row for row, place in enumerate(places)}
        rows_before = [[row_at.get((number, step - back), -1) for back in range(1, window)] for number, step in places]
        rows = torch.tensor(rows_before, dtype=torch.int64, device="cpu").reshape(len(self), window - 1)
        incomplete = (rows < 0).any(1)
        if bool(incomplete.all()):
            raise ValueError(
                f"no {window} rows of the samples are of one trajectory at steps one after the other; record with"
                f" select=Selection(window={window})"
            )
        return rows.masked_fill(incomplete[:, None], -1)

    def digest(self) -> str:
        """Sha256, in hex, of every name, shape, dtype and byte; the same before ``save`` and after ``load``."""
        plain = [(name, value) for one in self.buckets for name, value in sorted(one._plain().items())]
        nesting = [] if self.nesting is None else [nesting_to_json(self.nesting)]
        sha = hashlib.sha256(json.dumps([self.timestep_arg, plain, *nesting]).encode())
        for name, tensor in sorted(self._tensors_of_all().items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all: a failed write leaves what was there before."""
        version = set_file.FIRST_VERSION if self.trajectory is None else set_file.WITH_TRAJECTORIES
        header = {
            "format_version": set_file.WITH_BUCKETS if self.others else version,
            "inputs": list(self.inputs),
            "shared": self._plain(),
            "timestep_arg": self.timestep_arg,
            "digest": self.digest(),
        }
        header |= {"buckets": len(self.buckets)} if self.others else {}
        header |= {} if self.nesting is None else {"nesting": nesting_to_json(self.nesting)}
        set_file.write_set(Path(path), header, self._tensors_of_all())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationSet:
        """Read what ``save`` wrote.

        Raises:
            InvalidFile: a ValueError, for a file that is cut off, damaged, of another version, or no calibration set.
        """
        try:
            header, tensors = set_file.read_set(path)
            sets = [cls._of_file(header, tensors, number) for number in range(header.buckets)]
            if tensors.keys() != {"visited"}:
                raise ValueError(f"it holds tensors {sorted(tensors)} that are of nothing")
            samples = replace(sets[0], others=tuple(sets[1:])) if sets[1:] else sets[0]
            if samples.digest() != header.digest:
                raise ValueError("the contents do not match their checksum")
        except (SafetensorError, RecursionError, *_DAMAGE) as error:
            raise InvalidFile(
                f"{os.fspath(path)}: {type(error).__name__}: {error}. Expected a calibration set of format version"
                f" {' or '.join(map(str, set_file.VERSIONS))}; copy the file anew, or record and save again"
            ) from error
        return samples

    @classmethod
    def _of_file(cls, header: set_file.SetHeader, tensors: dict[str, Tensor], number: int) -> CalibrationSet:
        """One bucket of a file; its own tensors are taken out of ``tensors``."""
        prefix = set_file.of_bucket(number)
        names = [name for name in tensors if name.startswith(f"{prefix}shared.")]
        shared = {name.removeprefix(f"{prefix}shared."): tensors.pop(name) for name in names}
        return cls(
            inputs={name: tensors.pop(f"{prefix}inputs.{name}") for name in header.inputs},
            shared=header.shared | shared,
            timestep=tensors.pop(f"{prefix}timestep"),
            step=tensors.pop(f"{prefix}step"),
            timestep_arg=header.timestep_arg,
            visited=tensors["visited"],
            trajectory=tensors.pop(f"{prefix}trajectory", None),
            nesting=None if header.nesting is None else nesting_from_json(header.nesting),
        )

    def _tensors_of_all(self) -> dict[str, Tensor]:
        return {
            set_file.of_bucket(number) + name: tensor
            for number, one in enumerate(self.buckets)
            for name, tensor in one._tensors().items()
            if not number or name != "visited"  # it is the same in all buckets
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Shared] = {f"inputs.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"shared.{name}": value for name, value in self.shared.items()} | {"trajectory": self.trajectory}
        tensors |= {"timestep": self.timestep, "step": self.step, "visited": self.timesteps}
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


def _check_finite(samples: CalibrationSet) -> None:
    for name, value in {**samples.inputs, "timestep": samples.timestep}.items():
        wrong = value.isnan() | value.isposinf() if name not in SAMPLE_NAMES and is_mask(value) else ~value.isfinite()
        bad = wrong.unsqueeze(-1).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} is NaN or infinite in row {bad[0]} (timestep {samples.timestep[bad[0]].item()}), and so in"
                f" {len(bad)} of {len(samples)} rows; check the denoiser's dtype, or leave these rows out"
            )
    for name, shared in samples.shared.items():
        values = torch.as_tensor(shared) if isinstance(shared, (Tensor, float)) else torch.zeros(())
        allowed = values.isfinite() | values.isneginf() if is_mask(values) else values.isfinite()
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


def _check_others(samples: CalibrationSet) -> None:
    """Buckets differ by sizes alone, and none holds others."""
    for one in samples.others:
        pairs = [(each.inputs.keys(), each._plain(), each.shared.keys(), each.timestep_arg) for each in (samples, one)]
        if one.others or pairs[0] != pairs[1]:
            raise ValueError(f"others must be sets of the same arguments, got {one!r} beside {list(samples.inputs)}")
        if not torch.equal(samples.timesteps, one.timesteps):
            raise ValueError("others must be of the same sampler: give all of its timesteps to each set as visited")
