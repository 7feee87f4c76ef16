"""Decide every range, exponent, scale and code of a prepared denoiser, by what its recipe asks for.

A recipe that learns goes layer by layer, each seeing the layers before it quantized (``reconstruct``); one that does
not watches the float network (``observe``). Both save progress in ``state_dir`` and resume to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph, numerics
from dmq_ao.algorithms.blockwise import BlockLearning
from dmq_ao.algorithms.distillation import DistillationReport, distill
from dmq_ao.algorithms.features import find_feature_node
from dmq_ao.algorithms.layerwise import LayerLearning, Reconstruction, units_of
from dmq_ao.algorithms.ranges import observe, passes_of
from dmq_ao.algorithms.relations import Watched
from dmq_ao.config import BitAllocation, Protection, Recipe
from dmq_ao.evaluation import peak_rss_bytes
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.mixed_precision.search_bits import apply_bits, find_bits
from dmq_ao.mixed_precision.sensitivity import forget, protect
from dmq_ao.observers import VoteReport
from dmq_ao.quantizer.quantizer import PLAN, RECIPE, TUNED, float_weight, observers, tables
from dmq_ao.records import LayerPlan
from dmq_ao.samples import CalibrationSet
from dmq_ao.samples.graph_samples import GraphSamples

SQNR = "dmq_ao.sqnr_db"
MEASURED_ROWS = 8
MAX_MEMORY = 3 << 29


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


def calibrate(
    prepared: GraphModule,
    samples: CalibrationSet,
    *,
    state_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 8,
    max_memory: int | None = None,
    bits: BitPlan | None = None,
) -> CalibrationReport:
    """Decide every range, exponent and code of a prepared denoiser. Every call starts clean.

    Args:
        prepared: from ``dmq_ao.prepare``.
        samples: from ``dmq_ao.record``.
        state_dir: folder to save progress in, so that an interrupted call resumes.
        seed: of all that is drawn: batches and positions to learn from, samples held out and measured.
        progress: show a progress bar.
        batch_size: rows per forward pass; bounds the memory.
        max_memory: bytes of intermediate values a learning recipe may hold, 1.5 GiB by default; the rest goes to
            disk. One layer's own work comes on top.
        bits: a width for each output channel, from ``dmq_ao.search_bits`` or by hand; where it is None and the
            recipe allocates bits, they are searched first.

    Raises:
        TypeError: when ``prepared`` is not prepared, ``samples`` are no calibration set, or ``bits`` no plan.
        ValueError: for non-finite activations, naming the layer; for samples that lack an argument, or windows that
            the recipe's distillation relates; for a ``state_dir`` of another run.
        InvalidFile: for a damaged file in ``state_dir``.
    """
    if not isinstance(prepared, GraphModule) or PLAN not in prepared.meta:
        raise TypeError(f"calibrate takes what dmq_ao.prepare returned, got {type(prepared).__name__}")
    if not isinstance(samples, CalibrationSet):
        raise TypeError(
            f"calibrate takes a CalibrationSet, got {type(samples).__name__}; dmq_ao.record makes one from any"
            " sampling loop"
        )
    if bits is not None and not isinstance(bits, BitPlan):
        raise TypeError(f"bits must be a BitPlan, got {type(bits).__name__}; dmq_ao.search_bits makes one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    started = time.monotonic()
    folder = None if state_dir is None else Path(state_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    _start_clean(prepared)
    recipe: Recipe = prepared.meta[RECIPE]
    run = _Run(prepared, samples, recipe, folder, seed if recipe.learns else 0, batch_size, progress, bits)
    found = run.learn(MAX_MEMORY if max_memory is None else max_memory) if recipe.learns else run.watch()
    sqnr = prepared.meta[SQNR] = _decide_and_measure(prepared, samples, seed)
    return CalibrationReport(
        samples=len(samples),
        seconds=time.monotonic() - started,
        sqnr_db=sqnr,
        votes=found.pop("votes", None) or _votes(prepared),
        peak_bytes=peak_rss_bytes(),
        **found,
    )


def _start_clean(prepared: GraphModule) -> None:
    """Forget what an earlier calibration decided."""
    prepared.meta.pop(TUNED, None)
    forget(prepared)
    for name, (weight, activation) in observers(prepared).items():
        weight.start()
        if activation is not None:
            activation.config = prepared.meta[PLAN][name].activation
            activation.channel_scale = None
            activation.start_ranges()


class _Run:
    """The stages of one call, each of which returns what it adds to the report."""

    def __init__(
        self,
        prepared: GraphModule,
        samples: CalibrationSet,
        recipe: Recipe,
        folder: Path | None,
        seed: int,
        batch_size: int,
        progress: bool,
        bits: BitPlan | None,
    ) -> None:
        self.prepared, self.samples, self.recipe, self.bits = prepared, samples, recipe, bits
        self.graph_samples = GraphSamples.of(prepared, samples)
        self.seed, self.batch_size, self.progress = seed, batch_size, progress
        digest = _digest(prepared, samples, batch_size, seed, bits)
        self.state: dict[str, Any] = {"state_dir": folder, "digest": digest}

    def watch(self) -> dict[str, Any]:
        """Ranges and votes from the float network."""
        if self.bits is not None:
            apply_bits(self.prepared, self.bits)
        count = math.ceil(len(self.samples) / self.batch_size)
        with self._bar("calibrate", "batch", count * len(passes_of(self.prepared))) as bar:
            resumed = observe(self.prepared, self._batches, count, **self.state, bar=bar)
        return {"resumed": resumed, "bits": self.bits}

    def learn(self, max_memory: int) -> dict[str, Any]:
        """Protect, decide layer by layer, and distill, as far as the recipe asks."""
        watched = self._watched()
        if self.recipe.protection is not None:
            self._protect(self.recipe.protection)
        if self.bits is None and self.recipe.allocation is not None:
            self.bits = self._allocate(self.recipe.allocation)
        if self.bits is not None:
            apply_bits(self.prepared, self.bits)
        with self._bar("calibrate", "unit", len(units_of(self.prepared))) as bar:
            learning = Reconstruction(
                self.prepared,
                self.recipe,
                self.graph_samples,
                batch_size=self.batch_size,
                seed=self.seed,
                max_memory=max_memory,
                **self.state,
                bar=bar,
            )
            learning.run()
        return {
            "resumed": bool(learning.restored),
            "votes": learning.votes,
            "layers": learning.learned,
            "blocks": learning.blocks,
            "bits": self.bits,
            "distillation": self._distill(learning, watched),
        }

    def _watched(self) -> Watched | None:
        """What a distillation's relation looks at; what is wrong with it must not wait for the other stages."""
        relation = None if self.recipe.distillation is None else self.recipe.distillation.relation
        if relation is None:
            return None
        node, ch_axis = find_feature_node(self.prepared, relation.tap)
        return Watched(relation, node, ch_axis, self.graph_samples.earlier(relation.window))

    def _protect(self, protection: Protection) -> None:
        some = self.graph_samples.spread(protection.samples).whole().arguments
        with self._bar("sensitivity", "layer", len(observers(self.prepared))) as bar:
            protect(self.prepared, some, **self.state, bar=bar)

    def _allocate(self, allocation: BitAllocation) -> BitPlan:
        with self._bar("bits", "layer", len(observers(self.prepared))) as bar:
            return find_bits(
                self.prepared, self.samples, allocation, batch_size=self.batch_size, bar=bar, **self.state
            )

    def _distill(self, learning: Reconstruction, watched: Watched | None) -> DistillationReport | None:
        config = self.recipe.distillation
        if config is None:
            return None
        with self._bar("distill", "step", config.steps) as bar:
            return distill(
                self.prepared,
                self.graph_samples,
                config,
                learning.held,
                layout=learning.output_layout(),
                batch_size=self.batch_size,
                watched=watched,
                seed=self.seed,
                **self.state,
                bar=bar,
            )

    def _batches(self) -> Iterator[list[Tensor]]:
        return (batch.arguments for batch in self.graph_samples.batches(self.batch_size))

    def _bar(self, what: str, unit: str, total: int) -> tqdm[Any]:
        return tqdm(total=total, disable=not self.progress, unit=unit, desc=what)


class _Measure(Interpreter):
    """Runs the float graph and, beside each layer, the same layer with its integers."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.watchers = observers(prepared)
        nodes = graph.layer_nodes(prepared)
        self.nodes = {nodes[name]: name for name in self.watchers}
        self.tables = {nodes[name]: (name, table) for name, table in tables(prepared).items()}
        self.timestep: Tensor | None = None
        self.sqnr: dict[str, float] = {}

    def measure(self, arguments: list[Tensor]) -> dict[str, float]:
        """Output noise of every layer, dB."""
        signature = graph.signature_of(self.module)  # type: ignore[arg-type]
        if signature.timestep is not None:
            self.timestep = arguments[signature.names.index(signature.timestep)]
        self.run(*arguments)
        return self.sqnr

    def run_node(self, n: Node) -> Any:
        """The node's float result; the integers' result only feeds the ratio."""
        expected = super().run_node(n)
        if n in self.nodes:
            name = self.nodes[n]
            weight, activation = self.watchers[name]
            args, _ = self.fetch_args_kwargs_from_env(n)
            x = args[0] if activation is None else activation.simulate(args[0], self.timestep)
            codes = weight.record(args[1]).dequantize().to(args[1].dtype)
            bias = (args[2] if len(args) > 2 else None) if weight.bias is None else weight.bias.to(codes.dtype)
            actual = n.target(x, codes, bias, *args[3:])  # type: ignore[operator]
            self.sqnr[name] = numerics.sqnr(actual, expected)
        elif n in self.tables:
            name, table = self.tables[n]
            args, _ = self.fetch_args_kwargs_from_env(n)
            rows = n.target(table.record(args[0]).dequantize(), *args[1:])  # type: ignore[operator]
            self.sqnr[name] = numerics.sqnr(rows, expected)
        return expected


def _decide_and_measure(prepared: GraphModule, samples: CalibrationSet, seed: int) -> dict[str, float]:
    """Freeze every record, and measure each layer on a few samples."""
    nodes = graph.layer_nodes(prepared)
    for name, (weight, activation) in observers(prepared).items():
        weight.restore(weight.record(float_weight(prepared, nodes[name])), weight.bias)
        if activation is not None:
            activation.restore(activation.record())
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:MEASURED_ROWS]
    with torch.no_grad():
        return _Measure(prepared).measure(GraphSamples.of(prepared, samples).batch(rows).arguments)


def _votes(prepared: GraphModule) -> dict[str, VoteReport]:
    inputs = {name: activation for name, (_, activation) in observers(prepared).items() if activation is not None}
    return {name: one.election.report() for name, one in inputs.items() if one.election is not None}


def _digest(prepared: GraphModule, samples: CalibrationSet, batch_size: int, seed: int, bits: BitPlan | None) -> str:
    plan: dict[str, LayerPlan] = prepared.meta[PLAN]
    recipe: Recipe = prepared.meta[RECIPE]
    layers = (recipe.scaling, recipe.rounding, recipe.bias_correction)
    stages = (*layers, recipe.blocks, recipe.protection, recipe.allocation, recipe.distillation)
    learning = [*map(str, stages), None if bits is None else bits.to_dict()]
    text = json.dumps([samples.digest(), batch_size, [str(item) for item in plan.values()], learning, seed])
    digest = hashlib.sha256(text.encode())
    for _, parameter in sorted(prepared.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
