"""Measuring takes seeds that calibration did not: found in the pipeline's folder, refused where they overlap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from command_line import document, failure
from hypothesis import given
from hypothesis import strategies as st

from dmq_ao import recipes
from dmq_ao.benchmarks import compare, measure
from dmq_ao.config import InvalidFile, Selection, SelectMethod
from dmq_ao.pipelines import adapter, ptq
from dmq_ao.pipelines.seeds import (
    INDEX,
    INDEX_KEY,
    OverlappingSeeds,
    calibration_seeds,
    check_seeds,
    fresh_seeds,
    overlap,
    span,
    trajectory_seeds,
)

STEPS, SAMPLES = 4, 8
spans = st.tuples(st.integers(0, 60), st.integers(1, 30)).map(lambda pair: range(pair[0], sum(pair)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo at W8A8, calibrated on trajectories from seeds 3 to 6."""
    out = tmp_path_factory.mktemp("seeds") / "w8a8"
    recipe, pipeline = recipes.minmax("w8a8"), adapter.load_pipeline("demo")
    recording = ptq.Recording(steps=STEPS, seed=3, trajectories=4)
    ptq.quantize_pipeline(
        pipeline,
        ptq.prepare_pipeline(pipeline, recipe, seed=3),
        recipe,
        out,
        recording=recording,
        progress=False,
    )
    return out


@given(st.integers(1, 20), st.lists(spans, max_size=6), st.integers(0, 60))
def test_fresh_seeds_are_nobody_elses(count: int, taken: list[range], first: int) -> None:
    seeds = fresh_seeds(count, taken, first)
    assert len(seeds) == count
    assert seeds.start >= first
    assert not set(seeds) & {seed for one in taken for seed in one}
    if not any(overlap(range(first, first + count), one) for one in taken):
        assert seeds.start == first


@given(spans, spans)
def test_overlap_is_a_shared_seed(one: range, other: range) -> None:
    assert overlap(one, other) == bool(set(one) & set(other))
    if overlap(one, other):
        with pytest.raises(OverlappingSeeds) as caught:
            check_seeds("images are drawn", one, {"w4a8": [other]})
        assert set(caught.value.seeds) == set(one) & set(other)
    else:
        check_seeds("images are drawn", one, {"w4a8": [other]})


def test_the_refusal_names_seeds_and_what_to_take() -> None:
    with pytest.raises(OverlappingSeeds) as caught:
        check_seeds("images are drawn", range(2, 18), {"a": [range(40, 50)], "b": [range(9), range(12, 13)]})
    assert str(caught.value) == (
        "images are drawn from seeds 2 to 17, and b was calibrated on trajectories from seeds 0 to 8: the same noise"
        " is in both, and the result flatters; leave the seed out, take one from 50 on, or allow it"
        " (allow_calibration_seeds=True, --allow-calibration-seeds)"
    )
    assert (span(range(4, 5)), span(range(4, 6))) == ("4", "4 to 5")


@pytest.mark.parametrize(
    ("select", "trajectories", "seeds"),
    [
        (SelectMethod.UNIFORM, None, range(5, 18)),
        (Selection(SelectMethod.TDAC), None, range(5, 31)),
        ("uniform", 80, range(5, 85)),
    ],
)
def test_seeds_of_a_recording(select: str | Selection, trajectories: int | None, seeds: range) -> None:
    assert trajectory_seeds(256, steps=20, seed=5, trajectories=trajectories, select=select) == seeds


def test_a_folder_knows_its_seeds_and_keeps_them(folder: Path, tmp_path: Path) -> None:
    assert calibration_seeds(folder) == calibration_seeds(folder / "unet") == (range(3, 7),)
    assert json.loads((folder / "report.json").read_text())["sampling"]["trajectories"] == 4
    adapter.save_pipeline(adapter.load_pipeline(folder), tmp_path / "again")
    assert calibration_seeds(tmp_path / "again") == (range(3, 7),)
    shutil.copytree(folder / "unet", tmp_path / "alone")
    assert calibration_seeds(tmp_path / "alone") is None


def test_no_first_step_of_calibration_is_the_noise_of_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: both began at seed 0, and every first row of the calibration set was an image's noise."""
    drawn: list[range] = []
    images_of = compare.images_of

    def note(pipeline: Any, denoiser: Any, seeds: range, **options: Any) -> Any:
        drawn.append(seeds)
        return images_of(pipeline, denoiser, seeds, **options)

    monkeypatch.setattr(compare, "images_of", note)
    report, _ = compare.compare("demo", [folder], images=2, steps=2, say=lambda _: None)
    assert report["protocol"]["calibration seeds"] == "w8a8: 3 to 6"
    assert report["protocol"]["images"] == "2, seeds 1000000 to 1000001"
    pipeline = adapter.load_pipeline("demo")
    calibration = adapter.record_pipeline(pipeline, num_samples=SAMPLES, steps=2, seed=3, trajectories=4)
    states = measure.held_out_states(pipeline, steps=2, seed=2_000_000)
    images = adapter.record_pipeline(pipeline, num_samples=4, steps=2, seed=drawn[0].start, trajectories=2)
    first = {
        name: set_.inputs["sample"][set_.step == 0]
        for name, set_ in {"calibration": calibration, "states": states, "images": images}.items()
    }
    for one, other in (("calibration", "images"), ("calibration", "states"), ("states", "images")):
        assert not any(torch.equal(a, b) for a in first[one] for b in first[other]), (one, other)


@pytest.mark.parametrize("seed", [0, 3, 6])
def test_an_overlapping_seed_is_refused_before_anything_is_drawn(
    seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_denoisers", lambda *args, **kwargs: pytest.fail("something was loaded"))
    words = failure(1, "compare", "demo", folder, "--images", 4, "--seed", seed)
    assert f"images are drawn from seeds {seed} to {seed + 3}, and w8a8 was calibrated on" in words
    assert "take one from 7 on" in words


def test_states_keep_clear_of_calibration_too(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = json.loads((other / INDEX).read_text())
    index[INDEX_KEY]["calibration_seeds"] = [[1_000_000, 1_000_010], [2_000_003, 2_000_020]]
    (other / INDEX).write_text(json.dumps(index))
    seeds, states, known = compare._seeds({"w8a8": folder, "other": other}, 2, None, False)
    assert (seeds, states) == (range(1_000_010, 1_000_012), range(2_000_020, 2_000_028))
    assert known == "w8a8: 3 to 6; other: 1000000 to 1000009, 2000003 to 2000019"


def test_a_free_seed_and_an_allowed_one(folder: Path) -> None:
    quick = ("--images", 1, "--steps", 2)
    free = document("compare", "demo", folder, *quick, "--seed", 7)
    assert free["protocol"]["images"] == "1, seeds 7"
    allowed = document("compare", "demo", folder, *quick, "--seed", 4, "--allow-calibration-seeds")
    assert allowed["protocol"]["images"] == "1, seeds 4"


def test_a_folder_of_before_loads_and_says_that_it_does_not_know(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    index = json.loads((old / INDEX).read_text())
    del index[INDEX_KEY]
    (old / INDEX).write_text(json.dumps(index))
    assert adapter.load_pipeline(old).unet.recipe.name == "minmax"
    assert calibration_seeds(old) is None
    assert compare._seeds({"old": old}, 2, 0, False)[2] == "old: unknown"


@pytest.mark.parametrize("seeds", [[[5, 5]], [[1]], [["a", "b"]], 7, [[-1, 4]]])
def test_edited_seeds_are_refused(seeds: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({INDEX_KEY: {"calibration_seeds": seeds}}))
    with pytest.raises(InvalidFile, match=r"_dmq_ao.calibration_seeds must be a list of pairs"):
        calibration_seeds(tmp_path)
