"""Patterns of layers against the names in a module, before anything is recorded or exported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from dmq_ao.graph.roles import ROLES, whole_name

NEAREST = 5
_WEIGHT = ".weight"


def weight_names(denoiser: nn.Module) -> list[str]:
    """Names that layers can have: those of modules with a weight of two axes or more, and of such weights alone."""
    parameters = denoiser.named_parameters(remove_duplicate=False)
    return [name.removesuffix(_WEIGHT) for name, tensor in parameters if tensor.dim() > 1]


def check_layer_patterns(denoiser: nn.Module, patterns: Iterable[str]) -> None:
    """Refuse a pattern that cannot match a layer.

    A layer is called as its weight, a second call of the same one ``name#2``, and a part of a layer that is split
    ``name.part0``; roles begin with ``@``. What passes here may still match no quantizable layer, which only the
    exported graph knows.

    Raises:
        ValueError: naming the pattern and the layers of the nearest names, or the roles.
    """
    names = weight_names(denoiser)
    for pattern in patterns:
        if pattern.startswith("@"):
            if pattern not in ROLES:
                raise ValueError(f"unknown role {pattern!r}; the roles are {list(ROLES)}")
            continue
        patterns_of_wholes = {pattern, whole_name(pattern.partition("#")[0])}
        ends = ("", ".part0")  # what a split layer is called, for patterns like *.part?
        if not any(fnmatchcase(name + end, one) for name in names for end in ends for one in patterns_of_wholes):
            raise ValueError(
                f"pattern {pattern!r} matches no layer of {type(denoiser).__name__}; of {len(names)} names the"
                f" nearest are {', '.join(nearest_names(pattern, names))}"
            )


def nearest_names(pattern: str, names: Iterable[str], count: int = NEAREST) -> list[str]:
    """The names that a pattern comes nearest to, by their endings of as many parts as it has."""
    text = pattern.replace("*", "").strip(".")
    parts = 1 + text.count(".")

    def likeness(name: str) -> float:
        ending = ".".join(name.split(".")[-parts:])
        return max(difflib.SequenceMatcher(None, text, one).ratio() for one in (ending, name))

    return sorted(names, key=lambda name: (-likeness(name), name))[:count]
