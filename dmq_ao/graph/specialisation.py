"""What an export holds to be so about sizes: which of it matters, and must be checked in every call.

Export takes every size that it is not told apart for two or more, and one path wherever the code, or PyTorch, asks for
more. Some of those paths compute the same as the others, some do not. Each condition is broken once, at sizes that the
equations allow, and the operators that the denoiser runs there are compared with those of the graph: where they are
the same, the condition only tells apart ways to compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dmq_ao.graph import size_rules
from dmq_ao.graph.shape_trace import operators_run

Example = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Places = Mapping[str, Sequence[tuple[str, int]]]
MANY_ROWS, MUCH_LARGER = 65, 8
MOST_SEARCHES, LARGEST = 8, 1 << 14


@dataclass(frozen=True)
class Sizes:
    """The free sizes of an export.

    Attributes:
        example: shape and dtype of each tensor.
        places: of each free size, the dimensions that have it: (argument, axis), one or more.
        derived: dimensions whose size follows from the free ones, each with the function of them.
        batch: argument whose axis 0 is the batch.
        device: of the denoiser.
        equations: that all sizes fulfil.
        conditions: that the example fulfils, and other sizes may not.
    """

    example: Example
    places: Places
    derived: Mapping[tuple[str, int], Callable[[Mapping[str, int]], int]]
    batch: str
    device: torch.device
    equations: tuple[str, ...]
    conditions: tuple[str, ...]

    def shapes(self, values: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
        """Shapes with other free sizes; None where the equations do not allow them."""
        shapes = {name: list(shape) for name, (shape, _) in self.example.items()}
        for size, value in values.items():
            for name, axis in self.places[size]:
                shapes[name][axis] = value
        everything = {size: self.value(size) for size in self.places} | dict(values)
        for (name, axis), function in self.derived.items():
            shapes[name][axis] = function(everything)
        fixed = {name: tuple(shape) for name, shape in shapes.items()}
        return fixed if size_rules.broken(self.equations, fixed) is None else None

    def value(self, size: str) -> int:
        """A free size in the example."""
        name, axis = self.places[size][0]
        return self.example[name][0][axis]


def conditions_that_matter(
    sizes: Sizes, denoiser: Callable[..., Any], graph: Callable[..., Any] | None
) -> tuple[str, ...]:
    """The conditions that must be checked in every call, of those in ``sizes`` and of sizes being two or more.

    Args:
        sizes: of the export.
        denoiser: called with the tensors by position.
        graph: that was made of it, called likewise; None where its regions cannot be called without values.
    """
    example = {name: shape for name, (shape, _) in sizes.example.items()}
    if graph is None or not _same_trace(sizes, example, denoiser, graph):  # then nothing is known to be harmless
        return tuple(one for one in sizes.conditions if not _is_of_layout(one))
    search = _Search(sizes, denoiser, graph)
    rows = [size for size, places in sizes.places.items() if (sizes.batch, 0) in places]
    others = [size for size in sizes.places if size not in rows]
    search.look(dict.fromkeys(rows, 1))
    search.look(dict.fromkeys(rows, 3) | {size: 2 * sizes.value(size) for size in others}, always=True)
    search.look({size: _smallest(sizes, size) for size in others})
    search.look(dict.fromkeys(rows, MANY_ROWS))
    search.look({size: MUCH_LARGER * sizes.value(size) for size in others})
    for condition in [one for one in sizes.conditions if one not in search.tested][:MOST_SEARCHES]:
        search.look(_breaking(sizes, condition))
    untested = [one for one in sizes.conditions if one not in search.tested and not _is_of_layout(one)]
    return tuple(dict.fromkeys([*untested, *search.matter()]))


class _Search:
    """Sizes that were looked at, and what is known from them."""

    def __init__(self, sizes: Sizes, denoiser: Callable[..., Any], graph: Callable[..., Any]) -> None:
        self.sizes, self.denoiser, self.graph = sizes, denoiser, graph
        implied = [f"shape[{name!r}][{axis}] >= 2" for name, axis in (place[0] for place in sizes.places.values())]
        self.conditions = list(dict.fromkeys([*sizes.conditions, *implied]))
        self.harmless: set[str] = set()
        self.tested: set[str] = set()
        self.suspects: list[tuple[list[str], Mapping[str, int]]] = []

    def look(self, values: Mapping[str, int], always: bool = False) -> None:
        """Compare at other sizes, at each by itself if not at all together; only where it can teach something."""
        if not values:
            return
        shapes = self.sizes.shapes(values)
        same: bool | None = None
        if shapes is not None:
            broken = [one for one in self.conditions if _is_broken(one, shapes)]
            if not always and not set(broken) - self.harmless:
                return
            same = _same_trace(self.sizes, shapes, self.denoiser, self.graph)
            self.tested |= set(broken)
            if same:
                self.harmless |= set(broken)
            elif len(values) == 1:
                self.suspects.append((broken, values if same is False else {}))
        if not same and len(values) > 1:
            for size, value in values.items():
                self.look({size: value}, always)

    def matter(self) -> list[str]:
        """What tells two ways apart that do not compute the same; sizes that no condition tells apart are fixed."""
        reasons: list[str] = []
        for broken, values in self.suspects:
            conditions = [one for one in broken if one not in self.harmless]
            reasons += conditions or [_fixed(self.sizes, size) for size in values]
        return reasons


def _is_of_layout(condition: str) -> bool:
    """Whether a condition that no sizes were found to break is PyTorch's own: unlike strides, indices of 32 bits."""
    return "!=" in condition or any(int(one) >= 2**31 for one in re.findall(r"\b\d+\b", condition))


def _fixed(sizes: Sizes, size: str) -> str:
    name, axis = sizes.places[size][0]
    return f"shape[{name!r}][{axis}] == {sizes.value(size)}"


def _is_broken(condition: str, shapes: size_rules.Shapes) -> bool:
    return size_rules.broken((condition,), shapes) is not None


def _smallest(sizes: Sizes, size: str) -> int:
    """The smallest that the equations allow."""
    value = sizes.value(size)
    return next((one for one in range(1, value) if sizes.shapes({size: one}) is not None), value)


def _breaking(sizes: Sizes, condition: str) -> dict[str, int]:
    """One size that breaks a condition where the others stay; empty if none is found near the condition's numbers."""
    numbers = {int(one) for one in re.findall(r"(?<!\[)\b\d+\b(?!\])", condition)}
    near = sorted({n + d for n in numbers for d in (-1, 0, 1)} | {2 * n for n in numbers})
    for size, places in sizes.places.items():
        if not any(f"shape[{name!r}][{axis}]" in condition for name, axis in places):
            continue
        for value in (one for one in near if 0 < one < LARGEST):
            shapes = sizes.shapes({size: value})
            if shapes is not None and _is_broken(condition, shapes):
                return {size: value}
    return {}


def _same_trace(
    sizes: Sizes, shapes: Mapping[str, tuple[int, ...]], denoiser: Callable[..., Any], graph: Callable[..., Any]
) -> bool | None:
    """Whether both run the same; None where the denoiser itself refuses these sizes."""
    inputs = {name: (shapes[name], dtype) for name, (_, dtype) in sizes.example.items()}
    try:
        expected = operators_run(denoiser, inputs, sizes.device)
    except Exception:  # of any type: the denoiser's own
        return None
    try:
        return operators_run(graph, inputs, sizes.device) == expected
    except Exception:  # of any type: an operator's
        return False
