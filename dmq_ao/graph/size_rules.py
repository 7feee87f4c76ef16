"""What an exported graph demands of its inputs' sizes: conditions as text, checked before a call, evaluated by hand.

Export assumes some sizes equal, fixed or divisible, and writes that down as guards. Equations among them are kept, in
the form ``shape['sample'][2] % 2 == 0``; of other conditions, those that ``specialisation`` does not find harmless.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from dmq_ao.graph.private import guards_of

_INPUT = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
Shapes = Mapping[str, Sequence[int]]


def of_program(
    program: torch.export.ExportedProgram, names: Sequence[str], example: Shapes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The equations among a program's guards, and its other conditions.

    Args:
        program: exported with its tensors as ``*tensors``.
        names: of the tensors, in order.
        example: shapes that it was exported with.
    """
    texts = [_INPUT.sub(lambda match: f"shape[{names[int(match[1])]!r}][{match[2]}]", g) for g in guards_of(program)]
    valid = [text for text in dict.fromkeys(texts) if _is_condition(text, example)]
    return tuple(filter(_is_equation, valid)), tuple(text for text in valid if not _is_equation(text))


def broken(rules: Sequence[str], shapes: Shapes) -> str | None:
    """The first rule that shapes break, None when all hold.

    Raises:
        ValueError: for a rule that is no condition on sizes.
    """
    return _first_broken(tuple(rules), tuple((name, tuple(shape)) for name, shape in shapes.items()))


@functools.lru_cache(maxsize=1024)  # a sampler's calls have the same sizes
def _first_broken(rules: tuple[str, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> str | None:
    sizes = dict(shapes)
    return next((rule for rule in rules if not _holds_or_divides_by_zero(rule, sizes)), None)


def _holds_or_divides_by_zero(rule: str, shapes: Shapes) -> bool:
    try:
        return holds(rule, shapes)
    except ValueError as error:
        if isinstance(error.__cause__, ZeroDivisionError):  # sizes so small that nothing is left of them
            return False
        raise


def refusal_text(rule: str, shapes: Shapes, example: Shapes) -> str:
    """What to say of shapes that break a rule: which dimensions it is about, what they are, and what to do."""
    places = dict.fromkeys(re.findall(r"shape\['([^']+)'\]\[(\d+)\]", rule))
    sizes = ", ".join(
        f"{name!r} dimension {axis} is {shapes[name][int(axis)]} ({example[name][int(axis)]} in the example inputs)"
        for name, axis in places
    )
    return (
        f"shapes {dict(shapes)} do not fit the exported graph, which needs {rule}: {sizes}. Its code computes another"
        " way at such sizes, or has them fixed: prepare with example_inputs of these sizes"
    )


def holds(rule: str, shapes: Shapes) -> bool:
    """Whether shapes satisfy a rule.

    >>> holds("shape['x'][1] % 2 == 0", {"x": (1, 6)})
    True

    Raises:
        ValueError: for text that is no condition on sizes, or names a tensor or axis that is not there.
    """
    try:
        return bool(_value(_parsed(rule), shapes))
    except (SyntaxError, KeyError, IndexError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a condition on sizes: {rule!r} ({error!r})") from error


@functools.lru_cache(maxsize=4096)  # the same rules are checked in every call
def _parsed(rule: str) -> ast.expr:
    return ast.parse(rule, mode="eval").body


def _is_condition(rule: str, example: Shapes) -> bool:
    try:
        return holds(rule, example)
    except ValueError:
        return False


def _is_equation(rule: str) -> bool:
    compared = [node for node in ast.walk(ast.parse(rule)) if isinstance(node, ast.Compare)]
    return all(isinstance(op, ast.Eq) for node in compared for op in node.ops)


def _value(node: ast.AST, shapes: Shapes) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, shapes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, shapes), _value(right, shapes))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, shapes), _value(right, shapes))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(value, shapes) for value in values)
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=[_, _, *_] as values, keywords=[]):
            return {"max": max, "min": min}[name](_value(value, shapes) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(value, shapes) for value in values)
        case ast.Subscript(
            value=ast.Subscript(value=ast.Name(id="shape"), slice=ast.Constant(value=str(name))),
            slice=ast.Constant(value=int(axis)),
        ):
            return shapes[name][axis]
    raise ValueError(f"not a condition on sizes: {ast.unparse(node)!r}")


Formula = Callable[[Shapes], int]


def formulas(rules: Sequence[str], unknown: Mapping[str, int]) -> dict[str, tuple[Formula, ...]]:
    """How sizes of some tensors follow from those of the others, where equations among the rules say it.

    Args:
        rules: conditions on sizes.
        unknown: number of axes of each tensor that is not there.

    Returns:
        For each of these whose sizes all follow, a function of the others' shapes for every axis. They are closures of
        arithmetic, which a compiler follows.
    """
    sizes: dict[tuple[str, int], Formula] = {}
    pairs = [pair for rule in rules for pair in _assignments(_parsed(rule)) if pair[0][0] in unknown]
    for _ in range(1 + len(pairs)):
        for place, expression in pairs:
            formula = None if place in sizes else _formula(expression, unknown, sizes)
            if formula is not None:
                sizes[place] = formula
    places = {name: [(name, axis) for axis in range(axes)] for name, axes in unknown.items()}
    return {name: tuple(sizes[one] for one in own) for name, own in places.items() if all(one in sizes for one in own)}


def _assignments(rule: ast.expr) -> list[tuple[tuple[str, int], ast.expr]]:
    """Sides of an equation that are a size, each with the other side."""
    match rule:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            sides = [(left, right), (right, left)]
            return [(place, other) for one, other in sides for place in [_size_place(one)] if place is not None]
    return []


def _size_place(node: ast.expr) -> tuple[str, int] | None:
    match node:
        case ast.Subscript(
            value=ast.Subscript(value=ast.Name(id="shape"), slice=ast.Constant(value=str(name))),
            slice=ast.Constant(value=int(axis)),
        ):
            return name, axis
    return None


def _formula(node: ast.expr, unknown: Mapping[str, int], sizes: Mapping[tuple[str, int], Formula]) -> Formula | None:
    """An expression as a function of the shapes that are there; None where it needs others."""
    place = _size_place(node)
    if place is not None:
        return sizes.get(place) if place[0] in unknown else lambda shapes: shapes[place[0]][place[1]]
    match node:
        case ast.Constant(value=int(value)):
            return lambda shapes: value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _formula(operand, unknown, sizes)
            return None if inner is None else lambda shapes: -inner(shapes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            first, second = _formula(left, unknown, sizes), _formula(right, unknown, sizes)
            if first is None or second is None:
                return None
            compute = _ARITHMETIC[type(op)]
            return lambda shapes: compute(first(shapes), second(shapes))
    return None
