"""What an exported graph demands of its inputs' sizes: equations as text, checked before a call, evaluated by hand.

Export assumes some sizes equal, fixed or divisible, and writes that down as guards. Equations among them are kept, in
the form ``shape['sample'][2] % 2 == 0``; inequalities, which only tell apart ways to compute the same, are not.
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
Shapes = Mapping[str, Sequence[int]]


def of_program(program: torch.export.ExportedProgram, names: Sequence[str], example: Shapes) -> tuple[str, ...]:
    """The equations among a program's guards.

    Args:
        program: exported with its tensors as ``*tensors``.
        names: of the tensors, in order.
        example: shapes that it was exported with.
    """
    rules: dict[str, None] = {}
    for guard in guards_of(program):
        rule = _INPUT.sub(lambda found: f"shape[{names[int(found[1])]!r}][{found[2]}]", guard)
        if _is_equation(rule, example):
            rules[rule] = None
    return tuple(rules)


def broken(rules: Sequence[str], shapes: Shapes) -> str | None:
    """The first rule that shapes break, None when all hold.

    Raises:
        ValueError: for a rule that is no equation of sizes.
    """
    return next((rule for rule in rules if not holds(rule, shapes)), None)


def holds(rule: str, shapes: Shapes) -> bool:
    """Whether shapes satisfy a rule.

    >>> holds("shape['x'][1] % 2 == 0", {"x": (1, 6)})
    True

    Raises:
        ValueError: for text that is no equation of sizes, or names a tensor or axis that is not there.
    """
    try:
        return bool(_value(_parsed(rule), shapes))
    except (SyntaxError, KeyError, IndexError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an equation of sizes: {rule!r} ({error!r})") from error


@functools.lru_cache(maxsize=4096)  # the same rules are checked in every call
def _parsed(rule: str) -> ast.expr:
    return ast.parse(rule, mode="eval").body


def _is_equation(rule: str, example: Shapes) -> bool:
    try:
        return holds(rule, example) and all(
            isinstance(op, ast.Eq)
            for node in ast.walk(ast.parse(rule))
            if isinstance(node, ast.Compare)
            for op in node.ops
        )
    except ValueError:
        return False


def _value(node: ast.AST, shapes: Shapes) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, shapes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, shapes), _value(right, shapes))
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
            return _value(left, shapes) == _value(right, shapes)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(value, shapes) for value in values)
        case ast.Subscript(
            value=ast.Subscript(value=ast.Name(id="shape"), slice=ast.Constant(value=str(name))),
            slice=ast.Constant(value=int(axis)),
        ):
            return shapes[name][axis]
    raise ValueError(f"not an equation of sizes: {ast.unparse(node)!r}")
