"""Public docstrings say the shapes of tensors, in brackets, and every error that is raised.

``python tests/test_docstrings.py`` prints the share of each room, and what is missing where.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("observers", "passes", "backends")
# ``[N, C, ...]``, ``[rows]`` or ``[]``; not ``dict[str, Tensor]``, ``names[0]``, or the ranges [0, 1] and [low, high].
_AXIS = r"(?:\.\.\.|[\w*./ +()-]+)"
SHAPE = re.compile(
    rf"(?<![\w\])])\[(?!low\b)(?:|\d+|(?:\.\.\.|[A-Za-z*][\w*./ +()-]*|[1-9]\d*(?=,[^\]]*[A-Za-z.]))(?:, *{_AXIS})*)\]"
)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Subject:
    """A public function, method or class, with what its docstring should say.

    Attributes:
        place: ``file:line name``.
        room: of ``CONTRIBUTING.md``.
        docstring: as it is written, empty without one.
        has_tensors: whether an argument, the result or a field is annotated with ``Tensor``.
        errors: names of the exceptions that its own body raises.
    """

    place: str
    room: str
    docstring: str
    has_tensors: bool
    errors: frozenset[str]

    @property
    def lacks_shape(self) -> bool:
        return self.has_tensors and not SHAPE.search(self.docstring)

    @property
    def unsaid(self) -> list[str]:
        return sorted(name for name in self.errors if name not in WORD.findall(self.docstring))


def subjects(path: Path, source: str) -> Iterator[Subject]:
    """Of a file, ``path`` relative to the root."""
    room = path.with_suffix("").parts[1 if path.parts[0] == "dmq_ao" else 0]
    yield from _subjects(ast.parse(source), path.as_posix(), room, "")


def _subjects(parent: ast.AST, file: str, room: str, prefix: str) -> Iterator[Subject]:
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name, docstring = prefix + node.name, ast.get_docstring(node, clean=False) or ""
        if isinstance(node, ast.ClassDef):
            fields = [child.annotation for child in node.body if isinstance(child, ast.AnnAssign)]
            annotations, errors = fields, frozenset[str]()
        else:
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            annotations = [one.annotation for one in every if one and one.annotation]
            annotations += [node.returns] if node.returns else []
            errors = frozenset(_errors(node))
        has_tensors = any("Tensor" in WORD.findall(ast.unparse(one)) for one in annotations)
        yield Subject(f"{file}:{node.lineno} {name}", room, docstring, has_tensors, errors)
        if isinstance(node, ast.ClassDef):
            yield from _subjects(node, file, room, f"{name}.")


def _errors(parent: ast.AST) -> Iterator[str]:
    """Names in ``raise Name(...)`` of a body, without the functions inside and without those of the command line."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Try):
            words = {word for one in node.handlers for word in WORD.findall(ast.unparse(one.type) if one.type else "")}
            body = ast.Module(node.body, [])
            yield from (name for name in _errors(body) if name not in words)
            yield from _errors(ast.Module([*node.handlers, *node.orelse, *node.finalbody], []))  # type: ignore[list-item]
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id[0].isupper():
                yield error.id
        yield from _errors(node)


def house() -> list[Subject]:
    files = sorted(path for top in ("dmq_ao", *SIBLINGS) for path in (ROOT / top).rglob("*.py"))
    return [one for path in files for one in subjects(path.relative_to(ROOT), path.read_text(encoding="utf-8"))]


def share(several: list[Subject]) -> float:
    """Percent of those with tensors that say a shape; 100 where there are none."""
    tensors = [one for one in several if one.has_tensors]
    return 100 * sum(not one.lacks_shape for one in tensors) / len(tensors) if tensors else 100.0


def by_room(several: list[Subject]) -> dict[str, list[Subject]]:
    return {room: [one for one in several if one.room == room] for room in sorted({one.room for one in several})}


HOUSE = house()


@pytest.mark.parametrize("room", sorted({one.room for one in HOUSE}))
def test_shapes_are_said(room: str) -> None:
    assert [one.place for one in by_room(HOUSE)[room] if one.lacks_shape] == []


@pytest.mark.parametrize("room", sorted({one.room for one in HOUSE}))
def test_errors_are_said(room: str) -> None:
    assert [f"{one.place}: {one.unsaid}" for one in by_room(HOUSE)[room] if one.unsaid] == []


def test_the_house_has_tensors_and_errors() -> None:
    assert sum(one.has_tensors for one in HOUSE) > 200
    assert sum(bool(one.errors) for one in HOUSE) > 100


@pytest.mark.parametrize(
    "docstring",
    [
        "Of x [B, ...].",
        "[N, C, H, W] in 0..1.",
        "codes [ceil(rows / 2), n]",
        "scalars [] float32",
        "``[B]`` float64",
        "[rows] or [rows, channels]",
        "of any shape [...]",
        "[*, C]",
        "[1, C]",
        "[0] where there is none",
    ],
)
def test_a_shape_is_seen(docstring: str) -> None:
    assert SHAPE.search(docstring)


@pytest.mark.parametrize(
    "docstring",
    [
        "dict[str, Tensor]",
        "names[0]",
        "in [0, 1]",
        "``[0, 2**bits - 1]``",
        "ranges ``[low, high]``",
        "[1 / limit, 4]",
        "[-limit, limit)",
        "",
    ],
)
def test_what_is_no_shape_is_not_seen(docstring: str) -> None:
    assert not SHAPE.search(docstring)


@pytest.mark.parametrize(
    ("source", "has_tensors", "errors"),
    [
        ("def f(x: Tensor) -> None: ...", True, []),
        ("def f(x: dict[str, torch.Tensor]) -> None: ...", True, []),
        ("def f() -> tuple[Tensor, int]: ...", True, []),
        ("def f(*x: Tensor) -> None: ...", True, []),
        ("class C:\n    x: Tensor", True, []),
        ("def f(x: TensorConfig) -> GraphTensors: ...", False, []),
        ("def f(x):\n    if x:\n        raise ValueError(x)\n    raise TypeError", False, ["TypeError", "ValueError"]),
        ("def f(x):\n    'Raises TypeError.'\n    raise TypeError(x)", False, []),
        ("def f(x):\n    def g():\n        raise TypeError\n    return g", False, []),
        (
            "def f():\n    try:\n        raise ValueError\n    except ValueError as e:\n        raise OSError from e",
            False,
            ["OSError"],
        ),
        ("def f(x):\n    try:\n        raise KeyError\n    except ValueError:\n        raise", False, ["KeyError"]),
        ("def f(x):\n    raise typer.Exit(1)", False, []),
    ],
)  # fmt: skip
def test_what_a_docstring_owes(source: str, has_tensors: bool, errors: list[str]) -> None:
    (subject,) = subjects(Path("dmq_ao/records/record.py"), source)
    assert (subject.has_tensors, subject.unsaid, subject.room) == (has_tensors, errors, "records")


def test_names_with_an_underscore_owe_nothing() -> None:
    private = "def _f(x: Tensor): ...\nclass _C:\n    def g(self, x: Tensor): ..."
    source = f"{private}\nclass D:\n    def __call__(self, x: Tensor): ..."
    assert [one.place for one in subjects(Path("passes/x.py"), source)] == ["passes/x.py:4 D"]


def main() -> None:
    several = house()
    for one in several:
        if one.lacks_shape:
            print(f"{one.place}: no shape")
        if one.unsaid:
            print(f"{one.place}: raises {', '.join(one.unsaid)}")
    for room, some in by_room(several).items():
        count, errors = sum(one.has_tensors for one in some), sum(len(one.unsaid) for one in some)
        print(f"{room:16s} shapes {share(some):5.1f} % of {count:3d}, errors unsaid {errors}")
    print(f"{'all':16s} shapes {share(several):5.1f} % of {sum(one.has_tensors for one in several):3d}")


if __name__ == "__main__":
    sys.exit(main())
