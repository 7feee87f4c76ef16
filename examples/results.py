"""The stored results of the ablation that today's code would not measure alike, and how to measure one anew.

    python examples/results.py                                     # a line a row that is not current
    python examples/results.py --all                               # and those that are
    python examples/results.py --rerun demo/w4a8/default.json      # measure one again, in its place
    python examples/results.py --rerun ddpm64/w4a8/default.json -- --loaders MODELS/loaders.py --samples 160

A row is *current* where the digest of its recipe is that of the recipe that today's code makes under its name. Rows
of before digests were stored are told apart by the recipe that they hold: as today's, or another one. The commit is
stored beside the digest: arithmetic may change while a recipe stays. What follows ``--`` goes to ``ablation.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation import variants

from dmq_ao.benchmarks.provenance import COMMIT, Standing, standing

STORED = Path(__file__).parent / "results" / "ablation"


@dataclass(frozen=True)
class Row:
    """A stored result: its file below the folder, what it holds, and how it stands."""

    file: str
    result: dict[str, Any]
    standing: Standing

    def __str__(self) -> str:
        commit = (self.result.get(COMMIT) or "unknown commit")[:12]
        error, date = self.result["one_step_error"], self.result["date"]
        return f"{self.standing.value:30}{self.file}  {error:.4f}  {date}  {commit}"


def rows(folder: Path) -> list[Row]:
    """Every result that is a file of its own below a folder of ``examples/ablation.py``."""
    files = sorted(file for file in folder.glob("*/*/*.json") if file.is_file())
    return [_row(folder, file) for file in files]


def _row(folder: Path, file: Path) -> Row:
    result = json.loads(file.read_text())
    build = variants().get(result["variant"])
    how = Standing.STALE if build is None else standing(result, build(result["bits"]))
    return Row(file.relative_to(folder).as_posix(), result, how)


def rerun(folder: Path, name: str, more: Sequence[str]) -> int:
    """Measure one result again. The old file is put back where that fails.

    Raises:
        ValueError: for a name that is no stored result, or of a variant that is gone.
    """
    known = {row.file: row for row in rows(folder)}
    if name not in known:
        raise ValueError(f"{name} is no stored result of {folder}; python examples/results.py --all lists them")
    result = known[name].result
    if result["variant"] not in variants():
        raise ValueError(
            f"{name}: examples/ablation.py has no variant {result['variant']!r} any more; remove the file"
        )
    file, aside = folder / name, (folder / name).with_suffix(".before")
    script = str(Path(__file__).with_name("ablation.py"))
    what = ("--models", result["model"], "--bits", result["bits"], "--variants", result["variant"])
    command = [sys.executable, script, *what, "--seeds", str(result["seed"]), "-o", str(folder), *more]
    os.replace(file, aside)
    code = subprocess.run(command, check=False).returncode
    if file.exists():
        aside.unlink()
    else:
        os.replace(aside, file)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """List, or measure one again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=STORED, help="of examples/ablation.py")
    parser.add_argument("--all", action="store_true", help="current rows, too")
    parser.add_argument("--rerun", metavar="FILE", help="one of the files that are listed")
    own, _, more = _split(sys.argv[1:] if arguments is None else list(arguments))
    args = parser.parse_args(own)
    if args.rerun is not None:
        try:
            return rerun(args.folder, args.rerun, more)
        except ValueError as error:
            parser.error(str(error))
    found = rows(args.folder)
    for row in found:
        if args.all or row.standing is not Standing.CURRENT:
            print(row)
    counts = Counter(row.standing for row in found)
    print(", ".join(f"{counts[one]} {one.value}" for one in Standing) + f"; {len(found)} in all")
    return 0


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], "--", arguments[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
