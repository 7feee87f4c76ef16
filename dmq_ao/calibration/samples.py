"""What a denoiser is given while its sampler runs: recorded by a hook, kept as rows, saved as one safetensors file.

A row is one sample at one timestep; a guided batch of 2B is 2B rows.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dmq_ao.config import InvalidFile, MissingStatistics
from dmq_ao.graph import TIMESTEP_NAMES, find_timestep, flatten_inputs, unflatten_inputs

FORMAT_VERSION = 1
Shared: TypeAlias = Tensor | int | float | bool | str | None
_SHARED_TYPES = (Tensor, int, float, bool, str, type(None))
# One metadata entry: safetensors writes several in an order of its own, and two runs must give the same bytes.
_HEADER = "dmq_ao.calibration_set"


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

    Raises:
        TypeError: for inputs that are no tensors or plain values, or a timestep or step of another dtype.
        ValueError: for an empty set, NaN or infinity, unequal numbers of rows, steps that do not fit the timesteps.
    """

    inputs: dict[str, Tensor]
    shared: dict[str, Shared]
    timestep: Tensor
    step: Tensor
    timestep_arg: str = "timestep"
    visited: Tensor | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_rows(self)
        _check_finite(self)
        _check_steps(self)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {_layout(value, per_row=True)}" for name, value in self.inputs.items())
        shared = ", ".join(f"{name} {_describe(value)}" for name, value in self.shared.items()) or "nothing"
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
        inputs = {name: _take(value, rows) for name, value in self.inputs.items()}
        timestep, step = _take(self.timestep, rows), _take(self.step, rows)
        return CalibrationSet(inputs, self.shared, timestep, step, self.timestep_arg, self.timesteps)

    def split(self, num_held_out: int, seed: int = 0) -> tuple[CalibrationSet, CalibrationSet]:
        """Two sets: the rest, and ``num_held_out`` rows drawn at random. Both keep the order of rows.

        Raises:
            ValueError: when either would be empty.
        """
        if not 0 < num_held_out < len(self):
            raise ValueError(f"num_held_out must be from 1 to {len(self) - 1} of {len(self)} rows, got {num_held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")
        return self.select(order[num_held_out:].sort().values), self.select(order[:num_held_out].sort().values)

    def digest(self) -> str:
        """Sha256, in hex, of every name, shape, dtype and byte; the same before ``save`` and after ``load``."""
        sha = hashlib.sha256(json.dumps([self.timestep_arg, sorted(self._plain().items())]).encode())
        for name, tensor in sorted(self._tensors().items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all: a failed write leaves what was there before."""
        path = Path(path)
        header = {
            "format_version": FORMAT_VERSION,
            "inputs": list(self.inputs),
            "shared": self._plain(),
            "timestep_arg": self.timestep_arg,
            "digest": self.digest(),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(self._tensors(), temporary, metadata={_HEADER: json.dumps(header)})
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
            header, tensors = _read(path)
            shared = {name[len("shared.") :]: x for name, x in tensors.items() if name.startswith("shared.")}
            samples = cls(
                inputs={name: tensors[f"inputs.{name}"] for name in header["inputs"]},
                shared=header["shared"] | shared,
                timestep=tensors["timestep"],
                step=tensors["step"],
                timestep_arg=header["timestep_arg"],
                visited=tensors["visited"],
            )
            if samples.digest() != header["digest"]:
                raise ValueError("the contents do not match their checksum")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InvalidFile(
                f"{os.fspath(path)}: {type(error).__name__}: {error}. Expected a calibration set of format version"
                f" {FORMAT_VERSION}, as CalibrationSet.save writes it; copy the file anew, or record and save again"
            ) from error
        return samples

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Shared] = {f"inputs.{name}": value for name, value in self.inputs.items()}
        tensors |= {f"shared.{name}": value for name, value in self.shared.items()}
        tensors |= {"timestep": self.timestep, "step": self.step, "visited": self.timesteps}
        return {
            name: value.detach().cpu().contiguous() for name, value in tensors.items() if isinstance(value, Tensor)
        }

    def _plain(self) -> dict[str, Shared]:
        return {name: value for name, value in self.shared.items() if not isinstance(value, Tensor)}

    def _arguments(self, rows: Tensor) -> dict[str, Any]:
        inputs = {name: _take(value, rows) for name, value in self.inputs.items()}
        return unflatten_inputs({**inputs, **self.shared, self.timestep_arg: _take(self.timestep, rows)})


def _check_types(samples: CalibrationSet) -> None:
    for name, value in samples.inputs.items():
        if not isinstance(value, Tensor) or not value.ndim:
            raise TypeError(f"input {name} must be a tensor [rows, ...], got {_describe(value)}; give it as shared")
    for name, shared in samples.shared.items():
        if not isinstance(shared, _SHARED_TYPES):
            raise TypeError(f"shared {name} must be a tensor, int, float, bool, str or None, got {_describe(shared)}")
    if samples.timestep.dtype not in (torch.float32, torch.int64):
        raise TypeError(f"timestep must be [rows] float32 or int64, got {_describe(samples.timestep)}")
    if samples.step.dtype is not torch.int64:
        raise TypeError(f"step must be [rows] int64, got {_describe(samples.step)}")


def _check_rows(samples: CalibrationSet) -> None:
    if not samples.inputs or not len(samples):
        raise ValueError(
            f"a calibration set needs inputs with rows, got {len(samples)} rows of {list(samples.inputs)}"
        )
    names = [*samples.inputs, *samples.shared, samples.timestep_arg]
    if len(set(names)) < len(names):
        raise ValueError(f"each argument is either an input, shared or the timestep, got a name twice in {names}")
    for name, value in {**samples.inputs, "timestep": samples.timestep}.items():
        if len(value) != len(samples):
            raise ValueError(
                f"{name} has {len(value)} rows, step has {len(samples)}; give each sample one row of both, and what"
                " has no batch axis as shared"
            )


def _check_finite(samples: CalibrationSet) -> None:
    for name, value in {**samples.inputs, "timestep": samples.timestep}.items():
        bad = (~value.isfinite()).unsqueeze(-1).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{name} is NaN or infinite in row {bad[0]} (timestep {samples.timestep[bad[0]].item()}), and so in"
                f" {len(bad)} of {len(samples)} rows; check the denoiser's dtype, or leave these rows out"
            )
    for name, shared in samples.shared.items():
        if isinstance(shared, (Tensor, float)) and not torch.as_tensor(shared).isfinite().all():
            raise ValueError(f"shared {name} is NaN or infinite ({_describe(shared)}); give finite values")


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


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if os.path.isdir(path):
        raise ValueError("it is a folder")
    with safe_open(path, framework="pt", device="cpu") as file:
        header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
        if not isinstance(header, dict):
            raise ValueError("its metadata names no calibration set")
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it has format version {header.get('format_version')}")
        names = list(file.keys())
        return header, {name: file.get_tensor(name) for name in names}


def _take(value: Tensor, rows: Tensor) -> Tensor:
    return value.index_select(0, rows.to(value.device))


def _describe(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _layout(value: object, per_row: bool) -> str:
    if per_row and isinstance(value, Tensor):
        return f"[{', '.join(['batch', *map(str, value.shape[1:])])}] {value.dtype}"
    return f"{_describe(value) if isinstance(value, Tensor) else type(value).__name__} without batch axis"


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
        layouts = {name: _layout(value, per_row=name in inputs) for name, value in {**inputs, **shared}.items()}
        if not self._layouts:
            self._layouts = layouts
            self._shared = {name: _own(value) for name, value in shared.items()}
        call = f"call {self.num_calls + 1} of the denoiser"
        if layouts.keys() != self._layouts.keys():
            raise ValueError(
                f"{call} has the arguments {sorted(layouts)}, earlier ones {sorted(self._layouts)}; record loops that"
                " pass different arguments separately"
            )
        for name, layout in layouts.items():
            if layout != self._layouts[name]:
                raise ValueError(
                    f"{name} is {layout} in {call}, and was {self._layouts[name]} in earlier ones; record one"
                    " resolution, one prompt length and one dtype at a time"
                )
        for name, value in shared.items():
            if not _same(value, self._shared[name]):
                raise ValueError(
                    f"{name} has no batch axis, so it must stay the same, but {call} changed it from"
                    f" {_describe(self._shared[name])} to {_describe(value)}; pass it as a tensor [batch, ...], or"
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
            for row, kept in zip(new, _take(value.detach(), index).cpu(), strict=True):
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
        if not isinstance(value, _SHARED_TYPES):
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
            f" { {name: _describe(value) for name, value in flat.items()} }"
        )
    inputs = {name: x for name, x in tensors.items() if len(x) == batch}
    return inputs, {name: value for name, value in flat.items() if name not in inputs}


def _per_row(name: str, timestep: Any, batch: int) -> list[int | float]:
    value = torch.as_tensor(timestep).detach().cpu()
    if list(value.shape) not in ([], [1], [batch]):
        raise ValueError(
            f"{name} must be a number or a tensor [], [1] or [{batch}], one value for each of the {batch} rows; got"
            f" {_describe(value)}"
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
