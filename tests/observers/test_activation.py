"""The observer of a layer's input: what it decides, and that nothing but the data decides it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dmq_ao.config import MissingStatistics, PowerOfTwo, Ranges, TensorConfig
from dmq_ao.numerics import choose_qparams, fake_quantize, ops
from dmq_ao.observers import ALL_OBSERVERS, ActivationObserver, candidate_errors, elect
from dmq_ao.observers.power_of_two import ballots
from dmq_ao.records import ActivationRecord

LAYER = "mid_block.attentions.0.to_q"
TIMESTEPS = [900, 500, 100]
Event = Callable[[ActivationObserver], object]


def make(
    ranges: Ranges = Ranges.STATIC, bits: int = 8, name: str = "minmax", votes: PowerOfTwo | None = None
) -> ActivationObserver:
    config = TensorConfig(bits=bits, ranges=ranges, observer=name)
    return ActivationObserver(LAYER, config, 1, ALL_OBSERVERS[name], votes)


def batch(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows at three timesteps in turn, the later the larger; channel c fills ``2**-c`` of the range of its row."""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.tensor(TIMESTEPS * rows)[:rows]
    size = (1000 - timestep).reshape(-1, 1, 1) / 100 * torch.exp2(-torch.arange(4.0)).reshape(4, 1)
    x = torch.rand(rows, 4, 60, generator=generator) * 1.5 - 0.5
    x[:, :, 0], x[:, :, 1] = -0.5, 1.0
    return x * size, timestep


def equal(one: ActivationRecord, other: ActivationRecord) -> bool:
    def same(first: object, second: object) -> bool:
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            return first.dtype == second.dtype and torch.equal(first, second)
        return first == second

    return all(same(value, vars(other)[field]) for field, value in vars(one).items())


def calibrated(observer: ActivationObserver, x: Tensor, timestep: Tensor) -> ActivationRecord:
    observer.start_ranges()
    observer(x, timestep)
    observer.start_votes()
    observer(x, timestep)
    return observer.record()


def test_static_ranges_of_known_data() -> None:
    observer = make()
    observer(torch.tensor([[-1.0, 0.5], [2.0, 1.0]]))
    observer(torch.tensor([[3.0, 0.0], [0.0, -0.2]]))
    record = observer.record()
    assert record.scale.tolist() == pytest.approx([4 / 255])
    assert record.zero_point.tolist() == [64]  # 255 / 4 = 63.75
    assert (record.bits, record.ch_axis, record.ranges) == (8, 1, Ranges.STATIC)
    assert record.timesteps is None
    assert record.exponents is None


def test_per_step_ranges_of_known_data() -> None:
    observer = make(Ranges.PER_STEP, bits=4)
    x = torch.tensor([[0.0, 15.0], [-3.0, 12.0], [0.0, 1.5], [0.0, 30.0]])
    assert observer(x, torch.tensor([100, 900, 500, 100])) is x
    record = observer.record()
    assert record.timesteps is not None
    assert record.timesteps.tolist() == [900, 500, 100]
    assert record.scale.tolist() == pytest.approx([1.0, 0.1, 2.0])
    assert record.zero_point.tolist() == [3, 0, 0]
    assert tuple(map(Tensor.tolist, observer.calculate_qparams())) == (record.scale.tolist(), [3, 0, 0])


def test_dynamic_ranges_are_of_each_sample() -> None:
    observer = make(Ranges.DYNAMIC, bits=6)
    x, _ = batch()
    observer(x)
    record = observer.record()
    assert (record.scale.numel(), record.zero_point.numel(), record.timesteps) == (0, 0, None)
    for row, actual in zip(x, observer.simulate(x), strict=True):
        assert torch.equal(actual, fake_quantize(row, *choose_qparams(row.min(), row.max(), 6, False), 0, 63))


def test_one_timestep_serves_a_whole_batch() -> None:
    x, _ = batch()
    one, each = make(Ranges.PER_STEP), make(Ranges.PER_STEP)
    one(x, torch.tensor(500))
    each(x, torch.full((6,), 500))
    assert equal(one.record(), each.record())


@pytest.mark.parametrize("name", [name for name in ALL_OBSERVERS if name != "ema"])
@pytest.mark.parametrize("ranges", list(Ranges))
def test_order_and_batches_do_not_matter(ranges: Ranges, name: str) -> None:
    x, timestep = batch(rows=12)
    order = torch.tensor([7, 2, 11, 0, 5, 9, 1, 3, 10, 4, 8, 6])
    expected = calibrated(make(ranges, name=name, votes=PowerOfTwo()), x, timestep)
    assert expected.exponents is not None
    assert bool(expected.exponents.any())
    assert equal(calibrated(make(ranges, name=name, votes=PowerOfTwo()), x[order], timestep[order]), expected)
    observer = make(ranges, name=name, votes=PowerOfTwo())
    for start in (observer.start_ranges, observer.start_votes):
        start()
        for rows in order.split(5):
            observer(x[rows], timestep[rows])
    assert equal(observer.record(), expected)


def test_unseen_timesteps_take_the_nearest_row() -> None:
    observer = make(Ranges.PER_STEP)
    x, timestep = batch()
    observer(x, timestep)
    seen, unseen = torch.tensor([900, 500, 100] * 2), torch.tensor([999, 650, 0, 701, 301, 120])
    assert torch.equal(observer.simulate(x, unseen), observer.simulate(x, seen))
    assert not torch.equal(observer.simulate(x, unseen), observer.simulate(x, seen.flip(0)))


@pytest.mark.parametrize("name", ALL_OBSERVERS)
@pytest.mark.parametrize("ranges", [Ranges.STATIC, Ranges.PER_STEP])
def test_every_calibration_starts_clean(ranges: Ranges, name: str) -> None:
    x, timestep = batch()
    expected = calibrated(make(ranges, name=name, votes=PowerOfTwo()), x, timestep)
    used = make(ranges, name=name, votes=PowerOfTwo())
    calibrated(used, batch(seed=1)[0].flip(1) * 1000, timestep + 50)
    used.decide()
    assert equal(calibrated(used, x, timestep), expected)


def test_start_ranges_forgets() -> None:
    observer = make(votes=PowerOfTwo())
    calibrated(observer, *batch())
    observer.decide()
    assert observer.election is not None
    observer.start_ranges()
    assert observer.election is None
    with pytest.raises(MissingStatistics):
        observer.record()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ranges", list(Ranges))
def test_an_input_that_is_not_finite_names_the_layer(ranges: Ranges, value: float) -> None:
    x, timestep = batch()
    x[2, 1, 3] = value
    with pytest.raises(ValueError, match=f"{LAYER}: its input holds NaN or infinity; check the samples"):
        make(ranges)(x, timestep)


def test_rows_without_a_timestep_of_their_own_name_the_layer() -> None:
    x, timestep = batch()
    with pytest.raises(ValueError, match=f"{LAYER}: its input has 6 rows and there are 3 timesteps; per_step ranges"):
        make(Ranges.PER_STEP)(x, timestep[:3])
    with pytest.raises(ValueError, match=f"{LAYER}: per_step ranges need the timestep"):
        make(Ranges.PER_STEP)(x)


@pytest.mark.parametrize("ranges", [Ranges.STATIC, Ranges.PER_STEP])
def test_missing_statistics_name_the_layer(ranges: Ranges) -> None:
    words = f"{LAYER}: its input was never observed; run calibrate"
    with pytest.raises(MissingStatistics, match=words):
        make(ranges).record()
    with pytest.raises(MissingStatistics, match=words):
        make(ranges).start_votes()


def test_the_vote_is_held_under_the_frozen_ranges() -> None:
    observer = make(Ranges.PER_STEP, bits=4, votes=PowerOfTwo(agreement=0.5))
    x, timestep = batch(rows=9)
    observer(x, timestep)
    ranges = observer.record()
    observer.start_votes()
    louder = x * 1.2  # would widen the ranges, if they were still open
    observer(louder, timestep)
    record = observer.record()
    assert torch.equal(record.scale, ranges.scale)
    assert torch.equal(record.zero_point, ranges.zero_point)
    rows = torch.tensor([0, 1, 2] * 3)
    errors = candidate_errors(louder, ranges.scale[rows], ranges.zero_point[rows], 4, 1, 3)
    assert record.exponents is not None
    assert torch.equal(record.exponents, elect(ballots(errors), 0.5))
    assert bool(record.exponents.any())
    assert observer.election is None  # looking decides nothing
    observer.decide()
    assert observer.election is not None
    assert torch.equal(observer.election.exponents, record.exponents)
    again = observer.election
    observer.decide()
    assert observer.election is again


def test_without_a_vote_the_second_pass_changes_nothing() -> None:
    observer = make(name="mse", bits=4)
    x, timestep = batch()
    observer(x, timestep)
    before = observer.record()
    observer.start_votes()
    state = observer.state()
    observer(x * 10, timestep)
    assert equal(observer.record(), before)
    assert all(torch.equal(value, observer.state()[key]) for key, value in state.items())


@pytest.mark.parametrize("ranges", list(Ranges))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simulate_is_the_operators_on_the_record(ranges: Ranges, dtype: torch.dtype) -> None:
    x, timestep = batch()
    observer = make(ranges, bits=6, votes=PowerOfTwo())
    record = calibrated(observer, x, timestep)
    step = record.channel_step
    assert step is not None
    if ranges is Ranges.DYNAMIC:
        scale, zero_point = ops.dynamic_qparams(x.to(dtype), 6)
    else:
        rows = torch.tensor([0, 1, 2] * 2) if ranges is Ranges.PER_STEP else torch.tensor([0])
        scale, zero_point = record.scale[rows], record.zero_point[rows]
    codes = ops.quantize(x.to(dtype), scale, zero_point, step, 1, 0, 63)
    expected = ops.dequantize(codes, scale, zero_point, step, 1, dtype)
    actual = observer.simulate(x.to(dtype), timestep)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, x.to(dtype))


@pytest.mark.parametrize("ranges", list(Ranges))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("votes", [None, PowerOfTwo(agreement=0.0), PowerOfTwo(agreement=0.0, per_step=True)])
def test_a_gradient_passes_where_no_code_is_clipped(votes: PowerOfTwo | None, scaled: bool, ranges: Ranges) -> None:
    """A finer step clips sooner: the range of a channel is that of its own step."""
    if votes is not None and votes.per_step and ranges is not Ranges.PER_STEP:
        pytest.skip("a vote for each step needs ranges for each step")
    x, timestep = batch()
    observer = make(ranges, bits=4, votes=votes)
    if scaled:
        observer.channel_scale = torch.tensor([0.5, 1.0, 2.0, 0.25])
    record = calibrated(observer, x, timestep)
    louder = (x.flip(1) * 3).requires_grad_()  # the channels of fine steps are the loud ones now
    values = observer.straight_through(louder, timestep)
    assert torch.equal(values, observer.simulate(louder.detach(), timestep))
    values.sum().backward()
    factors = torch.ones(4, 1) if observer.channel_scale is None else observer.channel_scale[:, None]
    divided = louder.detach() / factors
    rows = torch.tensor([0, 1, 2] * 2) if ranges is Ranges.PER_STEP else torch.zeros(6, dtype=torch.long)
    if ranges is Ranges.DYNAMIC:
        scale, zero_point = ops.dynamic_qparams(divided, 4)
    else:
        scale, zero_point = record.scale[rows], record.zero_point[rows]
    exponents = torch.zeros(4) if record.exponents is None else record.exponents.float()
    exponents = exponents[rows] if exponents.dim() == 2 else exponents.expand(6, 4)
    assert bool(exponents.any()) is (votes is not None)
    step = (scale[:, None] * torch.exp2(-exponents))[:, :, None]  # [B, C, 1]
    codes = divided / step + zero_point[:, None, None]
    inside = (codes >= 0) & (codes <= 15)
    assert louder.grad is not None
    edge = (codes.abs() < 1e-3) | ((codes - 15).abs() < 1e-3)  # where rounding decides
    assert torch.equal(louder.grad[~edge], (inside / factors)[~edge])
    assert bool((louder.grad == 0).any()) is (ranges is not Ranges.DYNAMIC or votes is not None)


def test_a_restored_record_is_taken_as_it_is() -> None:
    x, timestep = batch()
    record = calibrated(make(Ranges.PER_STEP, votes=PowerOfTwo()), x, timestep)
    observer = make(Ranges.PER_STEP, votes=PowerOfTwo())
    observer.restore(record)
    assert observer.record() is record
    observer(x * 100, timestep)
    assert observer.record() is record


def events() -> Iterator[Event]:
    """Two passes over three batches, the second of which also covers layers that hold no vote."""
    for start in (ActivationObserver.start_ranges, ActivationObserver.start_votes):
        yield start
        for seed in range(3):
            yield lambda observer, seed=seed: observer(*batch(seed=seed))  # type: ignore[misc]


@pytest.mark.parametrize("cut", range(1, 9))
@pytest.mark.parametrize("votes", [None, PowerOfTwo(agreement=0.5)])
@pytest.mark.parametrize(
    ("ranges", "name"), [(Ranges.STATIC, "mse"), (Ranges.PER_STEP, "minmax"), (Ranges.DYNAMIC, "minmax")]
)
def test_goes_on_from_a_state_taken_anywhere(ranges: Ranges, name: str, votes: PowerOfTwo | None, cut: int) -> None:
    whole, first, resumed = (make(ranges, 4, name, votes) for _ in range(3))
    for event in events():
        event(whole)
    for event in list(events())[:cut]:
        event(first)
    calibrated(resumed, batch(seed=9)[0] * 100, batch()[1])  # a state replaces what was there
    resumed.load_state({key: value.clone() for key, value in first.state().items()})
    for event in list(events())[cut:]:
        event(resumed)
    assert equal(resumed.record(), whole.record())
    final, expected = resumed.state(), whole.state()
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[key], expected[key]) for key in expected)
