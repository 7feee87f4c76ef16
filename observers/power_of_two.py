"""Power-of-two scaling of activation channels, chosen by vote (DMQ, arXiv 2507.12933).

Channel c gets the step ``scale * 2**-e_c``. Each sample votes for the exponent that quantizes the channel best; a
winner without enough agreement yields to exponent 0, the plain step. Only finer steps are on offer, so a vote trades
clipping for resolution, and the guard refuses a trade that costs more than it brings. Exponent 0 as the fallback is
that of the published code; kernels shift codes by eq. 13 and 28 to 29 of the paper (``records.shifts``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dmq_ao import numerics
from dmq_ao.config import PowerOfTwo, Ties


def candidate_errors(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, ch_axis: int, max_exponent: int
) -> Tensor:
    """Mean squared error of every channel of every sample under every exponent.

    Args:
        x: [samples, ...], channels on ``ch_axis``.
        scale: [samples] or [1] float32, step of exponent 0.
        zero_point: [samples] or [1] int32, shared by all exponents.
        bits: width of a code.
        ch_axis: channel axis of ``x``, not 0.
        max_exponent: largest exponent tried.

    Returns:
        [samples, channels, exponents] float32, exponents 0 to ``max_exponent``.
    """
    by_channel = x.detach().float().movedim(ch_axis, 1)
    by_channel = by_channel.reshape(*by_channel.shape[:2], -1)
    scale, zero_point = numerics.along(scale, 0, 3), numerics.along(zero_point, 0, 3)
    quant_min, quant_max = numerics.code_range(bits, symmetric=False)
    errors = []
    for exponent in range(max_exponent + 1):
        actual = numerics.fake_quantize(by_channel, scale * 2.0**-exponent, zero_point, quant_min, quant_max)
        errors.append((actual - by_channel).square().mean(-1))
    return torch.stack(errors, dim=-1)


def ballots(errors: Tensor, ties: Ties = Ties.COARSE) -> Tensor:
    """How many samples vote for each exponent.

    Args:
        errors: [samples, channels, exponents].
        ties: equal errors go to the coarse step (ours) or to the fine one (as published code computes).

    Returns:
        [channels, exponents] int64.
    """
    count = errors.shape[-1]
    choice = count - 1 - errors.flip(-1).argmin(-1) if ties is Ties.FINE else errors.argmin(-1)
    return one_hot(choice, count).sum(0)


def elect(counts: Tensor, agreement: float, ties: Ties = Ties.COARSE) -> Tensor:
    """One exponent per channel from the counted ballots.

    Args:
        counts: [channels, exponents] int64; every row has the same sum.
        agreement: share of the ballots that the winner needs; equality is enough.
        ties: which of two equal winners wins.

    Returns:
        [channels] int8; 0 where the winner lacks agreement.
    """
    count = counts.shape[-1]
    winner = count - 1 - counts.flip(-1).argmax(-1) if ties is Ties.FINE else counts.argmax(-1)
    # A little less than the decimal fraction asks, so that 17 ballots of 20 are an agreement of 0.85.
    quorum = agreement * counts.sum(-1).double() - 1e-6
    return torch.where(counts.amax(-1) >= quorum, winner, torch.zeros_like(winner)).to(torch.int8)


@dataclass(frozen=True)
class VoteReport:
    """Outcome of one layer's power-of-two vote: how many channels took each exponent, and how many were refused."""

    channels: dict[int, int]
    refused: int
    mean_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "channels": {str(exponent): count for exponent, count in self.channels.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VoteReport:
        """What ``to_dict`` gave."""
        return cls(**{**data, "channels": {int(exponent): count for exponent, count in data["channels"].items()}})


@dataclass(frozen=True, eq=False)
class Election:
    """The outcome of a vote.

    Attributes:
        exponents: [channels] int8; [timesteps, channels] of a vote per timestep.
        agreement: float32 of the same shape, share of the samples behind the winner.
        refused: channels whose vote the guard refused.
    """

    exponents: Tensor
    agreement: Tensor
    refused: int

    def report(self) -> VoteReport:
        """In numbers that people read."""
        values, counts = self.exponents.unique(return_counts=True)
        channels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return VoteReport(channels, self.refused, float(self.agreement.mean()))


class Vote:
    """Ballots and summed errors of a stream of samples: [channels, exponents], whatever the number of samples."""

    def __init__(self, config: PowerOfTwo) -> None:
        """Start clean."""
        self.config = config
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.errors = torch.zeros(0, dtype=torch.float64)

    def update(self, errors: Tensor, timestep: Tensor | None = None) -> None:
        """Count errors [B, channels, exponents] of ``candidate_errors``, whatever the ``timestep``."""
        counts, total = ballots(errors, self.config.ties).cpu(), errors.double().sum(0).cpu()
        self.counts = counts if not len(self.counts) else self.counts + counts
        self.errors = total if not len(self.errors) else self.errors + total

    def elect(self) -> Election:
        """Exponents under agreement and guard."""
        exponents = elect(self.counts, self.config.agreement, self.config.ties)
        share = self.counts.amax(-1) / self.counts.sum(-1).clamp_min(1)
        if not self.config.guard:
            return Election(exponents, share, refused=0)
        errors = self.errors.gather(1, exponents.long()[:, None])[:, 0]
        worse = errors > self.errors[:, 0]
        return Election(torch.where(worse, torch.zeros_like(exponents), exponents), share, int(worse.sum()))

    def state(self) -> dict[str, Tensor]:
        """``counts`` and ``errors``, both [channels, exponents]; [0] before the first."""
        return {"counts": self.counts, "errors": self.errors}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned, [channels, exponents] both."""
        self.counts, self.errors = state["counts"], state["errors"]


class VoteTable:
    """A vote for each timestep, as the published code holds it."""

    def __init__(self, config: PowerOfTwo) -> None:
        """Start clean."""
        self.config = config
        self.rows: dict[float, Vote] = {}

    @property
    def counts(self) -> Tensor:
        """Ballots of all timesteps, [timesteps * channels, exponents]; empty before the first."""
        return torch.cat([vote.counts for vote in self.rows.values()]) if self.rows else torch.zeros(0)

    def update(self, errors: Tensor, timestep: Tensor | None = None) -> None:
        """Count errors [B, channels, exponents] at ``timestep`` [B]."""
        assert timestep is not None
        timestep = timestep.reshape(-1).expand(len(errors))
        for value in timestep.unique():
            self.rows.setdefault(float(value), Vote(self.config)).update(errors[timestep == value])

    def elect(self) -> Election:
        """Exponents [timesteps, channels], timesteps descending as in the table of ranges."""
        elections = [self.rows[key].elect() for key in sorted(self.rows, reverse=True)]
        return Election(
            torch.stack([one.exponents for one in elections]),
            torch.stack([one.agreement for one in elections]),
            sum(one.refused for one in elections),
        )

    def state(self) -> dict[str, Tensor]:
        """``counts`` and ``errors`` [channels, exponents] of each vote, by timestep and name."""
        return {f"{key}/{name}": value for key, vote in self.rows.items() for name, value in vote.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned, [channels, exponents] each."""
        self.rows = {}
        for path, value in state.items():
            key, _, name = path.partition("/")
            vote = self.rows.setdefault(float(key), Vote(self.config))
            vote.load_state({**vote.state(), name: value})
