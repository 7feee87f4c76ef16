"""What one call of a denoiser is given, by name and by row."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dmq_ao.graph.arguments import TIMESTEP_NAMES, find_timestep, flatten_inputs
from dmq_ao.samples.values import SHARED_TYPES, Shared, describe

# What diffusers' denoisers add where a ControlNet or adapter gives it.
RESIDUALS = frozenset(
    (
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "block_controlnet_hidden_states",
    )
)


def arguments_of_call(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without ``return_dict`` and those left at None.

    Raises:
        ValueError: for positional arguments without a name.
    """
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


def timestep_name(names: Iterable[str], timestep_arg: str | None) -> str:
    """Which of the arguments is the timestep.

    Raises:
        ValueError: when none is.
    """
    name = find_timestep(list(names), timestep_arg)
    if name is None:
        raise ValueError(
            f"none of the denoiser's arguments {list(names)} is a timestep ({', '.join(TIMESTEP_NAMES)}); say which"
            " it is with timestep_arg=, or give a denoiser without one to a module whose forward also takes timestep,"
            " and record and prepare that module"
        )
    return name


def flat_arguments(arguments: Mapping[str, Any]) -> dict[str, Shared]:
    """The arguments by dotted path.

    Raises:
        TypeError: for a value that a recording cannot hold.
    """
    flat = flatten_inputs(arguments)
    for name, value in flat.items():
        if not isinstance(value, SHARED_TYPES):
            raise TypeError(
                f"{name} is a {type(value).__name__}; a recording holds tensors, int, float, bool, str, None, and"
                " dicts or lists of those. Wrap the denoiser in a module that makes it from one of these"
            )
    return flat


def by_batch(
    flat: Mapping[str, Shared], earlier_shared: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Shared]]:
    """Tensors [B, ...] with a row for each sample, and what all rows share, by dotted path.

    Raises:
        ValueError: for a call without a floating tensor [B, ...].
    """
    tensors = {name: x for name, x in flat.items() if isinstance(x, Tensor) and x.ndim and name not in earlier_shared}
    batch = next((len(x) for x in tensors.values() if x.is_floating_point() and x.ndim >= 2), None)
    if batch is None:
        raise ValueError(
            "the denoiser was called without a floating tensor [batch, ...] besides the timestep; got"
            f" { {name: describe(value) for name, value in flat.items()} }"
        )
    inputs = {name: x for name, x in tensors.items() if len(x) == batch}
    return inputs, {name: value for name, value in flat.items() if name not in inputs}


def timestep_of_rows(name: str, timestep: Any, batch: int) -> list[int | float]:
    """The timestep of each of ``batch`` rows.

    Raises:
        ValueError: for a timestep that is neither one number nor one a row [B].
    """
    value = torch.as_tensor(timestep).detach().cpu()
    if list(value.shape) not in ([], [1], [batch]):
        raise ValueError(
            f"{name} must be a number or a tensor [], [1] or [{batch}], one value for each of the {batch} rows; got"
            f" {describe(value)}. Record and prepare a module that takes one value a row, and gives the denoiser what"
            f" it makes of it, as {name}.reshape(-1, 1, 1, 1)"
        )
    value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
    values: list[int | float] = value.expand(batch).tolist()
    return values


def own_copy(value: Shared) -> Shared:
    """The value itself, a tensor [...] as a copy on the CPU."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def is_same(value: Shared, earlier: Shared) -> bool:
    """Whether a value equals one of an earlier call, tensors [...] element by element."""
    if isinstance(value, Tensor) and isinstance(earlier, Tensor):
        return torch.equal(value.detach().cpu(), earlier)
    return value == earlier


def residuals_note(names: Iterable[str]) -> str | None:
    """What to say of recorded arguments, by dotted path, that other calls may lack; None where there are none."""
    residuals = [name for name in dict.fromkeys(name.partition(".")[0] for name in names) if name in RESIDUALS]
    if not residuals:
        return None
    return (
        f"recorded with {', '.join(residuals)}: a quantized denoiser takes the arguments it was recorded with; for"
        f" calls without these too, prepare(..., optional={residuals})"
    )
