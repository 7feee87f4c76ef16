"""The patterns by which a recipe names layers, and the error for one that names none."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from dmq_ao.config import QuantConfig


def patterns(config: QuantConfig) -> Iterator[tuple[str, str]]:
    """Every pattern of layers in a config, with the field that it stands in."""
    for pattern in config.keep_float:
        yield "keep_float", pattern
    for override in config.overrides:
        yield "override", override.pattern
    for pattern in config.power_of_two.layers if config.power_of_two else ():
        yield "power_of_two", pattern


def no_match(field: str, pattern: str, names: Collection[str]) -> ValueError:
    """The error for a pattern that no layer's name matches, with the names nearest to it."""
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or sorted(names)[:5]
    return ValueError(f"{field}: pattern {pattern!r} matches no layer; near ones of {len(names)} are {near}")
