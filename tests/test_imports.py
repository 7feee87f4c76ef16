"""The house has no circles: every import points to a lower floor."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("observers", "passes", "backends")  # top-level folders, installed as dmq_ao.<name>

FLOORS = (
    "arguments as_json numerics patch_embed size_rules stages values",
    "config segments",
    "ops layer graph",
    "noise serialization",
    "roles",
    "bit_plan low_rank observers passes objectives calibration evaluation moments state stream",
    "allocation annotate learn recipes backends module named",
    "layer_rows blocks roofline doctor",
    "feature_node learn_blocks relations",
    "observe reconstruct distill sensitivity",
    "bit_errors",
    "search_bits",
    "calibrate",
    "quantize compile",
    "saving prompts",
    "diffusers_adapter",
    "measure verify",
    "peer_benchmark",
    "demo benchmark compare gallery ptq",
    "terminal cli_output",
    "commands",
    "cli",
    "__init__ __main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def source_files(root: Path) -> list[Path]:
    return sorted(path for top in ("dmq_ao", *SIBLINGS) for path in (root / top).rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file stands in, for a path relative to the root: a folder or file of ``dmq_ao``, or a sibling."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "dmq_ao" else parts[0]


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


def test_every_folder_is_visited() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in source_files(ROOT)} == {"dmq_ao", *SIBLINGS}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dmq_ao/graph.py", "from dmq_ao.numerics import round_ste"),
        ("observers/mse.py", "from dmq_ao.observers.minmax import MinMaxObserver"),
        ("dmq_ao/calibration/select.py", "from dmq_ao.calibration.samples import CalibrationSet"),
        ("dmq_ao/quantize.py", "import dmq_ao.backends.reference"),
        ("dmq_ao/cli.py", "def main():\n    from dmq_ao.demo import run"),
        ("dmq_ao/__init__.py", "from dmq_ao import recipes\nfrom dmq_ao.quantize import prepare"),
        ("dmq_ao/config.py", "import json\nfrom torch import Tensor\nfrom torchao.quantization import pt2e"),
    ],
)
def test_guard_lets_legal_imports_pass(path: str, source: str) -> None:
    assert faults(Path(path), source) == []


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        pytest.param("dmq_ao/graph.py", "from dmq_ao.quantize import prepare", "imports quantize", id="upward"),
        pytest.param("passes/fold.py", "import dmq_ao.cli", "imports cli", id="upward, plain import"),
        pytest.param("dmq_ao/ops.py", "from dmq_ao import layer", "imports layer", id="same floor"),
        pytest.param("observers/mse.py", "from dmq_ao.passes.x import y", "imports passes", id="room beside"),
        pytest.param(
            "dmq_ao/config.py", "def f():\n    from dmq_ao.recipes import dmq", ":2: config", id="inside a function"
        ),
        pytest.param(
            "dmq_ao/config.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmq_ao.graph import walk",
            "imports graph",
            id="for types only",
        ),
        pytest.param("dmq_ao/demo.py", "import dmq_ao", "imports __init__", id="the package from below"),
        pytest.param("dmq_ao/cli.py", "from dmq_ao import prepare", "prepare has no floor", id="unknown name"),
        pytest.param("dmq_ao/quantize.py", "from .graph import walk", "relative import", id="relative"),
        pytest.param("dmq_ao/quantize.py", "from . import graph", "relative import", id="relative, bare dot"),
        pytest.param("dmq_ao/quantize.py", "from observers.mse import x", "write dmq_ao.observers", id="bare from"),
        pytest.param("dmq_ao/quantize.py", "import observers", "write dmq_ao.observers", id="bare import"),
        pytest.param("dmq_ao/helpers.py", "", "helpers has no floor", id="file without a floor"),
        pytest.param("dmq_ao/extras/new.py", "", "extras has no floor", id="folder without a floor"),
    ],
)
def test_guard_catches_planted_faults(path: str, source: str, words: str) -> None:
    (fault,) = faults(Path(path), source)
    assert words in fault
