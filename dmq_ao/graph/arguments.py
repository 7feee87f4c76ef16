"""A denoiser's arguments: as keywords, nested or flat, and which of them is the timestep."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.graph.containers import filled, rebuilt

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def flatten_inputs(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, lists and tuples as one dictionary of dotted paths; empty containers vanish."""
    flat: dict[str, Any] = {}
    for key, value in inputs.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_inputs(value, path + ".")
        elif isinstance(value, (list, tuple)):
            flat |= flatten_inputs({str(i): item for i, item in enumerate(value)}, path + ".")
        else:
            flat[path] = value
    return flat


def unflatten_inputs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as nested dictionaries; a level whose keys are 0, 1, 2 ... becomes a list."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = value
    return {key: _lists(value) for key, value in nested.items()}


def nested(nesting: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path as keyword arguments, nested as ``nesting`` says; as the paths do where it is None.

    Raises:
        KeyError: for a path without a value.
    """
    arguments: dict[str, Any] = unflatten_inputs(flat) if nesting is None else filled(nesting, flat)
    return arguments


def moved_inputs(
    inputs: Mapping[str, Any], device: torch.device | None = None, floats: torch.dtype | None = None
) -> dict[str, Any]:
    """The inputs with tensors on ``device``, and those of float32 in the type ``floats``; None changes nothing."""

    def convert(path: str, value: Any) -> Any:
        del path
        if not isinstance(value, Tensor):
            return value
        return value.to(device, floats if value.dtype == torch.float32 else None)

    result: dict[str, Any] = rebuilt(inputs, convert)
    return result


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _lists(item) for key, item in value.items()}
    if items and items.keys() == {str(place) for place in range(len(items))}:
        return [items[str(place)] for place in range(len(items))]
    return items


def bind(denoiser: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, Any]:
    """Keyword arguments of ``denoiser.forward`` from a dict or a tuple of positionals.

    Raises:
        TypeError: when they do not fit the signature.
    """
    signature = inspect.signature(denoiser.forward)
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*example_inputs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs do not fit {type(denoiser).__name__}.forward{signature}: {error}. Give a dict of its"
            " keyword arguments, or a tuple of its positionals."
        ) from error
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    arguments.pop("return_dict", None)
    return {name: value for name, value in arguments.items() if value is not None}


def find_timestep(names: Iterable[str], timestep_arg: str | None) -> str | None:
    """The timestep among argument names: ``timestep_arg`` if given, else by the usual names.

    Raises:
        ValueError: when ``timestep_arg`` is given and is not an argument.
    """
    arguments = list(names)
    if timestep_arg is not None:
        if timestep_arg not in arguments:
            raise ValueError(f"timestep_arg={timestep_arg!r} is not an argument of the denoiser; it takes {arguments}")
        return timestep_arg
    return next((name for name in TIMESTEP_NAMES if name in arguments), None)
