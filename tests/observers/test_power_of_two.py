"""The vote, against a loop in float64, against exact fractions, and in the case that its guard is for."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmq_ao.config import PowerOfTwo, Ties
from dmq_ao.numerics import along, choose_qparams
from dmq_ao.observers import Vote, ballots, candidate_errors, elect
from dmq_ao.observers.power_of_two import VoteTable

SEEDS = st.integers(0, 2**31)
PUBLISHED = PowerOfTwo(guard=False, ties=Ties.FINE)


def random_errors(seed: int, samples: int = 20, channels: int = 6) -> Tensor:
    """Few distinct values, so that there are ties of errors and of votes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (samples, channels, 4), generator=generator).float()


def minority_of_outliers() -> Tensor:
    """Errors of 20 samples: channel 0 is small but for two samples that fill the range, channel 1 is always small."""
    x = torch.rand(20, 2, 16) * 0.1
    x[[3, 11], 0] = torch.rand(2, 16) * 0.5 + 0.5
    scale, zero_point = choose_qparams(x.min(), x.max(), 8, symmetric=False)
    return candidate_errors(x, scale[None], zero_point[None], 8, 1, 3)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("shape", "ch_axis"), [((3, 4, 5, 2), 1), ((3, 10, 4), -1), ((3, 10, 4), 2), ((3, 4), 1)])
@pytest.mark.parametrize("bits", [4, 8])
def test_candidate_errors_in_a_float64_loop(bits: int, shape: tuple[int, ...], ch_axis: int, per_row: bool) -> None:
    x = torch.randn(shape) * along(torch.exp2(-torch.arange(4.0)), ch_axis, len(shape))
    scale = torch.tensor([0.02, 0.05, 0.11]) * 2.0 ** (8 - bits)
    zero_point = torch.tensor([2, 2 ** (bits - 1), 2**bits - 1], dtype=torch.int32)
    if not per_row:
        scale, zero_point = scale[1:2], zero_point[1:2]
    errors = candidate_errors(x, scale, zero_point, bits, ch_axis, 3)
    assert (errors.shape, errors.dtype) == ((3, 4, 4), torch.float32)
    for sample, channel, exponent in itertools.product(range(3), range(4), range(4)):
        row = sample if per_row else 0
        step, zero = float(scale[row]) / 2**exponent, int(zero_point[row])
        total = 0.0
        values = x[sample].select(ch_axis if ch_axis < 0 else ch_axis - 1, channel).flatten().tolist()
        for value in values:
            code = min(max(round(value / step) + zero, 0), 2**bits - 1)
            total += ((code - zero) * step - value) ** 2
        assert float(errors[sample, channel, exponent]) == pytest.approx(total / len(values), rel=1e-3, abs=1e-12)


def test_candidate_errors_leave_the_input_alone() -> None:
    x = torch.randn(2, 3, 4)
    before = x.clone()
    candidate_errors(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), 8, 1, 3)
    assert torch.equal(x, before)


def test_ballots_count_the_best_exponent_of_each_sample() -> None:
    errors = torch.tensor([[[4.0, 3, 2, 1], [1, 2, 3, 4]], [[4, 3, 2, 1], [2, 1, 3, 4]], [[9, 3, 4, 5], [1, 2, 2, 2]]])
    assert ballots(errors).tolist() == [[0, 1, 0, 2], [2, 1, 0, 0]]


def test_equal_errors_vote_coarse_or_as_published_fine() -> None:
    errors = torch.tensor([[[5.0, 1, 1, 2], [7, 7, 7, 7]]])
    assert ballots(errors, Ties.COARSE).argmax(-1).tolist() == [1, 0]
    assert ballots(errors, Ties.FINE).argmax(-1).tolist() == [2, 3]


@given(SEEDS, st.sampled_from(list(Ties)), st.integers(1, 19))
def test_order_and_batches_of_the_ballots_do_not_matter(seed: int, ties: Ties, cut: int) -> None:
    errors = random_errors(seed)
    shuffled = errors[torch.randperm(20, generator=torch.Generator().manual_seed(seed))]
    expected = ballots(errors, ties)
    assert expected.sum(-1).tolist() == [20] * 6
    assert torch.equal(ballots(shuffled, ties), expected)
    assert torch.equal(ballots(shuffled[:cut], ties) + ballots(shuffled[cut:], ties), expected)


@pytest.mark.parametrize(
    ("votes", "of", "agreement", "exponent"),
    [(17, 20, 0.85, 2), (16, 20, 0.85, 0), (54, 100, 0.54, 2), (51, 85, 0.6, 2), (20, 20, 1.0, 2), (19, 20, 1.0, 0)],
)
def test_agreement_is_enough_when_equal(votes: int, of: int, agreement: float, exponent: int) -> None:
    assert elect(torch.tensor([[of - votes, 0, votes, 0]]), agreement).tolist() == [exponent]


@given(st.integers(1, 12_000), st.data(), st.integers(51, 100))
def test_agreement_is_the_fraction(of: int, data: st.DataObject, percent: int) -> None:
    needed = Fraction(percent, 100) * of
    votes = data.draw(st.sampled_from([int(needed), int(needed) + 1]).filter(lambda v: 2 * v > of and v <= of))
    exponent = int(elect(torch.tensor([[of - votes, votes]]), percent / 100))
    assert exponent == (1 if votes >= needed else 0)


@given(SEEDS)
def test_more_agreement_than_there_can_be_elects_no_scaling(seed: int) -> None:
    counts = ballots(random_errors(seed))
    assert elect(counts, 1.01).tolist() == [0] * 6
    assert elect(counts, 1.01, Ties.FINE).tolist() == [0] * 6


def test_equal_votes_elect_coarse_or_as_published_fine() -> None:
    counts = torch.tensor([[0, 5, 5, 0], [5, 0, 0, 5]])
    assert elect(counts, 0.5, Ties.COARSE).tolist() == [1, 0]
    assert elect(counts, 0.5, Ties.FINE).tolist() == [2, 3]
    assert elect(counts, 0.5).dtype == torch.int8


@pytest.mark.parametrize("kind", [Vote, VoteTable])
@pytest.mark.parametrize(("ties", "exponents"), [(Ties.COARSE, [1, 0, 1]), (Ties.FINE, [3, 3, 2])])
def test_both_ties_of_a_vote_go_the_way_it_was_given(
    ties: Ties, exponents: list[int], kind: type[Vote] | type[VoteTable]
) -> None:
    """Channel 0: two exponents with as many votes; channel 1: equal errors; channel 2: both."""
    errors = torch.tensor(
        [[[9.0, 1, 2, 3], [5.0, 5, 5, 5], [9.0, 1, 1, 9]], [[9.0, 3, 2, 1], [5.0, 5, 5, 5], [9.0, 1, 1, 9]]]
    )
    vote = kind(PowerOfTwo(agreement=0.5, guard=False, ties=ties))
    vote.update(errors, torch.tensor([500, 500]))
    assert vote.elect().exponents.reshape(-1).tolist() == exponents


@pytest.mark.parametrize(("config", "exponent"), [(PowerOfTwo(), 0), (PUBLISHED, 3)])
def test_a_channel_of_zeros(config: PowerOfTwo, exponent: int) -> None:
    vote = Vote(config)
    vote.update(candidate_errors(torch.zeros(5, 2, 7), torch.ones(1), torch.tensor([9]), 8, 1, config.max_exponent))
    assert vote.elect().exponents.tolist() == [exponent] * 2


def test_the_guard_refuses_a_vote_that_costs_more_than_it_brings() -> None:
    errors = minority_of_outliers()
    vote = Vote(PowerOfTwo())
    vote.update(errors)
    election = vote.elect()
    assert election.exponents.tolist() == [0, 3]
    assert election.refused == 1
    assert election.agreement.tolist() == pytest.approx([0.9, 1.0])


@pytest.mark.parametrize("config", [PUBLISHED, PowerOfTwo(guard=False)])
def test_the_published_vote_has_no_guard(config: PowerOfTwo) -> None:
    errors = minority_of_outliers()
    vote = Vote(config)
    vote.update(errors)
    election = vote.elect()
    assert election.exponents.tolist() == [3, 3]
    assert election.refused == 0
    total = errors[:, 0].sum(0)
    assert total[3] > 10 * total[0]


def test_full_agreement_needs_no_guard_there() -> None:
    vote = Vote(PowerOfTwo(agreement=1.0, guard=False))
    vote.update(minority_of_outliers())
    assert vote.elect().exponents.tolist() == [0, 3]


@given(SEEDS, st.sampled_from(list(Ties)), st.floats(0, 1))
def test_the_guard_never_raises_a_channels_error(seed: int, ties: Ties, agreement: float) -> None:
    errors = random_errors(seed)
    guarded = Vote(PowerOfTwo(agreement=agreement, ties=ties))
    guarded.update(errors)
    election = guarded.elect()
    total = errors.double().sum(0)
    chosen = total[torch.arange(6), election.exponents.long()]
    assert bool((chosen <= total[:, 0]).all())
    # It refuses nothing else.
    free = elect(ballots(errors, ties), agreement, ties)
    raised = total[torch.arange(6), free.long()] > total[:, 0]
    assert torch.equal(election.exponents, torch.where(raised, torch.zeros_like(free), free))
    assert election.refused == int(raised.sum())


def test_a_vote_in_batches_is_the_vote_at_once() -> None:
    errors = random_errors(7)
    at_once, in_parts = Vote(PowerOfTwo(agreement=0.3)), Vote(PowerOfTwo(agreement=0.3))
    at_once.update(errors)
    for part in errors.split([1, 4, 15]):
        in_parts.update(part)
    assert torch.equal(at_once.counts, in_parts.counts)
    assert torch.equal(at_once.errors, in_parts.errors)


def test_a_vote_goes_on_from_its_state() -> None:
    first, second = random_errors(1), random_errors(2)
    whole = Vote(PowerOfTwo(agreement=0.3))
    whole.update(first)
    state = whole.state()
    kept = {key: value.clone() for key, value in state.items()}
    resumed = Vote(PowerOfTwo(agreement=0.3))
    resumed.load_state(state)
    whole.update(second)
    assert all(torch.equal(state[key], kept[key]) for key in kept), "a state taken earlier has changed"
    resumed.update(second)
    assert torch.equal(whole.elect().exponents, resumed.elect().exponents)
    for key, value in whole.state().items():
        assert torch.equal(value, resumed.state()[key])


def test_the_largest_exponent_is_that_of_the_config() -> None:
    x = torch.rand(4, 1, 9) * 0.01
    scale = torch.tensor([1 / 255])
    for largest in (1, 2, 3):
        vote = Vote(PowerOfTwo(max_exponent=largest))
        vote.update(candidate_errors(x, scale, torch.zeros(1, dtype=torch.int32), 8, 1, largest))
        assert vote.elect().exponents.tolist() == [largest]
