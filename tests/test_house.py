"""Rules of the house beside its floors: stages apart, a true table of what to touch."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dmq_ao", "observers", "passes", "backends")
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# A stage learns or decides something in a calibration; what stages share stands in files that are none.
STAGES = {
    "dmq_ao.algorithms.ranges",
    "dmq_ao.algorithms.scaling",
    "dmq_ao.algorithms.rounding",
    "dmq_ao.algorithms.bias_correction",
    "dmq_ao.algorithms.layerwise",
    "dmq_ao.algorithms.blockwise",
    "dmq_ao.algorithms.distillation",
    "dmq_ao.mixed_precision.search_bits",
    "dmq_ao.mixed_precision.sensitivity",
}
# Each applies stages to one thing after another, of a pass over the graph: the inputs, weights and blocks.
APPLIES_STAGES = {
    "dmq_ao.algorithms.inputs",
    "dmq_ao.algorithms.weights",
    "dmq_ao.algorithms.block_learner",
}
SHARED_BY_STAGES = {
    "dmq_ao.algorithms.blocks",
    "dmq_ao.algorithms.dequantized_codes",
    "dmq_ao.algorithms.features",
    "dmq_ao.algorithms.holdout",
    "dmq_ao.algorithms.layer_noise",
    "dmq_ao.algorithms.layer_rows",
    "dmq_ao.algorithms.low_rank",
    "dmq_ao.algorithms.moments",
    "dmq_ao.algorithms.relations",
    "dmq_ao.algorithms.row_layout",
    "dmq_ao.algorithms.sampled_rows",
    "dmq_ao.algorithms.stream",
    "dmq_ao.algorithms.teacher_outputs",
    "dmq_ao.algorithms.units",
}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """Its installed name, for a path relative to the root."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "dmq_ao" else ("dmq_ao", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported: of ``from a import b``, both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))


def stages_imported(trees: dict[str, ast.Module], files: set[str]) -> set[tuple[str, str]]:
    """Pairs of one of ``files`` and a stage that it imports, other than itself."""
    return {
        (here, there)
        for here in files & trees.keys()
        for there in set(imported_modules(trees[here])) & (STAGES - {here})
    }


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_of(path.relative_to(ROOT)): parsed(path) for path in sources()}


def test_stages_do_not_import_each_other(trees: dict[str, ast.Module]) -> None:
    assert stages_imported(trees, STAGES) == set()


def test_what_stages_share_imports_none(trees: dict[str, ast.Module]) -> None:
    assert stages_imported(trees, SHARED_BY_STAGES) == set()


def test_what_applies_stages_imports_them(trees: dict[str, ast.Module]) -> None:
    assert {here for here, _ in stages_imported(trees, APPLIES_STAGES)} == APPLIES_STAGES


def test_every_file_of_the_room_is_a_stage_or_shared_by_them(trees: dict[str, ast.Module]) -> None:
    files = {module for module in trees if module.startswith("dmq_ao.algorithms.")}
    stages = {one for one in STAGES if one.startswith("dmq_ao.algorithms.")}
    assert files == stages | APPLIES_STAGES | SHARED_BY_STAGES
    assert len(files) == len(stages) + len(APPLIES_STAGES) + len(SHARED_BY_STAGES)
    assert trees.keys() >= STAGES


def test_the_rules_find_what_they_are_for() -> None:
    planted = {
        "dmq_ao.algorithms.ranges": "def f():\n    from dmq_ao.algorithms.distillation import distill",
        "dmq_ao.algorithms.rounding": "from dmq_ao.algorithms import ranges, stream",
        "dmq_ao.algorithms.stream": "import dmq_ao.algorithms.scaling",
    }
    trees = {name: ast.parse(source) for name, source in planted.items()}
    assert stages_imported(trees, STAGES) == {
        ("dmq_ao.algorithms.ranges", "dmq_ao.algorithms.distillation"),
        ("dmq_ao.algorithms.rounding", "dmq_ao.algorithms.ranges"),
    }
    assert stages_imported(trees, SHARED_BY_STAGES) == {("dmq_ao.algorithms.stream", "dmq_ao.algorithms.scaling")}


# --- CONTRIBUTING ------------------------------------------------------------


def table_rows(heading: str) -> list[list[str]]:
    """Cells of the rows of the table under a heading."""
    section = CONTRIBUTING.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def paths_in(text: str) -> set[str]:
    """What stands in backticks and is a path: with a slash or a known ending, and no placeholder."""
    words = {word for code in re.findall(r"`([^`]+)`", text) for word in code.split()}
    return {word for word in words if re.fullmatch(r"[\w./-]+", word) and ("/" in word or Path(word).suffix == ".py")}


def test_every_path_that_contributing_names_is_there() -> None:
    paths = paths_in(CONTRIBUTING.read_text(encoding="utf-8"))
    assert len(paths) > 10
    assert not sorted(path for path in paths if not (ROOT / path).exists())


def test_every_row_of_what_to_touch_names_what_is_there() -> None:
    rows = table_rows("To add X, touch Y")
    assert len(rows) > 8
    for wanted, touched, check in rows:
        words = re.findall(r"`([^`]+)`", touched)
        assert words or "above" in touched, wanted
        for word in words:
            folder = word.replace("<device>", "cuda")
            assert (ROOT / folder).exists() or folder in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), word
        assert check, wanted


def test_every_command_that_contributing_names_is_a_target() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", text))
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets
    assert {"test", "lint", "coverage", "dist"} <= named
