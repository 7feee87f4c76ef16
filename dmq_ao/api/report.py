"""What a calibration found, for a person and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dmq_ao.algorithms.distillation import DistillationReport
from dmq_ao.algorithms.units import BlockLearning, LayerLearning
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.observers import VoteReport


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found.

    Attributes:
        samples: rows seen.
        seconds: wall-clock time of this call.
        resumed: whether it went on from saved state.
        sqnr_db: per layer, signal-to-noise ratio of its output on float inputs, integers against float.
        votes: per layer that voted.
        layers: per layer of a recipe that learns.
        blocks: per block of a recipe that reconstructs them.
        bits: of every output channel, where they were given or searched.
        distillation: of a recipe that ends with it.
        peak_bytes: largest memory of the process so far, where the system tells.
    """

    samples: int
    seconds: float
    resumed: bool
    sqnr_db: dict[str, float] = field(default_factory=dict)
    votes: dict[str, VoteReport] = field(default_factory=dict)
    layers: dict[str, LayerLearning] = field(default_factory=dict)
    blocks: dict[str, BlockLearning] = field(default_factory=dict)
    bits: BitPlan | None = None
    distillation: DistillationReport | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "samples": self.samples,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "sqnr_db": self.sqnr_db,
            "votes": {name: vote.to_dict() for name, vote in self.votes.items()},
            "layers": {name: asdict(one) for name, one in self.layers.items()},
            "blocks": {name: asdict(one) for name, one in self.blocks.items()},
            "bits": None if self.bits is None else self.bits.summary(),
            "distillation": None if self.distillation is None else asdict(self.distillation),
            "peak_bytes": self.peak_bytes,
        }
