"""How a call maps onto a stored graph, as JSON and back. The class of the answer comes from a registry."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dmq_ao.config.as_json import typed
from dmq_ao.graph import Signature, size_rules
from dmq_ao.graph.structure import Structure
from dmq_ao.serialization.folder import Stored
from dmq_ao.serialization.operators import Forbidden, NotReadable

_DIFFUSERS = "diffusers.models."
_ANSWER_KINDS = {"tensor", "constant", "tuple", "list", "dict", "namedtuple", "dataclass"}
_OF_CLASS: Mapping[str, Callable[[type], bool]] = {
    "namedtuple": lambda kind: issubclass(kind, tuple) and hasattr(kind, "_fields"),
    "dataclass": dataclasses.is_dataclass,
}
_DEEPEST = 8
_LONGEST_RULE, _LONGEST_RULES = 2_000, 100_000


@dataclass(frozen=True)
class _StoredSignature:
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    timestep_per_row: bool
    batch: str
    return_type: tuple[str, ...] | None
    returns_tuple: bool
    rules: tuple[str, ...]
    answer: dict[str, Any] | None = None
    optional: tuple[str, ...] = ()


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """What of a signature the rest of the folder does not say."""
    kind = signature.return_type
    return {
        "parameters": list(signature.parameters),
        "names": list(signature.names),
        "timestep_per_row": signature.timestep_per_row,
        "batch": signature.batch,
        "return_type": None if kind is None else [kind.__module__, kind.__qualname__],
        "returns_tuple": signature.returns_tuple,
        "rules": list(signature.rules),
        **({} if signature.answer is None else {"answer": _structure_to_json(signature.answer)}),
        **({"optional": list(signature.optional)} if signature.optional else {}),
    }


def _structure_to_json(one: Structure) -> dict[str, Any]:
    """A level of an answer: its kind, and what that kind has."""
    stored: dict[str, Any] = {"kind": one.kind}
    if one.kind == "constant":
        return stored | {"value": one.value}
    if one.kind in _OF_CLASS and one.type is not None:
        stored["type"] = [one.type.__module__, one.type.__qualname__]
    if one.keys:
        stored["keys"] = list(one.keys)
    return stored if one.kind == "tensor" else stored | {"parts": [_structure_to_json(part) for part in one.parts]}


def _structure_from_json(data: Any, model: nn.Module | None, depth: int = 0) -> Structure:
    if depth > _DEEPEST or not isinstance(data, dict) or data.get("kind") not in _ANSWER_KINDS:
        raise ValueError(
            f"signature.answer: expected levels of {sorted(_ANSWER_KINDS)}, at most {_DEEPEST}, got {data!r}"
        )
    kind = data["kind"]
    unknown = set(data) - {"kind", "value", "type", "keys", "parts"}
    value, keys, parts = data.get("value"), data.get("keys", []), data.get("parts", [])
    if unknown or not isinstance(value, (bool, int, float, str, type(None))) or not isinstance(parts, list):
        raise ValueError(f"signature.answer: {sorted(unknown)} are unknown, or a value is no number or text")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("signature.answer: keys are texts")
    inside = tuple(_structure_from_json(part, model, depth + 1) for part in parts)
    if kind in ("dict", "dataclass") and len(keys) != len(inside):
        raise ValueError(f"signature.answer: {len(keys)} keys for {len(inside)} values")
    return Structure(kind, inside, tuple(keys), _class_of(kind, data.get("type"), inside, keys, model), value)


def _class_of(kind: str, path: Any, parts: tuple[Structure, ...], keys: list[str], model: nn.Module | None) -> Any:
    """The named tuple or dataclass of a level, whose fields must be those that are stored."""
    if kind not in _OF_CLASS:
        return None
    if not isinstance(path, list) or not all(isinstance(name, str) for name in path):
        raise ValueError(f"signature.answer: expected a module and a class, got {path!r}")
    answer = _answer_class(tuple(path), model, _OF_CLASS[kind])
    fields = getattr(answer, "_fields", None) or tuple(one.name for one in dataclasses.fields(answer) if one.init)
    if len(fields) != len(parts) or kind == "dataclass" and tuple(keys) != tuple(fields):
        raise ValueError(f"signature.answer: {answer.__name__} has the fields {list(fields)}, got {len(parts)} values")
    return answer


def signature_from_json(data: Any, stored: Stored, model: nn.Module | None) -> Signature:
    """The inverse of ``to_json``.

    Args:
        data: JSON of a file.
        stored: the rest of the folder.
        model: given by the caller, whose own classes may be answered with; None for diffusers' alone.

    Raises:
        NotReadable: for an answer's class that diffusers has not, or not any more.
        ValueError, TypeError: for what fits nothing; ``Forbidden`` for a class that no file may name.
    """
    parts = typed(_StoredSignature, data, "signature")
    shapes = {name: shape for name, (shape, _) in stored.example.items()}
    if len(parts.names) != len(shapes) or set(parts.names) != set(shapes):
        raise ValueError(f"signature.names: expected {sorted(shapes)}, got {list(parts.names)}")
    if parts.batch not in shapes or not shapes[parts.batch]:
        raise ValueError(f"signature.batch: {parts.batch!r} must be one of {sorted(shapes)} and have an axis")
    if parts.timestep_per_row and (stored.timestep_arg is None or len(shapes[stored.timestep_arg]) > 1):
        raise ValueError("signature.timestep_per_row: there is no timestep, or it has more than one axis")
    if not all(name.isidentifier() for name in parts.parameters):
        raise ValueError(f"signature.parameters: expected names of Python, got {list(parts.parameters)}")
    _check_rules(parts.rules, shapes)
    _check_optional(parts, shapes, stored.timestep_arg)
    return Signature(
        parameters=parts.parameters,
        names=parts.names,
        constants=stored.constants,
        timestep=stored.timestep_arg,
        timestep_per_row=parts.timestep_per_row,
        batch=parts.batch,
        return_type=None if parts.return_type is None else _answer_class(parts.return_type, model),
        returns_tuple=parts.returns_tuple,
        example=stored.example,
        rules=parts.rules,
        answer=None if parts.answer is None else _structure_from_json(parts.answer, model),
        optional=parts.optional,
        nesting=stored.nesting,
    )


def check_answer(signature: Signature, count: int) -> None:
    """Refuse a graph that gives more, or fewer, tensors than the class of the answer takes.

    Raises:
        ValueError: naming the class.
    """
    if signature.answer is not None:
        tensors = signature.answer.count()
        if tensors != count:
            raise ValueError(f"signature.answer: it holds {tensors} tensors, the graph gives {count}")
        return
    if signature.return_type is None:
        return
    fields = dataclasses.fields(signature.return_type)
    required = [one for one in fields if one.default is one.default_factory is dataclasses.MISSING]
    if not len(required) <= count <= len(fields):
        raise ValueError(
            f"signature.return_type: {signature.return_type.__name__} takes {len(fields)} values, got {count}"
        )


def _check_rules(rules: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if sum(map(len, rules)) > _LONGEST_RULES or any(len(rule) > _LONGEST_RULE for rule in rules):
        raise ValueError(f"signature.rules: at most {_LONGEST_RULE} characters each, {_LONGEST_RULES} together")
    rule = size_rules.broken(rules, shapes)
    if rule is not None:
        raise ValueError(f"signature.rules: {rule!r} does not hold for the example inputs themselves, {dict(shapes)}")


def _check_optional(parts: _StoredSignature, shapes: Mapping[str, tuple[int, ...]], timestep: str | None) -> None:
    """What may be left out must be inputs whose sizes follow from those of the others."""
    if not set(parts.optional) <= set(parts.names) - {parts.batch, timestep}:
        raise ValueError(f"signature.optional: expected names out of {list(parts.names)}, got {list(parts.optional)}")
    formulas = size_rules.formulas(parts.rules, {name: len(shapes[name]) for name in parts.optional})
    if formulas.keys() != set(parts.optional):
        raise ValueError(
            "signature.optional: the sizes of an input that may be left out do not follow from the others"
        )


def _answer_class(
    path: tuple[str, ...], model: nn.Module | None, fits: Callable[[type], bool] = dataclasses.is_dataclass
) -> type:
    """The class that the denoiser answers with: of diffusers' models, or of the modules of ``model``."""
    if len(path) != 2 or not all(part.isidentifier() for name in path for part in name.split(".")):
        raise ValueError(f"signature.return_type: expected a module and a class, got {list(path)}")
    module, name = path
    if module.startswith(_DIFFUSERS):
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ImportError:
            kind = None
        if kind is None:
            raise NotReadable(f"this version of diffusers has no {module}.{name}, the class that the denoiser returns")
    else:
        kind = _own_class(module, name, model)
    if not isinstance(kind, type) or not fits(kind) or kind.__module__ != module:
        raise Forbidden(f"signature.return_type: {module}.{name} is not a dataclass that a denoiser may return")
    return kind


def _own_class(module: str, name: str, model: nn.Module | None) -> Any:
    """A class by its name as the code of ``model`` knows it: a file must not choose among all that is imported."""
    if model is None:
        raise Forbidden(
            f"signature.return_type: {module}.{name} is not of diffusers; a class of your own is taken from the code"
            " of the float module: give it, load(folder, model=...)"
        )
    for part in model.modules():
        namespace = vars(sys.modules[type(part).__module__])
        kind = next((one for one in namespace.values() if _is_called(one, module, name)), None)
        if kind is not None:
            return kind
    return None


def _is_called(value: Any, module: str, name: str) -> bool:
    return isinstance(value, type) and (value.__module__, value.__qualname__) == (module, name)
