"""What is installed is what stands in the tree, and nothing of it has a general name."""

import ast
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("observers", "passes", "backends")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): pin for name, pin in pairs}


def packages_in_tree() -> set[str]:
    """Every folder of the four that holds Python files, by its installed name."""
    folders = {path.parent.relative_to(ROOT) for top in ("dmq_ao", *SIBLINGS) for path in (ROOT / top).rglob("*.py")}
    return {".".join(folder.parts if folder.parts[0] == "dmq_ao" else ("dmq_ao", *folder.parts)) for folder in folders}


def folder_of(package: str, package_dir: dict[str, str]) -> Path:
    """Where setuptools looks for a package: the longest mapped prefix, then the rest of the name."""
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in package_dir:
            return ROOT.joinpath(package_dir[prefix], *parts[length:])
    return ROOT.joinpath(package_dir.get("", "."), *parts)


def test_packages_are_those_of_the_tree(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_in_tree()


def test_every_package_is_found_and_is_a_regular_package(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    missing = [
        package
        for package in setuptools["packages"]
        if not (folder_of(package, setuptools["package-dir"]) / "__init__.py").is_file()
    ]
    assert missing == []


def test_the_siblings_are_mapped(pyproject: dict[str, Any]) -> None:
    package_dir = pyproject["tool"]["setuptools"]["package-dir"]
    assert {name: package_dir.get(f"dmq_ao.{name}") for name in SIBLINGS} == {name: name for name in SIBLINGS}


@pytest.mark.parametrize("name", SIBLINGS)
def test_no_folder_in_the_package_hides_a_sibling(name: str) -> None:
    assert not (ROOT / "dmq_ao" / name).exists()
    assert not (ROOT / "dmq_ao" / f"{name}.py").exists()


def test_the_wheel_holds_only_our_name(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    assert all(package.split(".")[0] == "dmq_ao" for package in setuptools["packages"])
    assert {name.split(".")[0] for name in setuptools["package-data"]} == {"dmq_ao"}
    assert not {"py-modules", "data-files"} & set(setuptools)


def test_the_wheel_holds_the_data(pyproject: dict[str, Any]) -> None:
    patterns = pyproject["tool"]["setuptools"]["package-data"]["dmq_ao"]
    package = ROOT / "dmq_ao"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    data = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert package / "py.typed" in packed
    assert data - packed == set()


def test_the_wheel_holds_the_kernels(pyproject: dict[str, Any]) -> None:
    data = pyproject["tool"]["setuptools"]["package-data"]
    rooms = {name: ROOT / "backends" / name.split(".")[2] for name in data if name.startswith("dmq_ao.backends.")}
    packed = {path for name, room in rooms.items() for pattern in data[name] for path in room.glob(pattern)}
    kernels = (path for path in (ROOT / "backends").rglob("*") if path.suffix not in {"", ".py", ".pyc"})
    assert packed == set(kernels) != set()


def test_the_command_exists(pyproject: dict[str, Any]) -> None:
    module, function = pyproject["project"]["scripts"]["dmq-ao"].split(":")
    path = ROOT.joinpath(*module.split("."), "__init__.py")
    assert path.is_file()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_dependency_is_pinned_within_its_range(pyproject: dict[str, Any], pins: dict[str, str]) -> None:
    project = pyproject["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, lines + pyproject["build-system"]["requires"]):
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(project["name"]):
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow the pin {pins[name]}"


def test_pins_are_plain_releases(pins: dict[str, str]) -> None:
    assert {name: pin for name, pin in pins.items() if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", pin)} == {}


def test_hooks_have_the_pinned_versions(pins: dict[str, str]) -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = re.findall(r'"([\w-]+)==([\d.]+)"', text)
    assert {name for name, _ in hooks} == {"ruff", "codespell", "pytest"}
    assert all(pins[name] == pin for name, pin in hooks), hooks


def test_the_extra_for_tests_brings_what_the_others_need(pyproject: dict[str, Any]) -> None:
    requirements = map(Requirement, pyproject["project"]["optional-dependencies"]["test"])
    assert any({"cli", "report", "eval", "max"} <= requirement.extras for requirement in requirements)


def test_the_installed_version_is_this_one(pyproject: dict[str, Any]) -> None:
    try:
        installed = version("dmq_ao")
    except PackageNotFoundError:
        pytest.skip("dmq_ao is not installed")
    assert installed == pyproject["project"]["version"]
