"""What a denoiser answers, taken apart into tensors and put together again: tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """One level of an answer.

    Attributes:
        kind: ``tensor``, ``constant``, ``tuple``, ``list``, ``dict``, ``namedtuple`` or ``dataclass``.
        parts: of a container, in order.
        keys: of a dictionary's or dataclass's parts.
        type: the class of a named tuple or dataclass.
        value: of a constant: None, a number or a text.
    """

    kind: str
    parts: tuple[Structure, ...] = ()
    keys: tuple[str, ...] = ()
    type: type | None = None
    value: Any = None

    def count(self) -> int:
        """How many tensors it holds."""
        return int(self.kind == "tensor") + sum(part.count() for part in self.parts)

    def built(self, tensors: Sequence[Tensor]) -> Any:
        """The answer with these tensors, [B, ...] each, in it, in the order of ``taken_apart``."""
        return self._built(iter(tensors))

    def _built(self, tensors: Iterator[Tensor]) -> Any:
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "constant":
            return self.value
        parts = [part._built(tensors) for part in self.parts]
        if self.kind == "list":
            return parts
        if self.kind == "tuple":
            return tuple(parts)
        if self.kind == "namedtuple":
            return self.type(*parts)  # type: ignore[misc]
        fields = dict(zip(self.keys, parts, strict=True))
        return fields if self.kind == "dict" else self.type(**fields)  # type: ignore[misc]


def taken_apart(value: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of an answer, and how they stand in it.

    >>> taken_apart((1, {"a": None}))[1].built([])
    (1, {'a': None})

    Raises:
        TypeError: for what is no tensor, number, text, None, or a tuple, list, dict, named tuple or dataclass of them.
    """
    tensors: list[Tensor] = []
    return tensors, _structure(value, tensors)


def _structure(value: Any, tensors: list[Tensor]) -> Structure:
    if isinstance(value, Tensor):
        tensors.append(value)
        return Structure("tensor")
    if value is None or isinstance(value, (bool, int, float, str)):
        return Structure("constant", value=value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(one.name for one in dataclasses.fields(value) if one.init)
        parts = tuple(_structure(getattr(value, name), tensors) for name in names)
        return Structure("dataclass", parts, names, type(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Structure("namedtuple", tuple(_structure(one, tensors) for one in value), (), type(value))
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return Structure(kind, tuple(_structure(one, tensors) for one in value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        parts = tuple(_structure(one, tensors) for one in value.values())
        return Structure("dict", parts, tuple(value))
    raise TypeError(
        f"a denoiser answers with tensors, or tuples, lists, dicts or dataclasses of them; got {type(value).__name__}"
    )


def is_plain(structure: Structure) -> bool:
    """Whether an answer is a tensor, a tuple of tensors, or a dataclass of tensors whose last fields may be None."""
    kinds = [part.kind for part in structure.parts]
    if structure.kind == "dataclass":
        count = sum(kind == "tensor" for kind in kinds)
        rest = structure.parts[count:]
        return kinds[:count] == ["tensor"] * count and all(p.kind == "constant" and p.value is None for p in rest)
    return structure.kind == "tensor" or structure.kind == "tuple" and set(kinds) == {"tensor"}
