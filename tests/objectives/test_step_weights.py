"""Step weights: the published rule in plain floats, and what must hold whatever the losses are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import Reduce, StepWeights, Weighting
from dmq_ao.objectives import StepWeighting

STEPS = 5
SEEDS = st.integers(0, 2**31)
EVERY = pytest.mark.parametrize("reduce", list(Reduce))


def focal(reduce: Reduce = Reduce.MEAN, gamma: float = 20.0, momentum: float = 0.95) -> StepWeighting:
    return StepWeighting(StepWeights(gamma=gamma, momentum=momentum, reduce=reduce), STEPS)


def batches(seed: int, count: int = 6, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, generator=generator, dtype=torch.float64),
            torch.randint(0, STEPS, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def published(given: list[tuple[Tensor, Tensor]], gamma: float, momentum: float) -> list[list[float]]:
    running = [0.0] * STEPS
    found = []
    for loss, step in given:
        for k in range(STEPS):
            mass = sum(float(value) for value, at in zip(loss, step, strict=True) if at == k)
            running[k] = momentum * running[k] + (1 - momentum) * mass
        found.append([(1 - running[int(k)] / sum(running)) ** gamma for k in step])
    return found


@given(SEEDS, st.floats(0, 25), st.floats(0, 0.99))
def test_sums_are_the_published_rule(seed: int, gamma: float, momentum: float) -> None:
    weighting, given_batches = focal(Reduce.SUM, gamma, momentum), batches(seed)
    for (loss, step), expected in zip(given_batches, published(given_batches, gamma, momentum), strict=True):
        assert weighting(loss, step).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(SEEDS, st.floats(0, 0.99))
def test_means_are_running_means_of_the_batches_that_saw_a_step(seed: int, momentum: float) -> None:
    weighting, given_batches = focal(gamma=3.0, momentum=momentum), batches(seed)
    seen: list[list[float]] = [[] for _ in range(STEPS)]
    for loss, step in given_batches:
        weights = weighting(loss, step)
        for k in set(step.tolist()):
            values = [float(value) for value, at in zip(loss, step, strict=True) if at == k]
            seen[k].append(sum(values) / len(values))
        running = []
        for means in seen:
            parts = [momentum ** (len(means) - 1 - i) for i in range(len(means))]
            running.append(sum(p * m for p, m in zip(parts, means, strict=True)) / max(sum(parts), 1e-300))
        expected = [(1 - running[int(k)] / sum(running)) ** 3 for k in step]
        assert weights.tolist() == pytest.approx(expected, rel=1e-6)


@EVERY
def test_equal_mass_in_every_step_gives_equal_weights(reduce: Reduce) -> None:
    weighting = focal(reduce)
    for _ in range(3):
        weights = weighting(torch.full((10,), 0.3), torch.arange(10) % STEPS)
    assert weights.tolist() == pytest.approx([0.8**20] * 10)


@EVERY
@given(SEEDS)
def test_without_an_exponent_all_weights_are_one(reduce: Reduce, seed: int) -> None:
    weighting = focal(reduce, gamma=0.0)
    for loss, step in batches(seed):
        assert weighting(loss, step).tolist() == [1.0] * len(step)


@EVERY
@given(SEEDS)
def test_permuting_the_batch_permutes_the_weights(reduce: Reduce, seed: int) -> None:
    one, other = focal(reduce), focal(reduce)
    for loss, step in batches(seed):
        order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(seed))
        weights = one(loss, step)
        assert other(loss[order], step[order]).tolist() == pytest.approx(weights[order].tolist(), rel=1e-9)


@EVERY
@given(SEEDS, st.floats(1e-12, 1e12))
def test_scaling_all_losses_changes_nothing(reduce: Reduce, seed: int, factor: float) -> None:
    one, other = focal(reduce), focal(reduce)
    for loss, step in batches(seed):
        assert other(factor * loss, step).tolist() == pytest.approx(one(loss, step).tolist(), rel=1e-9)


@EVERY
def test_losses_of_zero_give_finite_weights(reduce: Reduce) -> None:
    weighting = focal(reduce)
    assert weighting.current().tolist() == [1.0] * STEPS
    assert weighting(torch.zeros(4), torch.tensor([0, 0, 1, 4])).tolist() == [1.0] * 4
    weights = weighting(torch.tensor([0.0, 2.0]), torch.tensor([0, 3]))
    assert weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("reduce", "equal"), [(Reduce.MEAN, True), (Reduce.SUM, False)])
def test_uneven_counts(reduce: Reduce, equal: bool) -> None:
    weighting = focal(reduce)
    step = torch.tensor([0] * 12 + [1, 2, 3, 4])
    for _ in range(4):
        weighting(torch.ones(16), step)
        weighting(torch.ones(12), torch.zeros(12, dtype=torch.int64))
    weights = weighting.current()
    assert torch.allclose(weights, weights[0].expand(STEPS)) == equal
    if not equal:
        assert bool((weights[1:] > 100 * weights[0]).all())


def test_a_step_that_holds_much_of_the_loss_counts_less() -> None:
    weights = focal()(torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0]), torch.arange(STEPS))
    assert bool((weights[1:] > weights[0]).all())


@pytest.mark.parametrize(
    "config",
    [
        StepWeights(),
        StepWeights(reduce=Reduce.SUM),
        StepWeights(Weighting.UNIFORM),
        StepWeights(Weighting.LINEAR, gamma=1.0),
        StepWeights(Weighting.TABLE, table=(1, 2, 3, 4, 0)),
    ],
    ids=lambda config: f"{config.kind.value} {config.reduce.value}",
)
def test_weights_carry_no_gradient_and_the_dtype_of_the_losses(config: StepWeights) -> None:
    for dtype in (torch.float32, torch.float64):
        loss = torch.rand(6, dtype=dtype, requires_grad=True)
        weights = StepWeighting(config, STEPS)(loss, torch.arange(6) % STEPS)
        assert not weights.requires_grad
        assert (weights.shape, weights.dtype) == ((6,), dtype)


def test_weights_that_do_not_look_at_the_losses() -> None:
    step = torch.tensor([0, 4, 2])
    for loss in (torch.zeros(3), torch.rand(3)):
        assert StepWeighting(StepWeights(Weighting.UNIFORM), STEPS)(loss, step).tolist() == [1, 1, 1]
        linear = StepWeighting(StepWeights(Weighting.LINEAR, gamma=2.0), STEPS)(loss.double(), step)
        assert linear.tolist() == pytest.approx([3.0, 1.4, 2.2])
        table = StepWeighting(StepWeights(Weighting.TABLE, table=(1, 2, 3, 4, 0)), STEPS)(loss, step)
        assert table.tolist() == [1, 0, 3]


def test_a_table_of_another_length() -> None:
    with pytest.raises(ValueError, match="the table has 3 weights and the samples 5 steps"):
        StepWeighting(StepWeights(Weighting.TABLE, table=(1, 1, 1)), STEPS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": Weighting.TABLE}, "table= goes with kind=TABLE, got table and 0 weights"),
        ({"table": (1.0,)}, "table= goes with kind=TABLE, got focal and 1 weights"),
        ({"kind": Weighting.TABLE, "table": (1.0, -1.0)}, "weights must be 0 or more and not all 0"),
        ({"kind": Weighting.TABLE, "table": (0.0, 0.0)}, "weights must be 0 or more and not all 0"),
        ({"kind": Weighting.TABLE, "table": (float("nan"),)}, "weights must be 0 or more and not all 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"gamma": -1.0}, "gamma must be 0 or more, got -1.0"),
    ],
)
def test_what_is_no_weighting(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepWeights(**given)


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@given(SEEDS)
def test_weights_never_vanish(steps: int, reduce: Reduce, seed: int) -> None:
    """However few steps a sampler has; places on its list are all that counts, be its timesteps whole or not."""
    generator = torch.Generator().manual_seed(seed)
    weighting = StepWeighting(StepWeights(reduce=reduce), steps)
    for _ in range(5):
        step = torch.arange(2 * steps) % steps
        weights = weighting(torch.rand(2 * steps, generator=generator) + 0.1, step)
        assert bool(torch.isfinite(weights).all())
        assert float(weights.max()) > 0
    if steps == 1 or (steps == 2 and reduce is Reduce.MEAN):
        assert weights.tolist() == [1.0] * 2 * steps
    else:
        assert len(set(weights.tolist())) > 1
