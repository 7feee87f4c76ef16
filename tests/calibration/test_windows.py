"""Runs of consecutive steps: every row kept is in one, none is kept twice, the same again from the same seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dmq_ao
from dmq_ao.config import Selection, SelectMethod
from dmq_ao.pipelines.adapter import record_pipeline, sample
from dmq_ao.samples import CalibrationSet, Recorder, record

fast = settings(max_examples=60, deadline=None, derandomize=True)


class Net(nn.Module):
    def forward(self, x: Tensor, timestep: int) -> Tensor:
        return x


def run(net: nn.Module, recorder: Recorder, number: int, timesteps: list[int], batch: int, told: bool) -> None:
    """Each row holds its trajectory's number, its place in the batch, and its place on the way."""

    def calls() -> None:
        for place, timestep in enumerate(timesteps):
            rows = [[float(number), float(row), float(place)] for row in range(batch)]
            net(torch.tensor(rows), timestep)

    if told:
        with recorder.trajectory():
            calls()
    else:
        calls()


def recorded(
    window: int = 2,
    num_samples: int = 12,
    seed: int = 0,
    timesteps: list[int] | None = None,
    batch: int = 3,
    runs: int = 4,
    told: bool = False,
) -> CalibrationSet:
    net = Net()
    with record(net, num_samples, seed, select=Selection(window=window)) as recorder:
        for number in range(runs):
            run(net, recorder, number, timesteps or [900, 700, 500, 300], batch, told)
            assert len(recorder) <= num_samples
    return recorder.calibration_set()


loops = st.fixed_dictionaries(
    {
        "window": st.integers(2, 4),
        "num_samples": st.integers(4, 40),
        "seed": st.integers(0, 5),
        "timesteps": st.lists(st.integers(0, 999), min_size=4, max_size=9, unique=True),
        "batch": st.integers(1, 5),
        "runs": st.integers(1, 4),
        "told": st.booleans(),
    }
)


@fast
@given(loop=loops)
def test_every_row_is_in_a_run_and_none_twice(loop: dict[str, Any]) -> None:
    kept, window = recorded(**loop), loop["window"]
    rows = [tuple(row) for row in kept.inputs["x"].tolist()]
    assert len(set(rows)) == len(rows) <= loop["num_samples"]
    assert kept.timesteps.tolist() == loop["timesteps"]
    assert kept.step.tolist() == sorted(kept.step.tolist()) == [int(place) for _, _, place in rows]
    earlier = kept.earlier(window)
    ends = [row for row in range(len(kept)) if bool((earlier[row] >= 0).all())]
    covered = {row for end in ends for row in (end, *earlier[end].tolist())}
    assert covered == set(range(len(kept)))
    for end in ends:
        for back, row in enumerate(earlier[end].tolist(), start=1):
            assert rows[row] == (*rows[end][:2], rows[end][2] - back)
    assert kept.trajectory is not None
    numbers = dict(zip(kept.trajectory.tolist(), [row[:2] for row in rows], strict=True))
    assert all(numbers[n] == row[:2] for n, row in zip(kept.trajectory.tolist(), rows, strict=True))
    assert len(set(numbers.values())) == len(numbers)
    assert kept.digest() == recorded(**loop).digest()


@fast
@given(loop=loops)
def test_the_samples_asked_for_are_kept_while_there_are_runs(loop: dict[str, Any]) -> None:
    supply = len(loop["timesteps"]) * loop["runs"] * loop["batch"]
    kept = recorded(**loop)
    # A run that does not fit leaves room for less than itself.
    assert len(kept) > min(supply, loop["num_samples"]) - loop["window"]


def test_all_rows_are_kept_where_there_is_room() -> None:
    kept = recorded(num_samples=48)
    assert len(kept) == 48
    assert Counter(kept.step.tolist()) == {step: 12 for step in range(4)}


def test_steps_have_alike_many_runs() -> None:
    kept = recorded(num_samples=40, timesteps=list(range(900, 300, -100)), batch=8, runs=6)
    ends = kept.step[kept.earlier(2)[:, 0] >= 0]
    counts = torch.bincount(ends, minlength=6).tolist()
    assert counts[0] == 0
    assert max(counts[1:]) - min(counts[1:]) <= 2  # beside the runs drawn, some rows of two runs make a third


def test_every_run_may_be_kept() -> None:
    found = {tuple(recorded(num_samples=2, seed=seed, batch=2, runs=2).inputs["x"][1].tolist()) for seed in range(80)}
    assert len(found) == 3 * 2 * 2


def test_another_seed_keeps_other_rows_and_other_trajectories_are_numbered_on() -> None:
    assert len({recorded(seed=seed).digest() for seed in range(4)}) == 4
    kept = recorded(num_samples=48)
    assert kept.trajectory is not None
    assert sorted(set(kept.trajectory.tolist())) == list(range(12))


def test_trajectories_of_one_call_after_the_other_are_told_apart_when_told() -> None:
    """Nothing but the recorder's own word says where these begin."""
    net = Net()
    for told, expected in ((True, [[-1], [0], [-1], [2]]), (False, [[-1], [0], [1], [2]])):
        with record(net, 8, select=Selection(window=2)) as recorder:
            run(net, recorder, 0, [900, 700], 1, told)
            run(net, recorder, 1, [500, 300], 1, told)
        samples = recorder.calibration_set()
        assert samples.earlier(2).tolist() == expected


def test_a_guided_batch_is_twice_as_many_rows() -> None:
    net = Net()
    with record(net, 40, select=Selection(window=2)) as recorder:
        for timestep in (9, 6, 3):
            x = torch.tensor([[0.0, timestep], [1.0, timestep]])
            net(torch.cat([x, x + 10]), timestep)
    kept = recorder.calibration_set()
    rows, earlier = kept.inputs["x"], kept.earlier(2)[:, 0]
    assert len(kept) == 12
    assert torch.equal(rows[earlier[earlier >= 0], 1] % 10, rows[earlier >= 0, 1] % 10 + 3)
    assert torch.equal(rows[earlier[earlier >= 0], 0], rows[earlier >= 0, 0])


def test_the_second_call_at_a_step_goes_on_from_the_second() -> None:
    net = Net()
    with record(net, 40, select=Selection(window=2)) as recorder:
        for timestep in (9, 6, 3):
            net(torch.tensor([[0.0]]), timestep)
            if timestep < 9:  # guided by two calls, from some step on
                net(torch.tensor([[1.0]]), timestep)
    kept = recorder.calibration_set()
    earlier = kept.earlier(2)[:, 0]
    assert len(kept) == 5
    assert Counter(kept.inputs["x"][earlier >= 0, 0].tolist()) == {0.0: 2, 1.0: 1}
    assert torch.equal(kept.inputs["x"][earlier[earlier >= 0]], kept.inputs["x"][earlier >= 0])


def test_a_batch_that_changes_begins_anew() -> None:
    net = Net()
    with record(net, 40, select=Selection(window=2)) as recorder:
        for timestep, rows in ((9, 4), (6, 4), (3, 2), (1, 2)):
            net(torch.arange(float(rows))[:, None], timestep)
    kept = recorder.calibration_set()
    assert Counter(kept.step.tolist()) == {0: 4, 1: 4, 2: 2, 3: 2}
    earlier = kept.earlier(2)[:, 0]
    assert kept.step[earlier >= 0].tolist() == [1] * 4 + [3] * 2


def test_memory_holds_what_is_kept_and_the_last_calls() -> None:
    net = Net()
    with record(net, num_samples=6, select=Selection(window=3)) as recorder:
        for number in range(5):
            run(net, recorder, number, [9, 7, 5, 3, 1], 7, told=False)
            assert recorder._windows is not None
            alive = {*recorder._rows, *recorder._windows.pending()}
            assert len(alive) <= 6 + 2 * 7
            assert {row.inputs["x"].untyped_storage().nbytes() for row in alive} == {12}


def test_what_cannot_be_recorded_says_why() -> None:
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        Selection(window=0)
    for method in (SelectMethod.NORMAL, SelectMethod.TDAC):
        with pytest.raises(ValueError, match=f"window=2 keeps runs of steps, which {method.value} shares cannot"):
            Selection(method, window=2)
    with pytest.raises(ValueError, match="num_samples must be 3 or more to hold a window of 3, got 2"):
        Recorder(Net(), 2, 0, None, Selection(window=3))


def test_rows_at_several_timesteps_have_no_trajectory() -> None:
    net = Net()
    with (
        pytest.raises(ValueError, match="rows at 2 timesteps; uneven selection and windows follow"),
        record(net, 4, select=Selection(window=2)),
    ):
        net(torch.randn(2, 2), torch.tensor([1, 2]))


def test_a_pipeline_is_recorded_in_windows(tiny_unet2d: tuple[nn.Module, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDIMPipeline(tiny_unet2d[0], diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    select = Selection(window=2)
    given = {"num_samples": 20, "steps": 5, "batch_size": 4, "trajectories": 12, "select": select}
    samples = record_pipeline(pipeline, **given)
    assert 18 < len(samples) <= 20
    samples.earlier(2)
    assert record_pipeline(pipeline, **given).digest() == samples.digest()
    with dmq_ao.record(pipeline.unet, num_samples=20, select=select) as recorder:
        sample(pipeline, range(12), steps=5, batch_size=4)
    assert recorder.calibration_set().digest() == samples.digest()
