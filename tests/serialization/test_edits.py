"""Files edited at any place: the same comes out, or ``InvalidFile``; ``make test-fuzz`` looks at many more."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import fuzz_files
import pytest
from edits import edit_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmq_ao
from dmq_ao.config import InvalidFile

SEEDS = st.integers(0, 2**32)
BRIEF = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[fuzz_files.Subject]:
    return fuzz_files.subjects(tmp_path_factory.mktemp("subjects"))


@pytest.mark.parametrize("number", range(5))
@given(seed=SEEDS)
@BRIEF
def test_an_edited_folder_is_refused_or_means_something(
    number: int, seed: int, subjects: list[fuzz_files.Subject], tmp_path_factory: pytest.TempPathFactory
) -> None:
    copied = tmp_path_factory.mktemp("edited") / "out"
    rng = random.Random(seed)
    what, load = fuzz_files.folder_case(subjects[number], copied, rng)
    outcome = fuzz_files.outcome_of(load, fuzz_files.Watch())
    assert not outcome.startswith("FAULT"), f"{what}: {outcome}"
    shutil.rmtree(copied)


@given(seed=SEEDS)
@BRIEF
def test_an_edited_plan_or_set_is_refused_or_the_same(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("edited")
    plan, samples = fuzz_files.small_files(folder)
    for case, file in ((fuzz_files.plan_case, plan), (fuzz_files.samples_case, samples)):
        what, load = case(file, folder / f"copy-{file.name}", random.Random(seed))
        outcome = fuzz_files.outcome_of(load, fuzz_files.Watch())
        assert not outcome.startswith("FAULT"), f"{what}: {outcome}"


def test_what_was_not_sealed_anew_is_always_noticed(subjects: list[fuzz_files.Subject], tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = 0
    started = time.perf_counter()
    for number in range(40):
        copied = tmp_path / str(number)
        shutil.copytree(subjects[number % len(subjects)].folder, copied)
        before = {file.name: file.read_bytes() for file in copied.iterdir()}
        edit_folder(copied, rng, sealed=False)
        if {file.name: file.read_bytes() for file in copied.iterdir()} == before:
            continue
        with pytest.raises(InvalidFile):
            dmq_ao.load(copied, backend="reference")
        refused += 1
    assert refused > 30
    assert (time.perf_counter() - started) / refused < 2
