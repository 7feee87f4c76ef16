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
