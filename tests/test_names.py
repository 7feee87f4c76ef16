"""One thing, one name: what stands at the top of two files, and participles as names of variables.

``python tests/test_names.py`` prints both.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("observers", "passes", "backends")
PARTICIPLES = frozenset(
    [
        "found",
        "given",
        "kept",
        "told",
        "seen",
        "taken",
        "chosen",
        "asked",
        "shown",
        "wanted",
        "drawn",
        "held",
        "known",
        "gone",
        "turned",
        "made",
        "sought",
        "moved",
    ]
)
# The verb and the operator, both of them fixed by what users and stored graphs call; may only become fewer.
KNOWN_TWICE = frozenset(["quantize"])


def source_files() -> list[tuple[str, str]]:
    """Path relative to the root, and source, of every file of the package."""
    files = sorted(path for top in ("dmq_ao", *SIBLINGS) for path in (ROOT / top).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def definitions(source: str) -> Iterator[str]:
    """Functions, classes, constants and aliases at the top of a file; not what it imports."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def defined_twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names with the files that define them, where these are several; dunder names are Python's."""
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for file, source in files:
        for name in set(definitions(source)):
            homes[name].append(file)
    return {name: files for name, files in sorted(homes.items()) if len(files) > 1 and not name.startswith("__")}


def participles(source: str) -> list[str]:
    """``line: name`` of variables, arguments and functions that are called by a bare participle."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.append((node.lineno, node.name))
    return [f"{line}: {name}" for line, name in sorted(names) if name.strip("_") in PARTICIPLES]


def room_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return parts[1 if parts[0] == "dmq_ao" else 0]


FILES = source_files()


def test_one_name_is_one_thing() -> None:
    twice = defined_twice(FILES)
    assert {name: files for name, files in twice.items() if name not in KNOWN_TWICE} == {}
    assert twice.keys() >= KNOWN_TWICE


@pytest.mark.parametrize("room", sorted({room_of(file) for file, _ in FILES}))
def test_variables_are_nouns(room: str) -> None:
    files = [(file, source) for file, source in FILES if room_of(file) == room]
    assert {file: names for file, source in files if (names := participles(source))} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(): ...\nclass C:\n    def g(self): ...", ["f", "C"]),
        ("A = B = 1\nC: int = 2\nD, E = 3, 4", ["A", "B", "C", "D", "E"]),
        ("from x import f\nimport g", []),
        ("A.b = 1\nif A:\n    c = 2", ["A"]),
    ],
)
def test_what_a_file_defines(source: str, names: list[str]) -> None:
    assert list(definitions(source)) == names


def test_two_files_of_one_name_are_seen() -> None:
    files = [("a.py", "X = 1\ndef f(): ..."), ("b.py", "X = 2\ndef g(): ..."), ("c.py", "__all__ = []")]
    assert defined_twice([*files, ("d.py", "__all__ = []")]) == {"X": ["a.py", "b.py"]}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("found = 1", ["1: found"]),
        ("def f(given, *, kept=1): ...", ["1: given", "1: kept"]),
        ("def told(): ...\nclass C:\n    def _seen(self): ...", ["1: told", "3: _seen"]),
        ("for taken in x:\n    [chosen for chosen in taken]", ["1: taken", "2: chosen"]),
        ("x.found = found_layers = y(kept=1)", []),
        ("print(found)", []),
    ],
)
def test_participles_are_seen(source: str, names: list[str]) -> None:
    assert participles(source) == names


def main() -> None:
    for name, files in defined_twice(FILES).items():
        print(f"{name}: {', '.join(files)}")
    for file, source in FILES:
        for name in participles(source):
            print(f"{file}:{name}")


if __name__ == "__main__":
    sys.exit(main())
