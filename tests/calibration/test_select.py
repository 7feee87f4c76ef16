"""Uneven shares of the timesteps: the arithmetic against float64 loops, and what a recorder makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dmq_ao
from dmq_ao.config import Selection, SelectMethod
from dmq_ao.pipelines.adapter import record_pipeline, sample
from dmq_ao.samples import CalibrationSet, record
from dmq_ao.samples.select import apportion, counts_of, deal, normal_weights, pair_sums, reference_counts, tdac_scores
from dmq_ao.samples.tap import MAX_POSITIONS, as_features, find_tap

fast = settings(max_examples=60, deadline=None, derandomize=True)
TDAC = Selection(SelectMethod.TDAC, pilot=4)
shares = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)


# --- integers ----------------------------------------------------------------


@fast
@given(weights=shares, total=st.integers(0, 300), minimum=st.integers(0, 3), room=st.integers(1, 40), data=st.data())
def test_counts_sum_stay_in_bounds_and_are_the_same_again(
    weights: list[float], total: int, minimum: int, room: int, data: st.DataObject
) -> None:
    maximum = data.draw(st.lists(st.integers(0, room), min_size=len(weights), max_size=len(weights)))
    low = [min(minimum, bound) for bound in maximum]
    total = min(max(total, sum(low)), sum(maximum))
    counts = apportion(torch.tensor(weights), total, minimum, maximum)
    assert sum(counts) == total
    assert all(a <= n <= b for a, n, b in zip(low, counts, maximum, strict=True))
    assert counts == apportion(torch.tensor(weights), total, minimum, maximum)


@fast
@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=12, unique=True), total=st.integers(12, 200))
def test_counts_follow_the_weights(weights: list[int], total: int) -> None:
    counts = apportion(torch.tensor(weights).float(), total, 1, [total] * len(weights))
    order = sorted(range(len(weights)), key=weights.__getitem__)
    assert [counts[i] for i in order] == sorted(counts)
    turned = apportion(torch.tensor(weights[::-1]).float(), total, 1, [total] * len(weights))
    assert Counter(turned) == Counter(counts)
    quotas = [total * w / sum(weights) for w in weights]
    if min(quotas) >= 1:
        assert all(abs(n - q) < 1 for n, q in zip(counts, quotas, strict=True))


def test_ties_go_to_the_earlier_step_and_no_weight_means_all_alike() -> None:
    assert apportion(torch.zeros(4), 6, 1, [9] * 4) == [2, 2, 1, 1]
    assert apportion(torch.tensor([1.0, 0.0]), 8, 0, [5, 9]) == [5, 3]


@pytest.mark.parametrize(
    ("weights", "total", "message"),
    [
        ([1.0, math.nan], 4, "finite and 0 or more"),
        ([1.0, -1.0], 4, "finite and 0 or more"),
        ([1.0, 1.0], 1, "do not fit 2 steps of at least 1"),
        ([1.0, 1.0], 11, "together at most 10"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(weights: list[float], total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apportion(torch.tensor(weights), total, 1, [5, 5])


@fast
@given(weights=shares, total=st.integers(1, 60), held=st.integers(1, 5))
def test_too_few_samples_leave_some_steps_without(weights: list[float], total: int, held: int) -> None:
    maximum = [held] * len(weights)
    counts = counts_of(torch.tensor(weights), total, Selection(SelectMethod.TDAC), maximum)
    assert sum(counts) == min(total, sum(maximum))
    assert min(counts) >= (1 if total >= len(weights) else 0)


@fast
@given(weights=shares, total=st.integers(1, 200))
def test_reference_counts_sum_and_are_never_negative(weights: list[float], total: int) -> None:
    counts = reference_counts(torch.tensor(weights), total)
    assert sum(counts) == total
    assert min(counts) >= 0


def test_reference_counts_by_hand() -> None:
    # 2.5 and 2.5 round to 2: one is missing, and the first of the largest gets it.
    assert reference_counts(torch.tensor([2.5, 2.5, 5.0]), 10) == [2, 2, 6]
    # 0.6 rounds to 1 five times: two too many, taken from the end.
    assert reference_counts(torch.ones(5), 3) == [1, 1, 1, 0, 0]
    selection = Selection(SelectMethod.TDAC, reference_rounding=True)
    assert counts_of(torch.ones(5), 3, selection) == [1, 1, 1, 0, 0]


@fast
@given(need=st.lists(st.integers(0, 7), min_size=1, max_size=12), more=st.integers(0, 5))
def test_trajectories_give_alike_and_no_step_twice(need: list[int], more: int) -> None:
    rows = max(1, max(need) + more)
    dealt = deal(need, rows)
    assert len(dealt) == rows
    given = Counter(step for steps in dealt for step in steps)
    assert [given[step] for step in range(len(need))] == need
    assert all(len(set(steps)) == len(steps) for steps in dealt)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    lasts = [max(steps, default=-1) for steps in dealt]
    assert lasts == sorted(lasts)


# --- scores ------------------------------------------------------------------


def by_loops(features: Tensor, radius: float, diversity_weight: float) -> list[float]:
    """From the equations, pair by pair."""
    f, steps = features.double(), len(features)
    density, diversity = [0.0] * steps, [0.0] * steps
    for i in range(steps):
        for j in range(steps):
            if i != j:
                density[i] += float((f[i] - f[j]).square().mean() <= radius)
                cosine = torch.nn.functional.cosine_similarity(f[i], f[j], dim=-1, eps=1e-12)
                diversity[i] += float((1 - cosine).mean())

    def spread(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(value - low) / (high - low) if high > low else 0.0 for value in values]

    return [d + diversity_weight * v for d, v in zip(spread(density), spread(diversity), strict=True)]


def scores(features: Tensor, selection: Selection) -> Tensor:
    squared, angular = pair_sums(features)
    return tdac_scores(squared / features[0].numel(), angular / features[0, ..., 0].numel(), selection)


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_forms_equal_the_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(7, 3, 5, 4, generator=generator) * torch.linspace(0.1, 2, 7)[:, None, None, None] + 3
    features[2, 1, 3] = 0  # a position without any signal
    selection = Selection(SelectMethod.TDAC, diversity_weight=1.7, radius=2.0)
    assert scores(features, selection).tolist() == pytest.approx(by_loops(features, 2.0, 1.7), rel=1e-9)


@fast
@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_the_scale_of_features_does_not_matter(seed: int, power: int) -> None:
    features = torch.randn(6, 2, 4, 3, generator=torch.Generator().manual_seed(seed))
    selection = Selection(SelectMethod.TDAC)
    assert torch.equal(scores(features, selection), scores(features * 2.0**power, selection))


def test_the_order_of_steps_does_not_matter() -> None:
    features = torch.randn(6, 2, 4, 3)
    order = torch.randperm(6)
    assert torch.allclose(scores(features[order], TDAC), scores(features, TDAC)[order])


@pytest.mark.parametrize("features", [torch.ones(5, 2, 3, 4) * 0.1, torch.zeros(5, 1, 1, 1), torch.randn(1, 2, 3, 4)])
def test_features_that_tell_nothing_apart_give_uniform_counts(features: Tensor) -> None:
    counts = counts_of(scores(features, TDAC), 10, TDAC)
    assert counts == [10 // len(features)] * len(features)


def test_identical_features_of_a_long_schedule_have_no_score() -> None:
    features = torch.randn(1, 2, 4, 3).expand(50, -1, -1, -1)
    assert torch.equal(scores(features, TDAC), torch.zeros(50, dtype=torch.float64))


def test_the_normal_density_peaks_where_it_is_told() -> None:
    weights = normal_weights(10, mean=0.25, deviation=0.1)
    assert int(weights.argmax()) == 7  # a quarter from the clean end
    expected = [math.exp(-0.5 * ((1 - (k + 0.5) / 10 - 0.25) / 0.1) ** 2) for k in range(10)]
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantile": 0.0}, "quantile must be between 0 and 1"),
        ({"radius": -1.0}, "radius must be positive"),
        ({"diversity_weight": math.nan}, "diversity_weight must be 0 or more"),
        ({"deviation": 0.0}, "deviation must be positive"),
        ({"pilot": 0}, "pilot must be 1 or more"),
        ({"minimum": -1}, "minimum must be 0 or more"),
    ],
)
def test_wrong_selections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(SelectMethod.TDAC, **changes)


# --- the tap -----------------------------------------------------------------


def test_the_tap_of_a_unet_is_at_its_lowest_resolution(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, inputs = tiny_unet2d
    assert find_tap(model, (), inputs, batch=2).startswith("mid_block")


def test_the_tap_of_a_text_to_image_unet_is_not_the_text(
    tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]],
) -> None:
    model, inputs = tiny_unet2d_condition
    assert find_tap(model, (), inputs, batch=2).startswith("mid_block")


def test_the_tap_of_a_transformer_is_a_block_in_the_middle(tiny_dit: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, inputs = tiny_dit
    assert find_tap(model, (), inputs, batch=2).startswith("transformer_blocks.")


def test_a_denoiser_without_blocks_must_name_its_tap() -> None:
    with pytest.raises(ValueError, match="no block of Linear gives .* Selection\\(tap=...\\)"):
        find_tap(nn.Linear(2, 2), (torch.zeros(1, 2),), {}, batch=1)


def test_features_are_few_positions_by_channels() -> None:
    image = torch.randn(3, 4, 20, 20)
    features = as_features((image, (image,)), "block", rows=2)
    assert features.shape == (2, 200, 4)
    assert torch.equal(features[1, 1], image[1, :, 0, 2])
    assert as_features(torch.randn(3, 5), "block", 3).shape == (3, 1, 5)
    assert as_features(torch.randn(1, MAX_POSITIONS, 5), "block", 3).shape == (1, MAX_POSITIONS, 5)
    with pytest.raises(ValueError, match="block gives no floating tensor"):
        as_features(None, "block", 1)


# --- recording ---------------------------------------------------------------


class Net(nn.Module):
    """Features that stand still until the last third of the schedule; counts its calls."""

    def __init__(self, bad: float | None = None) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.bad, self.calls = bad, 0

    def forward(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        self.calls += 1
        t = float(torch.as_tensor(timestep).flatten()[0])
        angle = max(0.0, 300 - t) / 200
        turned = torch.stack([math.cos(angle) * sample[:, 0], math.sin(angle) * sample[:, 0]], 1)
        if self.bad is not None:
            turned = turned * self.bad
        return self.inner(turned + 0.01 * sample)


STEPS = list(range(900, -1, -100))
NAMED = dataclasses.replace(TDAC, tap="inner")


def loop(net: nn.Module, batch: int = 4, seed: int = 0) -> None:
    x = torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    for step in STEPS:
        net(x - step / 1000, step)


def recorded(select: str | Selection, num_samples: int = 40, batches: int = 8, told: bool = False) -> tuple[Any, ...]:
    net = Net()
    with record(net, num_samples, select=select) as recorder:
        for batch in range(batches):
            if told:
                with recorder.trajectory(part=1 / (batches - batch)):
                    loop(net, seed=batch)
            else:
                loop(net, seed=batch)
            assert len(recorder) <= 2 * num_samples
    return recorder.calibration_set(), net, recorder


def counts(samples: CalibrationSet) -> list[int]:
    return torch.bincount(samples.step, minlength=len(samples.timesteps)).tolist()


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("select", [NAMED, "normal"], ids=["tdac", "normal"])
def test_steps_get_their_shares(select: str | Selection, told: bool) -> None:
    samples, net, recorder = recorded(select, told=told)
    found = counts(samples)
    assert sum(found) == len(samples) == 40
    assert min(found) >= 1
    assert max(found) - min(found) >= 2
    assert samples.timesteps.tolist() == STEPS
    assert len({x.flatten().tolist()[0] for x in samples.inputs["sample"]}) == 40
    again = recorded(select, told=told)[0]
    assert again.digest() == samples.digest()
    assert (net.calls < 80) == told  # trajectories are left early only where the loop says where they are
    assert recorder.num_calls == net.calls
    assert not net.inner._forward_hooks


def test_steps_whose_features_stand_out_get_more() -> None:
    far = dataclasses.replace(NAMED, diversity_weight=50.0)
    found = counts(recorded(far)[0])
    assert found[-1] > 2 * max(found[:6])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_loop_that_ends_with_the_pilot_is_selected_from(batches: int) -> None:
    selection = dataclasses.replace(NAMED, pilot=8)
    samples, _, _ = recorded(selection, num_samples=20, batches=batches)
    assert sum(counts(samples)) == 20
    assert counts(samples) != [2] * 10


def test_as_many_trajectories_as_samples_give_one_each() -> None:
    net = Net()
    selection = dataclasses.replace(NAMED, pilot=1)
    with record(net, 30, select=selection) as recorder:
        for row in range(31):
            with recorder.trajectory(part=1 / (31 - row)):
                loop(net, batch=1, seed=row)
    first = recorder.calibration_set().inputs["sample"]
    assert len(first) == 30
    noises = {round(float(x[0, 0, 0] - x[1, 0, 0]), 3) for x in first}
    assert len(noises) >= 29
    assert net.calls < 0.75 * 31 * len(STEPS)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_degenerate_features_are_uniform_or_an_error(bad: float) -> None:
    net = Net(bad)
    with record(net, 20, select=dataclasses.replace(NAMED, pilot=4)) as recorder:
        if bad == 0.0:
            net.inner = nn.Identity()
            recorder._plan.features._tap = "inner"  # type: ignore[union-attr]
            net.inner.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            for seed in range(4):
                loop(net, seed=seed)
            assert counts(recorder.calibration_set()) == [2] * 10
        else:
            with pytest.raises(ValueError, match="inner gives NaN or infinity at timestep 900"):
                loop(net)


@pytest.mark.parametrize(
    "timesteps",
    [
        pytest.param([1.0, 0.75, 0.5, 0.25], id="flow matching, noise first"),
        pytest.param([0.0, 0.2, 0.4, 0.6, 0.8], id="flow matching, noise last"),
        pytest.param([9, 7, 7, 5, 5, 3, 3, 1], id="second order"),
        pytest.param([9, 6, 6, 3, 0], id="a multistep method that starts twice"),
    ],
)
@pytest.mark.parametrize("told", [False, True])
def test_any_schedule_has_its_trajectories_told_apart(timesteps: list[float], told: bool) -> None:
    net = Net()
    with record(net, 24, select=NAMED) as recorder:
        for seed in range(10):
            x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
            with recorder.trajectory(part=1 / (10 - seed)) if told else nullcontext():
                for timestep in timesteps:  # a guided batch: both halves at one timestep
                    net(torch.cat([x, x]), torch.tensor([timestep] * 8))
    samples = recorder.calibration_set()
    assert counts(samples) == recorder._plan.counts  # type: ignore[union-attr]
    assert sum(counts(samples)) == 24
    assert recorder._plan._pilot_rows == 8  # type: ignore[union-attr]
    assert samples.timesteps.tolist() == pytest.approx(list(dict.fromkeys(timesteps)))


def test_one_timestep_and_one_sample() -> None:
    net = Net()
    with record(net, 1, select=NAMED) as recorder:
        net(torch.randn(1, 2, 3, 3), 5)
    assert len(recorder.calibration_set()) == 1


def test_calls_in_pairs_belong_to_one_trajectory() -> None:
    net = Net()
    with record(net, 10, select=NAMED) as recorder:
        for seed in range(3):
            x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
            for step in STEPS:  # guided by two calls, or a second-order solver
                net(x, step)
                net(-x, step)
    assert counts(recorder.calibration_set()) == recorder._plan.counts  # type: ignore[union-attr]
    assert recorder._plan._pilot_rows == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("best", r"select must be one of \['uniform', 'normal', 'tdac'\] or a Selection, got 'best'"),
        (dataclasses.replace(TDAC, tap="iner"), r"tap 'iner' is no module of Net; close ones are \['inner'\]"),
        (TDAC, "no block of Net gives"),
    ],
)
def test_wrong_requests_say_why(select: str | Selection, message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message), record(net, 4, select=select):
        loop(net)


def test_rows_at_several_timesteps_have_no_trajectory() -> None:
    net = Net()
    with pytest.raises(ValueError, match="rows at 2 timesteps; uneven selection"), record(net, 4, select=NAMED):
        net(torch.randn(2, 2, 3, 3), torch.tensor([1, 2]))


def test_a_tap_that_rests_in_some_calls_is_refused() -> None:
    net = Net()
    with record(net, 4, select=NAMED) as recorder:
        net(torch.randn(2, 2, 3, 3), 900)
        net.inner = nn.Identity()
        net(torch.randn(2, 2, 3, 3), 800)
    with pytest.raises(ValueError, match="tap inner gave features of 1 of 2 timesteps"):
        recorder.calibration_set()


def test_trajectories_do_not_nest() -> None:
    with record(Net(), 4, select="normal") as recorder, recorder.trajectory():
        with pytest.raises(ValueError, match="a trajectory is under way"), recorder.trajectory():
            pass
        with pytest.raises(ValueError, match="part must be above 0"), recorder.trajectory(part=0):
            pass


@pytest.mark.parametrize("select", ["tdac", "normal", "uniform"])
def test_a_pipeline_is_recorded_by_any_selection(tiny_unet2d: tuple[nn.Module, Any], select: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDIMPipeline(tiny_unet2d[0], diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_samples": 20, "steps": 5, "batch_size": 4, "trajectories": 24, "select": select}
    samples = record_pipeline(pipeline, **given)
    assert len(samples) == 20
    assert min(counts(samples)) >= 1
    assert record_pipeline(pipeline, **given).digest() == samples.digest()
    if select == "uniform":
        with dmq_ao.record(pipeline.unet, num_samples=20) as recorder:
            sample(pipeline, range(24), steps=5, batch_size=4)
        assert recorder.calibration_set().digest() == samples.digest()
