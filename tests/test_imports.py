"""The house has no circles: every import points to a lower floor."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("observers", "passes", "backends")  # top-level folders, installed as dmq_ao.<name>

FLOORS = (
    "config numerics graph evaluation",
    "records recipes samples objectives",
    "observers passes serialization",
    "quantizer backends denoiser",
    "algorithms mixed_precision",
    "api",
    "pipelines",
    "benchmarks",
    "cli __init__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def source_files(root: Path) -> list[Path]:
    return sorted(path for top in ("dmq_ao", *SIBLINGS) for path in (root / top).rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file stands in, for a path relative to the root: a folder or file of ``dmq_ao``, or a sibling."""
    parts = path.with_suffix("").parts
    room = parts[1] if parts[0] == "dmq_ao" else parts[0]
    return "cli" if room == "__main__" else room


def absolute_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of everything imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def faults(path: Path, source: str) -> list[str]:
    """What the imports of ``source``, standing at ``path`` relative to the root, do against the rules."""
    here = room_of(path)
    if here not in FLOOR:
        return [f"{path}: {here} has no floor yet; give it one in {Path(__file__).name}"]
    found = []
    for line, name in absolute_imports(ast.parse(source)):
        top, *rest = name.split(".")
        target = rest[0] if rest else "__init__"  # `import dmq_ao` is an import of the public names
        if top == "":
            found.append(f"{path}:{line}: relative import of {name}; write it absolute")
        elif top in SIBLINGS:
            found.append(f"{path}:{line}: import of {name}; write dmq_ao.{name}, or there are two copies of it")
        elif top != "dmq_ao" or target == here:
            continue
        elif target not in FLOOR:
            found.append(f"{path}:{line}: import of {name}: {target} has no floor")
        elif FLOOR[target] >= FLOOR[here]:
            found.append(f"{path}:{line}: {here} (floor {FLOOR[here]}) imports {target} (floor {FLOOR[target]})")
    return found


@pytest.mark.parametrize("path", source_files(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert faults(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_siblings_are_imported_through_the_package(folder: str) -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in absolute_imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in SIBLINGS
    ]
    assert bare == []


def test_no_room_has_two_floors() -> None:
    assert len(FLOOR) == sum(len(rooms.split()) for rooms in FLOORS)


def test_there_are_nine_floors_and_few_rooms() -> None:
    assert len(FLOORS) == 9
    assert len(FLOOR) <= 24


def test_contributing_shows_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {int(floor): set(re.findall(r"`(\w+)`", rooms)) for floor, rooms in rows}
    assert shown == {floor: set(rooms.split()) for floor, rooms in enumerate(FLOORS)}


def test_the_state_of_a_graph_is_read_where_it_is_kept() -> None:
    """``meta`` of a graph module, a bag that anybody can drop things into, is touched in one file a room only."""
    bag = re.compile(r"\b(?:gm|model|prepared|captured|copied|quantized|lowered|module|plan)\.meta\b")
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in source_files(ROOT)
        if bag.search(path.read_text(encoding="utf-8"))
    }
    assert readers <= {"dmq_ao/graph/capture.py", "dmq_ao/quantizer/prepared.py"}


def test_files_are_short() -> None:
    """No file over 350 lines."""
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in source_files(ROOT)}
    long = {path.relative_to(ROOT).as_posix() for path, count in lines.items() if count > 350}
    assert long == set()


def test_functions_are_short_and_take_few_arguments() -> None:
    """At most 80 lines and 12 arguments, outside the command line, whose options are arguments."""
    long = []
    for path in source_files(ROOT):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                if (node.end_lineno or 0) - node.lineno >= 80 or count > 12:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def test_every_folder_is_visited() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in source_files(ROOT)} == {"dmq_ao", *SIBLINGS}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dmq_ao/records.py", "from dmq_ao.numerics import round_ste"),
        ("observers/mse.py", "from dmq_ao.observers.minmax import MinMaxObserver"),
        ("dmq_ao/samples/select.py", "from dmq_ao.samples.calibration_set import CalibrationSet"),
        ("dmq_ao/api/quantize.py", "import dmq_ao.backends.reference"),
        ("dmq_ao/cli/demo.py", "def main():\n    from dmq_ao.benchmarks.demo import run"),
        ("dmq_ao/__init__.py", "from dmq_ao import recipes\nfrom dmq_ao.api.quantize import prepare"),
        ("dmq_ao/config/recipe.py", "import json\nfrom torch import Tensor\nfrom torchao.quantization import pt2e"),
    ],
)
def test_guard_lets_legal_imports_pass(path: str, source: str) -> None:
    assert faults(Path(path), source) == []


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        pytest.param("dmq_ao/graph/edit.py", "from dmq_ao.api.quantize import prepare", "imports api", id="upward"),
        pytest.param("passes/fold.py", "import dmq_ao.cli", "imports cli", id="upward, plain import"),
        pytest.param("dmq_ao/graph/edit.py", "from dmq_ao import numerics", "imports numerics", id="same floor"),
        pytest.param("observers/mse.py", "from dmq_ao.passes.x import y", "imports passes", id="room beside"),
        pytest.param(
            "dmq_ao/config/stages.py", "def f():\n    from dmq_ao.recipes import dmq", ":2: config", id="in a function"
        ),
        pytest.param(
            "dmq_ao/config/stages.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmq_ao.graph import walk",
            "imports graph",
            id="for types only",
        ),
        pytest.param("dmq_ao/cli/demo.py", "import dmq_ao", "imports __init__", id="the package from below"),
        pytest.param("dmq_ao/cli/demo.py", "from dmq_ao import prepare", "prepare has no floor", id="unknown name"),
        pytest.param("dmq_ao/api/quantize.py", "from .graph import walk", "relative import", id="relative"),
        pytest.param("dmq_ao/api/quantize.py", "from . import graph", "relative import", id="relative, bare dot"),
        pytest.param("dmq_ao/api/save.py", "from observers.mse import x", "write dmq_ao.observers", id="bare from"),
        pytest.param("dmq_ao/api/save.py", "import observers", "write dmq_ao.observers", id="bare import"),
        pytest.param("dmq_ao/helpers.py", "", "helpers has no floor", id="file without a floor"),
        pytest.param("dmq_ao/extras/new.py", "", "extras has no floor", id="folder without a floor"),
    ],
)
def test_guard_catches_planted_faults(path: str, source: str, words: str) -> None:
    (fault,) = faults(Path(path), source)
    assert words in fault
