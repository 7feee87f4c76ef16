"""How a call's arguments nest: the containers with dotted paths in them, which values are filled into again.

A dotted path alone does not tell a list from a tuple, nor a key with a dot in it from two keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

# One level of a file's nesting has one of these keys.
_LEVELS = ("dict", "list", "tuple", "namedtuple")


def paths_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with every value replaced by its dotted path, in containers of their types.

    >>> paths_of({"x": 1, "pair": (2, {"a.b": 3})})
    {'x': 'x', 'pair': ('pair.0', {'a.b': 'pair.1.a.b'})}

    Raises:
        TypeError: for a key that is neither text nor a whole number, or two values with one path.
    """
    paths: list[str] = []

    def note(path: str, value: Any) -> str:
        del value
        paths.append(path)
        return path

    nesting: dict[str, Any] = rebuilt(inputs, note)
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise TypeError(f"two of the denoiser's arguments have the path {twice[0]!r}; rename a key")
    return nesting


def filled(nesting: Any, flat: Mapping[str, Any]) -> Any:
    """The containers of ``paths_of`` with the values of these dotted paths in them.

    Raises:
        KeyError: for a path without a value.
    """
    return rebuilt(nesting, lambda _, path: flat[path])


def rebuilt(value: Any, leaf: Callable[[str, Any], Any], path: str = "") -> Any:
    """Nested containers in the same types, with ``leaf(path, value)`` for what is none.

    Raises:
        TypeError: for a key that is neither text nor a whole number.
    """
    inside = f"{path}." if path else ""
    if isinstance(value, Mapping):
        for key in value:
            if not _is_key(key):
                raise TypeError(
                    f"{path or 'a call'} has the key {key!r}; keys of a denoiser's arguments are printable text, with"
                    " something on either side of a dot, or whole numbers: rename it"
                )
        return {key: rebuilt(item, leaf, f"{inside}{key}") for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return leaf(path, value)
    items = [rebuilt(item, leaf, f"{inside}{number}") for number, item in enumerate(value)]
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return items if isinstance(value, list) else tuple(items)


def _is_key(key: object) -> bool:
    if isinstance(key, str):
        return key.isprintable() and all(key.split("."))
    return isinstance(key, int) and not isinstance(key, bool)


def with_tuples(nesting: Any) -> Any:
    """The same with tuples for lists."""
    if isinstance(nesting, dict):
        return {key: with_tuples(item) for key, item in nesting.items()}
    return tuple(map(with_tuples, nesting)) if type(nesting) in (list, tuple) else nesting


def is_told_by_paths(nesting: Any) -> bool:
    """Whether ``arguments.unflatten_inputs`` makes the same of the paths: lists, and dicts by plain names."""
    if isinstance(nesting, dict):
        plain = all(isinstance(key, str) and key and "." not in key for key in nesting)
        return plain and not all(map(str.isdigit, nesting)) and all(map(is_told_by_paths, nesting.values()))
    if isinstance(nesting, (list, tuple)):
        return type(nesting) is list and all(map(is_told_by_paths, nesting))
    return True


def is_sorted(nesting: Any, parameters: Sequence[str] = ()) -> bool:
    """Whether dicts have their keys in the order that files sort them into; ``parameters`` are bound by name anyway.

    Code that goes through ``**kwargs``, or through a dict, calls its layers in that order.
    """
    if isinstance(nesting, dict):
        keys = [str(key) for key in nesting if key not in parameters]
        return keys == sorted(keys) and all(map(is_sorted, nesting.values()))
    return not isinstance(nesting, (list, tuple)) or all(map(is_sorted, nesting))


def nesting_to_json(nesting: Any) -> Any:
    """A nesting as a file holds it; classes of named tuples by name and fields."""
    if isinstance(nesting, dict):
        return {"dict": [[key, nesting_to_json(item)] for key, item in nesting.items()]}
    if isinstance(nesting, list):
        return {"list": list(map(nesting_to_json, nesting))}
    if hasattr(nesting, "_fields"):
        return {"namedtuple": [type(nesting).__name__, list(nesting._fields), list(map(nesting_to_json, nesting))]}
    return {"tuple": list(map(nesting_to_json, nesting))} if isinstance(nesting, tuple) else nesting


def nesting_from_json(data: Any) -> Any:
    """The inverse of ``nesting_to_json``; named tuples get a class of their own with the same name and fields.

    Raises:
        ValueError: for anything else.
        TypeError: likewise.
    """
    if isinstance(data, str):
        return data
    if not isinstance(data, dict) or len(data) != 1 or next(iter(data)) not in _LEVELS:
        raise ValueError(f"a level of nested arguments is one of {_LEVELS}, got {data!r:.80}")
    kind, content = next(iter(data.items()))
    if kind == "dict":
        pairs = [(key, nesting_from_json(item)) for key, item in content]
        if not all(_is_key(key) for key, _ in pairs):
            raise ValueError("keys of nested arguments are printable text or whole numbers")
        return dict(pairs)
    if kind == "namedtuple":
        name, fields, items = content
        return _named_tuple(name, fields)(*map(nesting_from_json, items))
    return {"list": list, "tuple": tuple}[kind](map(nesting_from_json, content))


def _named_tuple(name: str, fields: Sequence[str]) -> type:
    """A class like that of ``collections.namedtuple``, which makes its own of source text."""
    if not all(isinstance(word, str) and word.isidentifier() and not word.startswith("_") for word in (name, *fields)):
        raise ValueError(f"a named tuple has names, got {name!r} and {fields!r}")

    def new(cls: type, *values: Any) -> Any:
        if len(values) != len(fields):
            raise TypeError(f"{name} has the fields {list(fields)}, got {len(values)} values")
        return tuple.__new__(cls, values)

    def values_of(pair: Any) -> tuple[Any, ...]:  # what a copy is made of
        return tuple(pair)

    parts = {field: property(itemgetter(place)) for place, field in enumerate(fields)}
    return type(name, (tuple,), {**parts, "_fields": tuple(fields), "__new__": new, "__getnewargs__": values_of})
