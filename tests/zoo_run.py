"""Hundreds of drawn denoisers, and what becomes of each: python tests/zoo_run.py --cases 0:500

Each case is the one of its number, as long as the sources of the zoo stay as they are. Printed are how many agree, how
many are refused and with what words, and every fault with its number; ``--json`` keeps all of it. Exits with 1 where
there is a fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from zoo import PAGE, Spec, drawn

EVERY = 10  # one case in so many is compiled


def outcomes(cases: list[tuple[int, Spec, bool]]) -> list[dict[str, Any]]:
    """What becomes of cases, by number, drawn as they are, and compiled or not; in a process of its own."""
    import torch
    from zoo_checks import examine

    torch.set_num_threads(1)
    return [
        {"number": number, "spec": dataclasses.asdict(spec), **dataclasses.asdict(examine(spec, compiled))}
        for number, spec, compiled in cases
    ]


def kind(text: str) -> str:
    """An error's words without names and numbers."""
    text = re.sub(r"\[[^\]]*\]|\{[^}]*\}|\([^)]*\)", "(_)", text.splitlines()[0])
    text = re.sub(r": \w+ must", ": _ must", re.sub(r"(?<!\w)'[^']*'", "'_'", text))
    return re.sub(r"\b(parts|context|first|time)(\.\w+)*\b|\d+", "_", text)[:150]


def table(rows: list[dict[str, Any]]) -> str:
    """Counts, as text."""
    lines = [f"{count:6d}  {result}" for result, count in Counter(row["result"] for row in rows).most_common()]
    refused = Counter(f"{row['stage']}: {kind(row['why'])}" for row in rows if row["result"] == "refused")
    lines += ["refused:", *(f"{count:6d}  {why}" for why, count in refused.most_common())]
    notes = Counter(
        f"{name}: {value.partition(':')[0]}" for row in rows for name, value in row["notes"].items() if name != "error"
    )
    lines += [
        "also looked at, of those that agree:",
        *(f"{count:6d}  {note}" for note, count in sorted(notes.items())),
    ]
    faults = [row for row in rows if row["result"] in ("fault", "net")]
    lines += [f"{row['number']} {row['result']} in {row['stage']}: {row['why']}" for row in faults]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="0:500", help="numbers of the first case and of the one after the last")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2))
    parser.add_argument("--compile-every", type=int, default=EVERY, help="compile one case in so many; 0 for none")
    parser.add_argument(
        "--json", type=Path, help="where to write every case's outcome; what it holds is not run again"
    )
    args = parser.parse_args()
    first, last = (int(number) for number in args.cases.split(":"))
    rows: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    known = {row["number"] for row in rows}
    # Drawn here, for Hypothesis takes numbers to try from what is imported, and workers import more.
    pages = {page: drawn(page) for page in range(first // PAGE, -(-last // PAGE))}
    every = args.compile_every
    cases = [
        (number, pages[number // PAGE][number % PAGE], every > 0 and number % every == every - 1)
        for number in range(first, last)
        if number not in known
    ]
    jobs = [cases[start : start + 10] for start in range(0, len(cases), 10)]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=10) as pool:
        for some in pool.imap_unordered(outcomes, jobs):
            rows += some
            if args.json:
                args.json.write_text(json.dumps(sorted(rows, key=lambda row: row["number"]), indent=1))
            for row in some:
                what = f"{row['result']} {row['stage']} {kind(row['why'] or ' ')}"
                print(f"{row['number']:6d} {row['seconds']:5.1f} s {what}", flush=True)
    chosen = [row for row in rows if first <= row["number"] < last]
    print(table(sorted(chosen, key=lambda row: row["number"])))
    seconds = sum(row["seconds"] for row in chosen)
    print(f"{len(chosen)} cases, {time.perf_counter() - started:.0f} s now, {seconds:.0f} s in cases")
    return int(any(row["result"] == "fault" for row in chosen))


if __name__ == "__main__":
    sys.exit(main())
