"""The stages of a calibration, in the order that they run in: the one place where a new stage is entered.

What a stage needs besides its row here is its field of ``Recipe``, from which the digest of a run and ``learns``
follow, and the field of ``CalibrationReport`` that it fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from tqdm.auto import tqdm

from dmq_ao.algorithms.distillation import distill
from dmq_ao.algorithms.features import find_feature_node
from dmq_ao.algorithms.layerwise import Reconstruction
from dmq_ao.algorithms.ranges import observe, passes_of
from dmq_ao.algorithms.relations import Watched
from dmq_ao.algorithms.units import units_of
from dmq_ao.api.report import CalibrationReport
from dmq_ao.config import Recipe
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.mixed_precision.search_bits import apply_bits, find_bits
from dmq_ao.mixed_precision.sensitivity import protect
from dmq_ao.observers import VoteReport
from dmq_ao.quantizer.prepared import observers
from dmq_ao.samples import CalibrationSet
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization.checkpoint import Checkpoint


@dataclass
class Run:
    """One calibration under way, as its stages see it.

    Attributes:
        prepared: the graph; its observers and state are changed in place.
        samples: to calibrate on.
        graph_samples: the same as the graph takes them; where there are several sizes, those of the largest bucket.
        others: the samples of other sizes, a bucket each.
        recipe: as asked for.
        checkpoint: where stages save their progress.
        seed: of all that is drawn.
        batch_size: rows per forward pass.
        max_memory: bytes of values to hold.
        bits: widths that were given.
        learning: what layers learned, once they have.
    """

    prepared: GraphModule
    samples: CalibrationSet
    graph_samples: GraphSamples
    recipe: Recipe
    checkpoint: Checkpoint
    seed: int
    batch_size: int
    max_memory: int
    bits: BitPlan | None
    others: tuple[GraphSamples, ...] = ()
    learning: Reconstruction | None = None

    def batches(self) -> Iterator[list[Tensor]]:
        """The graph's arguments [B, ...], a list a batch, of all buckets, made as they are asked for."""
        buckets = (self.graph_samples, *self.others)
        return (batch.arguments for bucket in buckets for batch in bucket.batches(self.batch_size))

    @cached_property
    def watched(self) -> Watched | None:
        """What a distillation's relation looks at; None for a recipe without.

        Raises:
            ValueError: where there are no such features, or no windows among the samples.
        """
        relation = None if self.recipe.distillation is None else self.recipe.distillation.relation
        if relation is None:
            return None
        node, ch_axis = find_feature_node(self.prepared, relation.tap)
        return Watched(relation, node, ch_axis, self.graph_samples.earlier(relation.window))


@dataclass(frozen=True)
class Stage:
    """One stage of a calibration.

    Attributes:
        label: of its progress bar.
        unit: of the bar's ticks.
        fields: of ``Recipe`` that ask for it.
        reports: fields of ``CalibrationReport`` that it fills.
        ticks: how many there will be.
        run: does it, and returns the report with what it adds.
        condition: whether a run has it; by its ``fields`` alone where this is None.
        check: what can be known to be wrong before the first stage begins.
    """

    label: str
    unit: str
    fields: tuple[str, ...]
    reports: tuple[str, ...]
    ticks: Callable[[Run], int]
    run: Callable[[Run, CalibrationReport, tqdm[Any]], CalibrationReport]
    condition: Callable[[Run], bool] | None = None
    check: Callable[[Run], object] | None = None

    def is_asked(self, run: Run) -> bool:
        """Whether a run has this stage."""
        if self.condition is not None:
            return self.condition(run)
        return any(run.recipe.asks_for(name) for name in self.fields)


def run_stages(run: Run, report: CalibrationReport, progress: bool) -> CalibrationReport:
    """Run every stage that is asked for, one after the other."""
    stages = [stage for stage in STAGES if stage.is_asked(run)]
    for stage in stages:
        if stage.check is not None:
            stage.check(run)
    for stage in stages:
        total = stage.ticks(run)
        with tqdm(total=total, disable=not progress or not total, unit=stage.unit, desc=stage.label) as bar:
            report = stage.run(run, report, bar)
    return report


def _layer_count(run: Run) -> int:
    return len(observers(run.prepared))


def _protect(run: Run, report: CalibrationReport, bar: tqdm[Any]) -> CalibrationReport:
    """More bits for the layers that the output is most sensitive to."""
    protection = run.recipe.protection
    assert protection is not None
    arguments = run.graph_samples.spread(protection.samples).whole().arguments
    protect(run.prepared, arguments, protection, run.checkpoint, bar)
    return report


def _set_bits(run: Run, report: CalibrationReport, bar: tqdm[Any]) -> CalibrationReport:
    """A width for each output channel: those that were given, or a search."""
    bits, allocation = run.bits, run.recipe.allocation
    if bits is None:
        assert allocation is not None
        bits = find_bits(
            run.prepared, run.samples, allocation, batch_size=run.batch_size, bar=bar, checkpoint=run.checkpoint
        )
    apply_bits(run.prepared, bits)
    return replace(report, bits=bits)


def _observe(run: Run, report: CalibrationReport, bar: tqdm[Any]) -> CalibrationReport:
    """Ranges and votes from the float network."""
    resumed = observe(run.prepared, run.batches, _batch_count(run), run.checkpoint, bar)
    return replace(report, resumed=resumed, votes=_votes(run.prepared))


def _batch_count(run: Run) -> int:
    return sum(math.ceil(len(bucket) / run.batch_size) for bucket in (run.graph_samples, *run.others))


def _votes(prepared: GraphModule) -> dict[str, VoteReport]:
    votes = {}
    for name, (_, activation) in observers(prepared).items():
        if activation is not None:
            activation.decide()
            if activation.election is not None:
                votes[name] = activation.election.report()
    return votes


def _learn_layers(run: Run, report: CalibrationReport, bar: tqdm[Any]) -> CalibrationReport:
    """Layers and blocks, each seeing those before it quantized."""
    learning = Reconstruction(
        run.prepared,
        run.recipe,
        run.graph_samples,
        batch_size=run.batch_size,
        seed=run.seed,
        max_memory=run.max_memory,
        checkpoint=run.checkpoint,
        bar=bar,
    )
    learning.run()
    run.learning = learning
    return replace(
        report,
        resumed=bool(learning.restored),
        votes=learning.votes,
        layers=learning.learned,
        blocks=learning.blocks,
    )


def _distill(run: Run, report: CalibrationReport, bar: tqdm[Any]) -> CalibrationReport:
    """What stays in float learns to make up for the codes."""
    config = run.recipe.distillation
    assert config is not None
    assert run.learning is not None
    outcome = distill(
        run.prepared,
        run.graph_samples,
        config,
        run.learning.holdout,
        layout=run.learning.output_layout(),
        batch_size=run.batch_size,
        watched=run.watched,
        seed=run.seed,
        checkpoint=run.checkpoint,
        bar=bar,
    )
    return replace(report, distillation=outcome)


def _distillation_steps(run: Run) -> int:
    assert run.recipe.distillation is not None
    return run.recipe.distillation.steps


STAGES = (
    Stage("sensitivity", "layer", ("protection",), (), _layer_count, _protect),
    Stage(
        "bits",
        "layer",
        ("allocation",),
        ("bits",),
        lambda run: _layer_count(run) if run.bits is None else 0,
        _set_bits,
        condition=lambda run: run.bits is not None or run.recipe.allocation is not None,
    ),
    Stage(
        "calibrate",
        "batch",
        (),
        ("resumed", "votes"),
        lambda run: _batch_count(run) * len(passes_of(run.prepared)),
        _observe,
        condition=lambda run: not run.recipe.learns,
    ),
    Stage(
        "calibrate",
        "unit",
        ("scaling", "rounding", "bias_correction", "blocks"),
        ("resumed", "votes", "layers", "blocks"),
        lambda run: len(units_of(run.prepared)),
        _learn_layers,
        condition=lambda run: run.recipe.learns,
    ),
    Stage(
        "distill",
        "step",
        ("distillation",),
        ("distillation",),
        _distillation_steps,
        _distill,
        check=lambda run: run.watched,
    ),
)
