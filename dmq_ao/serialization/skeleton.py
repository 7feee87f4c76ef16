"""The module that a folder is of, without bytes: diffusers' class built from the file's config, or names and shapes.

diffusers builds whatever a config says. So it does so within the size of the model that the file holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from dmq_ao import graph
from dmq_ao.config import InvalidFile
from dmq_ao.records import outline
from dmq_ao.serialization.folder import CONFIG, Stored

# A model has so many modules and tensors for each of its parameters, and numbers beside them, at most.
_MODULES, _TENSORS, _NUMBERS = 50, 4, 2
_ALLOWANCE = 1000
_HELD = 64
_SPARE_NUMBERS = 2**24
_LARGEST_SIZE = 2**24


class _TooLarge(ValueError):
    """A config builds more than the file holds."""


class _WantsValues(Exception):
    """A constructor reads the values of what it makes, which the meta device has none of."""


def stored_skeleton(stored: Stored, model: nn.Module | None, folder: str | Path) -> nn.Module:
    """The model without bytes: the one given, the diffusers class, or names and shapes alone.

    Raises:
        InvalidFile: for a class that diffusers does not have, or a config that it does not take; and for another model
            than the file's.
    """
    if model is not None:
        module = graph.skeleton(model)
    elif "_class_name" not in stored.model_config:
        try:
            module = _names_and_shapes(stored.parameters)
        except (KeyError, RuntimeError, TypeError) as error:
            raise InvalidFile(f"{Path(folder) / CONFIG}: invalid parameter names or shapes ({error})") from error
    else:
        try:
            with torch.device("meta"):
                module = _diffusers_model(stored, folder).eval()
        except _WantsValues:
            module = graph.skeleton(_diffusers_model(stored, folder).eval())
    check_identity(stored, module, folder)
    return module


def float_model(stored: Stored, model: nn.Module | None, folder: str | Path) -> nn.Module:
    """A float module to export again: the one given, or diffusers' with weights of its own.

    Raises:
        ValueError: when there is neither.
        InvalidFile: as ``skeleton``.
    """
    if model is None and "_class_name" not in stored.model_config:
        raise ValueError(
            f"{folder} is not of a diffusers model; give the float module: load({str(folder)!r}, model=...)"
        )
    if model is None:
        _check_size(stored, folder)
        stored_skeleton(stored, None, folder)  # its size is known before it takes memory
        return _diffusers_model(stored, folder)
    check_identity(stored, model, folder)
    return model


def _check_size(stored: Stored, folder: str | Path) -> None:
    """Refuse a model far larger than what the file holds of it; layers that were copies stand in it once."""
    outlines = (outline(stored.records, name).weight for name in stored.records)
    numel = sum(weight.shape.numel() for weight in outlines) + sum(x.numel() for x in stored.float_tensors.values())
    numbers = sum(torch.Size(shape).numel() for shape in stored.parameters.values())
    if numbers > _HELD * numel + _SPARE_NUMBERS:
        raise InvalidFile(f"{Path(folder) / CONFIG}: a model of {numbers} numbers, of which the file holds {numel}")


def identity(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, by which a file knows it."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_identity(stored: Stored, model: nn.Module, folder: str | Path) -> None:
    """Refuse another model than the file's.

    Raises:
        InvalidFile: with the differences.
    """
    actual, expected = identity(model), dict(stored.parameters)
    if actual == expected:
        return
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    shapes = [f"{n} {expected[n]} != {actual[n]}" for n in expected if n in actual and actual[n] != expected[n]]
    raise InvalidFile(
        f"{folder} is of another model than {type(model).__name__}: missing from the model {missing}, not in the file"
        f" {extra}, shapes (file != model) {shapes}. Load with the model that was quantized"
    )


def _names_and_shapes(parameters: Mapping[str, tuple[int, ...]]) -> nn.Module:
    root = nn.Module()
    for name, shape in parameters.items():
        module, last = graph.place(root, name)
        module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return root.eval()


def _diffusers_model(stored: Stored, folder: str | Path) -> nn.Module:
    import diffusers

    name, config = stored.model_config["_class_name"], dict(stored.model_config)
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin) or not hasattr(kind, "from_config"):
        raise InvalidFile(
            f"{folder}: this diffusers {diffusers.__version__} has no {name}; install one that has, or give the"
            f" float module: load({str(folder)!r}, model=...)"
        )
    file = Path(folder) / CONFIG
    large = next((one for one in _numbers(config) if abs(one) > _LARGEST_SIZE), None)
    if large is not None:
        raise InvalidFile(f"{file}: {name} with a size of {large}, at most {_LARGEST_SIZE} is built")
    try:
        with _within(stored.parameters):
            module: nn.Module = kind.from_config(config)
        return module
    except Exception as error:  # diffusers' own, of any type: they are about the file's values
        if isinstance(error, (NotImplementedError, RuntimeError)) and torch.empty(0).is_meta:
            raise _WantsValues from error
        raise InvalidFile(
            f"{file}: {name} of diffusers {diffusers.__version__} does not take this config ({error!r}); it is damaged"
            " or was edited, or of another version of diffusers"
        ) from error


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, int):
        yield value
    elif not isinstance(value, (str, float, type(None))):
        for one in value:
            yield from _numbers(one)


@contextmanager
def _within(parameters: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Stop building a module that grows far beyond ``parameters``: torch tells of each part as it is added."""
    thread = threading.get_ident()
    budget = {
        "modules": _MODULES * len(parameters) + _ALLOWANCE,
        "tensors": _TENSORS * len(parameters) + _ALLOWANCE,
        "numbers": _NUMBERS * sum(torch.Size(shape).numel() for shape in parameters.values()) + _SPARE_NUMBERS,
    }

    def spend(what: str, count: int) -> None:
        budget[what] -= count if threading.get_ident() == thread else 0
        if budget[what] < 0:
            raise _TooLarge(f"it builds more {what} than the file's model has")

    def with_module(module: nn.Module, name: str, part: nn.Module | None) -> None:
        del module, name, part
        spend("modules", 1)

    def with_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        del module, name
        spend("tensors", 1)
        spend("numbers", 0 if tensor is None else tensor.numel())

    hooks = [
        registration.register_module_module_registration_hook(with_module),
        registration.register_module_parameter_registration_hook(with_tensor),
        registration.register_module_buffer_registration_hook(with_tensor),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
