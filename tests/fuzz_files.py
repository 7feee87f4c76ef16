"""Thousands of edited files, and what becomes of each: python tests/fuzz_files.py --cases 10000

A case edits one place of a folder that ``dmq_ao.save`` wrote (of a bit plan, of a calibration set), loads it, and
calls what was loaded. Allowed are: a typed error of ours; or what was loaded, the same on every backend. Reported as
faults: any other error, more than two seconds, a file opened for writing or outside, a process, text of the file in
source that is compiled, backends that disagree, and another answer although no checksum was made anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from edits import CANARY, edit_folder, edit_json_file, edit_safetensors
from plain import Plain, flow, plain_samples, relative, repeated_samples, scaled, seeded, small
from torch import Tensor, nn

import dmq_ao
from dmq_ao.config import InvalidFile, Ranges, Recipe
from dmq_ao.mixed_precision.bit_plan import BitPlan, InputBits, LayerBits
from dmq_ao.recipes import minmax
from dmq_ao.samples import CalibrationSet

SECONDS, MEMORY = 2.0, 2**30
_HEADER = "dmq_ao.calibration_set"


@dataclass
class Watch:
    """What a case does to the machine, as Python's audit events tell it."""

    folder: str = ""
    seen: list[str] = field(default_factory=list)
    active: bool = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(args[0], (str, bytes)) and self._is_foreign(os.fsdecode(args[0]), args[1]):
            self.seen.append(f"open {args[0]!r} {args[1]}")
        elif event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "shutil.rmtree",
        ):
            self.seen.append(f"{event} {args}")
        elif event == "compile" and args[0] is not None and CANARY in str(args[0]):
            self.seen.append("text of the file in source")

    def _is_foreign(self, path: str, mode: str | None) -> bool:
        if mode and set(mode) & set("wax+"):
            return not path.startswith("/dev/null") and ".again" not in path  # what a case itself writes
        known = (self.folder, sys.prefix, sys.base_prefix, os.getcwd(), "/proc", "/sys", "/usr")
        return not path.startswith(known)


class TooSlow(BaseException):
    """A case ran longer than it may."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass
class Subject:
    """A folder to edit, and what it answers unedited."""

    folder: Path
    inputs: dict[str, Any]
    answer: Tensor


def _answer(result: Any) -> Tensor:
    value: Tensor = result if isinstance(result, Tensor) else result[0]
    return value


def _dit() -> tuple[nn.Module, dict[str, Tensor]]:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    ).eval()
    labels, timestep = torch.tensor([3, 7]), torch.tensor([10, 500])
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": timestep, "class_labels": labels}


def recipes() -> dict[str, Recipe]:
    """One of each form of a record."""
    voting = minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True)
    return {
        "voting": voting,
        "dynamic": minmax("w8a8", ranges=Ranges.DYNAMIC),
        "groups": minmax("w4a16", group_size=8),
        "scaled": small(scaled(voting)),
    }


def subjects(folder: Path) -> list[Subject]:
    """Quantized denoisers on disk."""
    made = []
    plain = seeded(Plain)
    samples = plain_samples(plain)
    x = {"x": torch.randn(3, 3, 8, 8), "t": torch.tensor([900, 600, 0])}
    dit, inputs = _dit()
    jobs = [(plain, recipe, samples, x, name) for name, recipe in recipes().items()]
    jobs += [(dit, minmax("w4a8", embeddings=True), repeated_samples(inputs), inputs, "dit")]
    for model, recipe, rows, example, name in jobs:
        quantized, _ = flow(model, recipe, rows)
        dmq_ao.save(quantized, folder / name)
        made.append(Subject(folder / name, example, _answer(quantized(**example)).clone()))
    return made


def folder_case(subject: Subject, copied: Path, rng: random.Random) -> tuple[str, Callable[[], str]]:
    shutil.copytree(subject.folder, copied)
    sealed = rng.random() < 0.85
    what = edit_folder(copied, rng, sealed=sealed)

    def load() -> str:
        quantized = dmq_ao.load(copied, backend="reference")
        answer = _answer(quantized(**subject.inputs))
        other = dmq_ao.load(copied, backend="auto")
        theirs = _answer(other(**subject.inputs))
        with_nan = not bool(answer.isfinite().all())
        if answer.shape != theirs.shape or not with_nan and relative(theirs, answer) > 0.1:
            return "FAULT: backends disagree"
        if answer.shape == subject.answer.shape and torch.equal(answer, subject.answer):
            return "the same"
        return "another model, sealed anew" if sealed else "FAULT: another answer, no checksum made anew"

    return what, load


def plan_case(plan: Path, copied: Path, rng: random.Random) -> tuple[str, Callable[[], str]]:
    shutil.copy(plan, copied)
    what = edit_json_file(copied, rng)

    def load() -> str:
        loaded = BitPlan.load(copied)
        loaded.save(f"{copied}.again")
        return "the same" if BitPlan.load(f"{copied}.again") == loaded else "FAULT: another plan after saving"

    return what, load


def samples_case(samples: Path, copied: Path, rng: random.Random) -> tuple[str, Callable[[], str]]:
    shutil.copy(samples, copied)
    what = edit_safetensors(copied, _HEADER, rng)

    def load() -> str:
        loaded = CalibrationSet.load(copied)
        next(loaded.batches(2))
        same = loaded.digest() == CalibrationSet.load(samples).digest()
        return "the same" if same else "FAULT: another set under the old checksum"

    return what, load


def small_files(folder: Path) -> tuple[Path, Path]:
    """A bit plan and a calibration set."""
    plan, samples = folder / "plan.json", folder / "samples.safetensors"
    plain_samples(seeded(Plain)).save(samples)
    BitPlan({"a": LayerBits(4, (4, 3, 2))}, inputs={"a": InputBits(9, 8)}).save(plan)
    return plan, samples


def run(start: int, count: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Cases ``start`` to ``start + count``: outcomes, and faults in words."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    watch = Watch(str(folder))
    made = subjects(folder)
    plan, samples = small_files(folder)
    sys.addaudithook(watch)
    os.chdir(folder)
    counts: Counter[str] = Counter()
    faults = []
    for number in range(start, start + count):
        rng = random.Random(number)
        copied = folder / f"case{number}"
        draw = rng.random()
        if draw < 0.1:
            what, load = plan_case(plan, copied, rng)
        elif draw < 0.2:
            what, load = samples_case(samples, copied, rng)
        else:
            what, load = folder_case(rng.choice(made), copied, rng)
        outcome = outcome_of(load, watch)
        outcome = "FAULT: " + "; ".join(watch.seen) if watch.seen else outcome
        watch.seen.clear()
        counts[outcome.partition(" {")[0]] += 1
        if outcome.startswith("FAULT"):
            faults.append(f"case {number}: {what}: {outcome}")
        for path in (copied, Path(f"{copied}.again")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return counts, faults


def outcome_of(load: Callable[[], str], watch: Watch) -> str:
    started, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch.active = True
    try:
        with limited(5 * SECONDS):
            outcome = load()
    except InvalidFile:
        outcome = "refused"
    except ValueError as error:
        ours = "give the float module" in str(error)
        outcome = "refused" if ours else f"FAULT: bare {type(error).__name__} {{{error}}}"
    except TooSlow:
        outcome = "FAULT: it did not end"
    except Exception as error:
        outcome = f"FAULT: bare {type(error).__name__} {{{error}}}"
    finally:
        watch.active = False
    if time.perf_counter() - started > SECONDS and not outcome.startswith("FAULT"):
        outcome = f"FAULT: {outcome} after {time.perf_counter() - started:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    return f"FAULT: memory grew {{{grown}}}" if grown > MEMORY else outcome


def _worker(job: tuple[int, int]) -> tuple[Counter[str], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return run(*job, Path(folder))


def main() -> None:
    """Count outcomes; exit with 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case; a case is its number's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    share = -(-args.cases // args.jobs)
    jobs = [(args.first + n, min(share, args.cases - n)) for n in range(0, args.cases, share)]
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for some, theirs in pool.imap_unordered(_worker, jobs):
            counts += some
            faults += theirs
    for outcome, count in counts.most_common():
        print(f"{count:7d}  {outcome}")
    print("\n".join(faults))
    print(f"{args.cases} cases, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
