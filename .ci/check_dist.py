"""Check the archives in ``dist/``: every file of the four folders is in both, and the wheel runs outside the checkout.

The wheel is installed alone into a new environment; its dependencies are those of the Python that runs this.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"dmq_ao": "dmq_ao", **{name: f"dmq_ao/{name}" for name in ("observers", "passes", "backends")}}
IMPORTS = """
import importlib, pathlib, pkgutil, sys
import dmq_ao
for _, name, _ in pkgutil.walk_packages(dmq_ao.__path__, "dmq_ao."):
    if name != "dmq_ao.__main__" and not name.startswith("dmq_ao.backends.cuda.triton"):
        importlib.import_module(name)
        assert pathlib.Path(sys.modules[name].__file__).is_relative_to(sys.prefix), name
assert dmq_ao.recipes.dmq("w4a8").name == "dmq"
"""


def only(pattern: str) -> Path:
    """The one archive of a kind.

    Raises:
        SystemExit: when there is none, or more than one.
    """
    archives = sorted((ROOT / "dist").glob(pattern))
    if len(archives) != 1:
        raise SystemExit(f"dist/ holds {len(archives)} of {pattern}, not one; run make dist")
    return archives[0]


def expected_files() -> dict[str, str]:
    """Path in the checkout of every file to be packed, and its path in the wheel."""
    return {
        path.relative_to(ROOT).as_posix(): f"{packed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, packed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_files(wheel: Path, sdist: Path) -> None:
    """Compare both archives with the checkout.

    Raises:
        SystemExit: naming what is missing or too much.
    """
    expected = expected_files()
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    in_sdist = {name for name in inside if name.split("/")[0] in FOLDERS}
    for name, actual, wanted in (
        (wheel.name, in_wheel, set(expected.values())),
        (sdist.name, in_sdist, set(expected)),
    ):
        if actual != wanted:
            raise SystemExit(f"{name}: missing {sorted(wanted - actual)}, too much {sorted(actual - wanted)}")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        if name not in inside:
            raise SystemExit(f"{sdist.name}: {name} is missing")
    data = [name for name in expected if not name.endswith(".py")]
    print(f"{len(expected)} files in both, {len(data)} of them no Python: {', '.join(sorted(data))}")


def check_install(wheel: Path) -> None:
    """Install the wheel into a new environment and run it from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare"
        venv.create(bare, with_pip=False, symlinks=True)
        python = bare / "bin" / "python"
        install = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index"]
        subprocess.run([*install, str(wheel)], check=True)
        # By path alone, so that an editable install of the checkout is not found there.
        (site,) = bare.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        for command in ([python, "-c", IMPORTS], [bare / "bin/dmq-ao", "--help"], [bare / "bin/dmq-ao", "doctor"]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        print(done.stdout)


if __name__ == "__main__":
    check_files(only("*.whl"), only("*.tar.gz"))
    check_install(only("*.whl"))
