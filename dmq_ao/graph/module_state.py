"""What a module keeps besides parameters: plain tensors, caches, counters. Found, and put back as it was."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_DEPTH = 6
_OPAQUE = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes)


def _containers(module: nn.Module) -> Iterator[dict[Any, Any] | list[Any]]:
    """Every dictionary and list that modules of a tree hold, their own ``__dict__`` among them."""
    visited: set[int] = set()
    waiting: list[tuple[Any, int]] = [(vars(one), 0) for one in module.modules()]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in visited or depth > _DEPTH or isinstance(value, _OPAQUE):
            continue
        visited.add(id(value))
        if isinstance(value, (dict, list)):
            yield value
            items = value.values() if isinstance(value, dict) else value
            waiting += [(one, depth + 1) for one in list(items)]
        elif isinstance(value, (tuple, set, frozenset)):
            waiting += [(one, depth + 1) for one in value]
        elif isinstance(getattr(value, "__dict__", None), dict):
            waiting.append((vars(value), depth + 1))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Every tensor [...] of a module tree: parameters, buffers, and those in attributes, lists and dictionaries."""
    unique: dict[int, Tensor] = {}
    for container in _containers(module):
        for value in container.values() if isinstance(container, dict) else container:
            for one in value if isinstance(value, (tuple, set, frozenset)) else (value,):
                if isinstance(one, Tensor):
                    unique[id(one)] = one
    return list(unique.values())


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Undo what code in the block adds, removes or replaces in a module tree: its caches would hold fake tensors."""
    before = [(one, dict(one) if isinstance(one, dict) else list(one)) for one in _containers(module)]
    try:
        yield
    finally:
        for container, contents in before:
            if isinstance(container, dict) and isinstance(contents, dict):
                if container.keys() != contents.keys() or any(container[k] is not v for k, v in contents.items()):
                    container.clear()
                    container.update(contents)
            elif isinstance(container, list) and list(map(id, container)) != list(map(id, contents)):
                container[:] = list(contents)
