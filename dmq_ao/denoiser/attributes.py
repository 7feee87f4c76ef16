"""Attributes of the float model, as far as a quantized denoiser can answer for it: they are read, never changed.

The graph that runs has none of the float model's modules. What would change them would be accepted and do nothing, so
it raises: a method whose name does not say so is tried on a copy, and refused when that is not as it was.
"""

from __future__ import annotations

import copy
import enum
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Of nn.Module and diffusers: these look and do not touch.
_READERS = {"extra_repr", "items", "keys", "num_parameters", "state_dict", "values"}
_READERS |= {"buffers", "children", "modules", "parameters", "get_buffer", "get_parameter", "get_submodule"}
_READERS |= {"named_buffers", "named_children", "named_modules", "named_parameters"}
# Libraries whose mixins load, save, adapt, offload and cache modules: never run, whatever they say.
_MIXINS = (
    "diffusers.loaders",
    "diffusers.models.modeling_utils",
    "diffusers.models.cache_utils",
    "diffusers.configuration_utils",
    "diffusers.utils",
    "huggingface_hub",
    "transformers",
    "accelerate",
    "peft",
)
# So begin the names of methods that change: not worth a copy to try them on.
_CHANGES: tuple[str, ...] = (
    "add_",
    "apply_",
    "compile",
    "delete_",
    "disable_",
    "enable_",
    "fuse_",
    "load_",
    "register_",
    "remove_",
)
_CHANGES += ("reset_", "set_", "unfuse_", "unload_", "unset_")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device, torch.Size)
_REMEDIES = (
    (("lora", "adapter", "peft"), "fuse it into the float model (load_lora_weights, fuse_lora, unload_lora_weights)"),
    (("gradient_checkpointing",), "it is not trained, and gradients need no checkpoints"),
    (("compile",), "dmq_ao.compile(denoiser) compiles the graph whole"),
    (("save", "push_to_hub"), "dmq_ao.save(denoiser, folder) writes it"),
    (("cache",), "caches of blocks need the blocks; call it on a float denoiser"),
    (("offload",), "its codes are already packed; quantize or load it on the device where it runs"),
)


def refusal(owner: object, name: str) -> TypeError:
    """The error for what would change the float model, with what to do instead."""
    remedy = next((text for words, text in _REMEDIES if any(word in name for word in words)), None)
    before = "do it on the float denoiser before dmq_ao.prepare, and quantize that"
    return TypeError(
        f"{type(owner).__name__}.{name} belongs to the float model's modules, and a quantized denoiser runs a graph"
        f" without them, so it would have no effect: {before if remedy is None else remedy}"
    )


def look_up(owner: object, name: str) -> Any:
    """An attribute of a part of the skeleton: values as they are, modules and other objects as ``PartView``.

    Methods come as functions that run where they change nothing and raise where they would.

    Raises:
        AttributeError: when it has none of that name.
    """
    value = getattr(owner, name)
    if name in _NOTHING_TO_DO and callable(value):
        return _NOTHING_TO_DO[name]
    if callable(value) and (inspect.isroutine(value) or hasattr(value, "func")):
        return _guarded(owner, name, value)
    return _shown(value)


def _no_cache(*args: Any, **kwargs: Any) -> nullcontext[None]:
    del args, kwargs
    return nullcontext()


def _no_state(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


# Pipelines call these of diffusers' CacheMixin in every run: no cache can be enabled here, so there is none to tell.
_NOTHING_TO_DO: dict[str, Callable[..., Any]] = {"cache_context": _no_cache, "_reset_stateful_cache": _no_state}


def _shown(value: Any) -> Any:
    if isinstance(value, (PartView, Tensor, *_PLAIN)):
        return value
    if isinstance(value, nn.Module):
        return PartView(value)
    if type(value) in (dict, OrderedDict):
        return {key: _shown(item) for key, item in value.items()}
    if type(value) in (list, set, tuple, frozenset):
        return type(value)(_shown(item) for item in value)
    if isinstance(value, (Mapping, tuple)) or type(value).__module__.partition(".")[0] in (
        "torch",
        "numpy",
        "builtins",
    ):
        return value
    return PartView(value)


def _guarded(owner: object, name: str, method: Any) -> Callable[..., Any]:
    home = next((kind for kind in type(owner).__mro__ if name in vars(kind)), type(owner))
    if name in _READERS and isinstance(owner, nn.Module):
        return lambda *args, **kwargs: _read(method(*args, **kwargs))

    def call(*args: Any, **kwargs: Any) -> Any:
        if home is nn.Module and name == "eval":
            return _shown(owner)
        bound = getattr(method, "__self__", owner)
        library = home is nn.Module or home.__module__.startswith(_MIXINS)
        if library or inspect.isclass(bound) or name.startswith(_CHANGES):
            raise refusal(owner, name)
        return _tried(owner, name, args, kwargs)

    return call


def _read(result: Any) -> Any:
    return (_shown(item) for item in result) if isinstance(result, Iterator) else _shown(result)


def _tried(owner: object, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a method answers on a copy that it leaves as it was.

    Raises:
        TypeError: when it changes the copy, fails on it, or reads weights, which it has none of.
    """
    twin = copy.deepcopy(owner)
    before = _state(twin, {})
    try:
        result = getattr(twin, name)(*args, **kwargs)
    except Exception as error:  # of any type: it is the model's own code, without weights
        raise refusal(owner, name) from error
    if _state(twin, {}) != before or inspect.isgenerator(result) or hasattr(result, "__enter__"):
        raise refusal(owner, name)
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(result)):
        raise TypeError(
            f"{type(owner).__name__}.{name} reads weights of the float model, which a quantized denoiser does not"
            " keep: call it on the float denoiser"
        )
    return _shown(result)


def _state(value: Any, numbers: dict[int, int]) -> Any:
    """Everything that can be changed below an object, comparable: objects by a number, tensors by what they are."""
    if isinstance(value, Tensor):
        return ("tensor", id(value), value.dtype, value.requires_grad, tuple(value.shape), value._version)
    if isinstance(value, _PLAIN) or inspect.isroutine(value):
        return repr(value) if isinstance(value, float) else value
    if id(value) in numbers:
        return ("again", numbers[id(value)])
    numbers[id(value)] = len(numbers)
    if isinstance(value, Mapping):
        return (type(value), [(_state(key, numbers), _state(item, numbers)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [_state(item, numbers) for item in value])
    if isinstance(value, (set, frozenset)):
        return (type(value), sorted(map(repr, value)))
    return (type(value), id(value), _state(getattr(value, "__dict__", {}), numbers))


class PartView:
    """A module of the float model, or another object that it holds, to be looked at.

    It passes for an instance of the same class. Tensors are on the meta device: they have shapes and dtypes.
    """

    __slots__ = ("_part",)
    _part: Any

    def __init__(self, part: object) -> None:
        object.__setattr__(self, "_part", part)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of what is looked at."""
        kind: type = type(self._part)
        return kind

    def __getattr__(self, name: str) -> Any:
        """As of the part itself; methods that would change it raise when they are called."""
        return look_up(self._part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Not possible.

        Raises:
            TypeError: always, with what to do.
        """
        raise refusal(self._part, name)

    def __delattr__(self, name: str) -> None:
        """Not possible, as ``__setattr__``."""
        raise refusal(self._part, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: there are no weights.

        Raises:
            TypeError: always.
        """
        raise refusal(self._part, "__call__")

    def __getitem__(self, key: Any) -> Any:
        return _shown(self._part[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refusal(self._part, "__setitem__")

    def __iter__(self) -> Iterator[Any]:
        return (_shown(item) for item in self._part)

    def __contains__(self, item: Any) -> bool:
        return item in self._part

    def __len__(self) -> int:
        return len(self._part)

    def __bool__(self) -> bool:
        return bool(self._part)

    def __eq__(self, other: object) -> bool:
        same: bool = self._part is (other._part if type(other) is PartView else other)
        return same

    def __hash__(self) -> int:
        return hash(id(self._part))

    def __dir__(self) -> list[str]:
        return dir(self._part)

    def __repr__(self) -> str:
        return repr(self._part)

    def __deepcopy__(self, memo: dict[int, Any]) -> PartView:
        return PartView(copy.deepcopy(self._part, memo))


class TensorHolder(nn.Module):
    """A module of a lowered graph, which holds tensors and is never called."""

    def forward(self) -> None:
        """Not called."""

    def _register(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise TypeError(
            "this module of a quantized denoiser only holds tensors and is never called, so a hook on it would have no"
            " effect: hook the denoiser itself, or blocks of the float model before dmq_ao.prepare"
        )

    register_forward_hook = register_forward_pre_hook = _register
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _register


def refuse_hooks(root: nn.Module) -> None:
    """Make the modules below a graph, which nothing calls, refuse hooks."""
    for part in root.modules():
        if type(part) is nn.Module:
            part.__class__ = TensorHolder
