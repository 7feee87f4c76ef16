"""Frozen dataclasses as JSON and back: every key known, every type checked, every error with its place.

``parse`` and ``read`` take JSON of strangers: bounded in bytes, without what Python reads and JSON does not have.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

# A graph of 10,000 operators takes 3 MiB.
MAX_BYTES = 32 * 2**20


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> Any:
    """``parse`` of what a file holds.

    Raises:
        ValueError: for what ``parse`` refuses, and for anything but a regular file.
        OSError: when it is not there, or cannot be read.
    """
    return parse(read_bytes(file, max_bytes))


def read_bytes(file: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """What a regular file holds, up to so many bytes.

    Raises:
        ValueError: for a larger file, and for anything but a regular one.
        OSError: when it is not there, or cannot be read.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError("not a regular file")
    with file.open("rb") as stream:
        data = stream.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(data) > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes, got {max(size, len(data))}")
    return data


def parse(text: str | bytes) -> Any:
    """JSON as the standard has it: finite numbers that 64 bits hold, no key twice in an object.

    Raises:
        ValueError: for anything else, also where it is nested too deeply to be read.
    """
    try:
        return json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_int64, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range of float64")
    return number


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:20]} is out of range of int64")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"duplicate key {twice[0]!r} in one object")
    return data


def plain(value: object) -> object:
    """Dataclasses, enumerations and tuples as dictionaries, strings and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


T = TypeVar("T")


def typed(cls: type[T], data: object, where: str) -> T:
    """The inverse of ``plain`` for one frozen dataclass; unknown and missing keys are errors that name ``where``.

    Raises:
        ValueError: for unknown or missing keys, or a value that the dataclass refuses.
        TypeError: for anything but an object, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{where}: expected an object with the fields of {cls.__name__}, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; {cls.__name__} has {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if missing:
        raise ValueError(f"{where}: missing keys {missing} of {cls.__name__}")
    return cls(**{name: _typed_value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _typed_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _typed_value(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}: expected a list, got {type(value).__name__}")
        return tuple(_typed_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: expected an object, got {type(value).__name__}")
        return {
            _typed_value(args[0], key, where): _typed_value(args[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return typed(typing.cast("type[Any]", hint), value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.value for member in hint]
        if value not in choices:
            raise ValueError(f"{where}: {value!r} is not one of {choices}")
        return hint(value)
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if type(value) is not hint:
        raise TypeError(f"{where}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    return value
