"""Calibrate layer by layer: each unit sees its inputs from the network as quantized so far, and learns from them.

The network is never run again from the start: a ``Stream`` holds the values of all samples at the node where it
stands. A unit is a set of layers that share an input, or the parts of one split layer. What a unit decided is written
to ``state_dir`` at once; a later call takes it from there, and goes on to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.algorithms.blocks import Block, find_blocks, run_block
from dmq_ao.algorithms.blockwise import BlockData, BlockLearning, layouts_of, learn_block, scaled_weight
from dmq_ao.algorithms.layer_rows import Draw, LayerRows
from dmq_ao.algorithms.moments import Moments
from dmq_ao.algorithms.rounding import (
    ScaledInput,
    correction,
    held_out,
    held_out_error,
    learn_scales,
    own_correction,
    product,
    round_by_feedback,
    round_by_learning,
)
from dmq_ao.algorithms.row_layout import Layout, RowLayout, Shared, row_layouts
from dmq_ao.algorithms.stream import NodeValue, Stream
from dmq_ao.config import Recipe, Rounding, RoundingMethod
from dmq_ao.graph.geometry import Geometry, geometry
from dmq_ao.graph.roles import whole_name
from dmq_ao.observers import ActivationObserver, VoteReport
from dmq_ao.quantizer.quantizer import PLAN, SCALED, attention_observers, float_bias, observers, readers
from dmq_ao.records import LayerRecord, WeightRecord, moved
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization.checkpoint import load_state, save_state
from dmq_ao.serialization.layers import layer_configs, layer_records, layer_tensors

_UNTOLD = (
    "rounded to nearest, no channel scales: samples meet in the rows of its input, or lie in an order of their own"
)
_BLOCK_UNTOLD = "its block is not reconstructed: samples meet in the rows of what it reads, or in those of its outputs"


@dataclass(frozen=True)
class LayerLearning:
    """What one layer learned.

    Attributes:
        scale_gain: held-out error with learned channel scales over that without, 1 where they were not kept; None
            where none were asked for.
        scale_steps: gradient steps taken for them.
        nearest_error: held-out error of nearest rounding, relative to the output.
        rounded_error: of the codes that were kept.
        note: what was not learned, and why; empty where nothing was left out.
    """

    scale_gain: float | None
    scale_steps: int
    nearest_error: float
    rounded_error: float
    note: str = ""


@dataclass(frozen=True)
class Unit:
    """Layers that are decided together: names in graph order, and their observers of inputs."""

    index: int
    layers: tuple[str, ...]


def units_of(prepared: GraphModule) -> list[Unit]:
    """Quantized layers by shared input observer and, where no layer elsewhere shares it, by whole layer; in order.

    A part of a split layer may read the tensor that a layer far above reads: that unit is decided there, where the
    other part has no input yet.
    """
    merged: dict[str, list[str]] = {}
    for _, names in readers(prepared):
        wholes = {whole_name(name) for name in names}
        key = wholes.pop() if len(wholes) == 1 else "+".join(names)
        merged.setdefault(key, []).extend(names)
    order = list(observers(prepared))
    found = sorted((sorted(names, key=order.index) for names in merged.values()), key=lambda ns: order.index(ns[0]))
    return [Unit(index, tuple(names)) for index, names in enumerate(found)]


class Reconstruction:
    """One run over the graph."""

    def __init__(
        self,
        prepared: GraphModule,
        recipe: Recipe,
        samples: GraphSamples,
        *,
        batch_size: int,
        seed: int,
        max_memory: int,
        state_dir: Path | None,
        digest: str,
        bar: tqdm[Any],
    ) -> None:
        """A run about to start.

        Args:
            prepared: the graph; its observers are decided in place.
            recipe: scaling, rounding and bias correction.
            samples: to learn from.
            batch_size: samples per forward pass.
            seed: of all that is drawn.
            max_memory: bytes of values to hold.
            state_dir: where units and spilled values go.
            digest: of everything the result depends on.
            bar: one tick a unit.
        """
        self.prepared, self.recipe, self.bar = prepared, recipe, bar
        self.folder = None if state_dir is None else state_dir / "units"
        self.digest, self.device = digest, graph.device_of(prepared)
        self.watchers = observers(prepared)
        self.nodes = {name: node for name, node in graph.layer_nodes(prepared).items() if name in self.watchers}
        self.names = {node: name for name, node in self.nodes.items()}
        self.attention = attention_observers(prepared)
        self.units = units_of(prepared)
        self.unit_of = {name: unit for unit in self.units for name in unit.layers}
        self.count, self.layouts = len(samples.timesteps), row_layouts(prepared, samples)
        batches = list(samples.batches(batch_size))
        self.held = held_out(len(samples), torch.Generator().manual_seed(seed))
        self.learned: dict[str, LayerLearning] = {}
        self.blocks: dict[str, BlockLearning] = {}
        self.votes: dict[str, VoteReport] = {}
        self.restored: set[int] = set()
        self.scale_gain: dict[str, tuple[float | None, int]] = {}
        blocks = [] if recipe.blocks is None else find_blocks(prepared, recipe.blocks.left_out)
        self.ends = {block.end: block for block in blocks if block.outputs}
        # A node that several blocks read lives until the last of them: later blocks come later in the dictionary.
        hold = {node: block.end for block in self.ends.values() for node in block.inputs}
        self.stream = Stream(
            prepared,
            batches,
            self._student,
            self.names.keys() | self.attention.keys(),
            max_memory=max_memory,
            folder=state_dir,
            hold=hold,
        )
        self.rows = LayerRows(
            prepared,
            self.nodes,
            batches,
            self.stream,
            self.layouts,
            samples.step,
            self.count,
            self.held,
            seed,
        )

    def run(self) -> None:
        """Decide every unit."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.stream.run(self._before, self._after, self._passed)

    def output_layout(self) -> RowLayout:
        """Whose the rows of the denoiser's first output are."""
        node = next(iter(self.prepared.graph.output_node().all_input_nodes))
        return self.layouts[node]

    def _student(self, node: Node, args: list[Any], index: int) -> Any:
        """A quantized layer's output on a batch, or a factor inside attention."""
        if node in self.attention:
            return self.attention[node].simulate(args[0])
        weight, activation = self.watchers[self.names[node]]
        assert weight.decided is not None
        x = args[0] if activation is None else activation.simulate(args[0], self.rows.timestep(index))
        values = weight.decided.dequantize().to(args[1])
        bias = float_bias(self.prepared, node) if weight.bias is None else weight.bias.to(values)
        return node.target(x, values, bias, *args[3:])  # type: ignore[operator]

    def _before(self, node: Node) -> None:
        if node in self.attention:
            return
        name = self.names[node]
        unit = self.unit_of[name]
        if name == unit.layers[0]:
            if self._restore(unit):
                self.restored.add(unit.index)
            else:
                self._decide_inputs(unit)
        if unit.index not in self.restored:
            self._decide_weight(name, node)

    def _after(self, node: Node) -> None:
        if node in self.attention:
            return
        unit = self.unit_of[self.names[node]]
        if self.names[node] != unit.layers[-1]:
            return
        if unit.index not in self.restored:
            self._save(unit)
        worst = max(self.learned[name].rounded_error for name in unit.layers)
        self.bar.set_postfix(layer=unit.layers[0], error=f"{worst:.2e}")
        self.bar.update(1)

    # ---- inputs: channel scale, range, vote

    def _decide_inputs(self, unit: Unit) -> None:
        inputs = self._inputs(unit)
        if self.recipe.scaling is not None and inputs:
            self._learn_scales(unit, inputs)
        for first, watcher in inputs.items():
            seen = self.stream.student_values[self.rows.source(first)]
            watcher.start_ranges()
            self._show(watcher, seen)
            watcher.start_votes()
            if watcher.vote is not None:
                self._show(watcher, seen)
            watcher.restore(watcher.record())
            if watcher.election is not None:
                self.votes[first] = watcher.election.report()

    def _inputs(self, unit: Unit) -> dict[str, ActivationObserver]:
        """One layer for each observer of the unit's inputs."""
        found: dict[int, tuple[str, ActivationObserver]] = {}
        for name in unit.layers:
            watcher = self.watchers[name][1]
            if watcher is not None:
                found.setdefault(id(watcher), (name, watcher))
        return dict(found.values())

    def _show(self, watcher: ActivationObserver, seen: NodeValue) -> None:
        for index, x in enumerate(seen):
            watcher(x, self.rows.timestep(index))

    def _learn_scales(self, unit: Unit, inputs: dict[str, ActivationObserver]) -> None:
        config = self.recipe.scaling
        assert config is not None
        plan = self.prepared.meta[PLAN]
        scaled = self.prepared.meta[SCALED]
        learning = {first: watcher for first, watcher in inputs.items() if first in scaled}
        if any(self.rows.layout(name) is None for name in unit.layers):
            learning = {}
        for watcher in inputs.values():
            watcher.channel_scale = None
        if not learning:
            return
        wholes = {name: whole_name(name) for name in unit.layers}
        targets = list(dict.fromkeys(wholes.values()))
        given = []
        for _, watcher in learning.items():
            members = [name for name in unit.layers if self.watchers[name][1] is watcher]
            seen = self.stream.teacher_values[self.rows.source(members[0])]
            low, high = self.rows.channel_ranges(members[0], seen)
            sampled = [self.rows.teacher(name, seen, config.positions) for name in members]
            given.append(
                ScaledInput(
                    low,
                    high,
                    watcher.config,
                    [
                        (targets.index(wholes[name]), self.rows.weights[name].float(), plan[name].weight, one)
                        for name, one in zip(members, sampled, strict=True)
                    ],
                )
            )
        with torch.enable_grad():
            outcome = learn_scales(given, config, self.count, self.rows.generator(unit.index, Draw.SCALES))
        for watcher, scale in zip(learning.values(), outcome.scales, strict=True):
            watcher.channel_scale = None if scale is None else scale.cpu()  # where the ranges are
        for name in unit.layers:
            self.scale_gain[name] = (outcome.after / outcome.before, outcome.steps)

    # ---- weight: codes and bias

    def _decide_weight(self, name: str, node: Node) -> None:
        observer, activation = self.watchers[name]
        weight = scaled_weight(self.prepared, node, activation)
        shape = geometry(node, weight)
        nearest = observer.round(weight)
        known = self.rows.layout(name) is not None
        rounding = self.recipe.rounding if known else None
        chosen = self.recipe.rounding or Rounding()
        second = rounding is not None and rounding.method is RoundingMethod.FEEDBACK
        moments, held = self.rows.moments(name, node, shape, weight, nearest, chosen, second=second)
        corrects = self.recipe.bias_correction

        def judge(record: WeightRecord) -> float:
            shift = None
            if corrects:
                shift = (correction if chosen.compensate else own_correction)(weight, record, moments)
            return held_out_error(held, record.dequantize(), shift)

        before = judge(nearest)
        best, left = nearest, before
        if rounding is not None:
            learned = self._round(name, node, shape, weight, moments, rounding)
            after = judge(learned)
            if after < before:
                best, left = learned, after
        bias = None
        if corrects:
            own, shift = float_bias(self.prepared, node), correction(weight, best, moments)
            bias = (shift if own is None else own.float() + shift).contiguous()
        observer.restore(best, bias)
        gain, taken = self.scale_gain.get(name, (None, 0))
        self.learned[name] = LayerLearning(gain, taken, before, left, "" if known else _UNTOLD)

    def _round(
        self,
        name: str,
        node: Node,
        shape: Geometry,
        weight: Tensor,
        moments: Sequence[Moments],
        rounding: Rounding,
    ) -> WeightRecord:
        observer, _ = self.watchers[name]
        if rounding.method is RoundingMethod.FEEDBACK:
            return round_by_feedback(
                weight, observer.config, observer.estimator, moments, rounding, observer.channel_bits
            )
        data = self.rows.student(name, node, shape, rounding)
        with torch.enable_grad():
            if not rounding.compensate:
                data = replace(data, y=product(data.x, weight))
            return round_by_learning(
                weight,
                observer.config,
                observer.estimator,
                data,
                rounding,
                self.count,
                self.rows.generator(self.rows.places[name], Draw.ROUNDING),
            )

    # ---- blocks

    def _passed(self, node: Node) -> None:
        if node not in self.ends:
            return
        block = self.ends[node]
        layouts = layouts_of(block, self.layouts)
        if layouts is not None:
            self._reconstruct(block, layouts)
            return
        for name in block.layers:
            if not self.learned[name].note:
                self.learned[name] = replace(self.learned[name], note=_BLOCK_UNTOLD)

    def _reconstruct(self, block: Block, layouts: Mapping[Node, Layout | Shared]) -> None:
        """Learn a block whose layers are all decided, and bring the student's values up to date."""
        file = None if self.folder is None else self.folder / f"block{block.index:04d}.safetensors"
        saved = load_state(file, self.digest, "a block of a calibration")
        if saved is not None:
            meta, tensors = saved
            self._take(layer_records(meta["layers"], tensors))
            self.blocks[block.name] = learned = BlockLearning(**meta["learned"])
        else:
            learned = self._learn(block, layouts)
            if file is not None:
                records = {name: self._record(name) for name in block.layers}
                meta = {"layers": layer_configs(records), "learned": asdict(learned)}
                save_state(file, self.digest, meta, layer_tensors(records))
        if learned.after < learned.before:
            for node in block.live:
                if self.stream.differs(node):
                    self.stream.replace(node, partial(self._rerun, block, node))

    def _learn(self, block: Block, layouts: Mapping[Node, Layout | Shared]) -> BlockLearning:
        config = self.recipe.blocks
        assert config is not None

        def taken(values: dict[Node, NodeValue]) -> Callable[[Tensor], dict[Node, Any]]:
            return lambda chosen: {node: self.rows.pick(node, values[node], chosen) for node in block.inputs}

        students, teachers = taken(self.stream.student_values), taken(self.stream.teacher_values)
        data = BlockData(students, teachers, layouts, self.rows.steps, self.count, self.held)
        with torch.enable_grad():
            learned, codes, factors = learn_block(
                self.prepared, block, data, config, self.rows.generator(block.index, Draw.BLOCK)
            )
        for name, rounded in codes.items():
            weight, _ = self.watchers[name]
            weight.restore(rounded, weight.bias)
        for name, factor in factors.items():
            activation = self.watchers[name][1]
            assert activation is not None
            record = activation.record()
            activation.restore(replace(record, scale=record.scale * factor.to(record.scale)))
        self.blocks[block.name] = learned
        return learned

    def _rerun(self, block: Block, node: Node, index: int) -> Any:
        """The student's value of a node of a block for a batch."""
        given = {source: self.stream.student_values[source][index] for source in block.inputs}

        def layer(quantized: Node, args: list[Any], given: Mapping[Node, Any]) -> Any:
            return self._student(quantized, args, index)

        return run_block(self.prepared, block, given, layer, [node])[node]

    # ---- state

    def _file(self, unit: Unit) -> Path | None:
        return None if self.folder is None else self.folder / f"{unit.index:04d}.safetensors"

    def _save(self, unit: Unit) -> None:
        file = self._file(unit)
        if file is None:
            return
        records = {name: self._record(name) for name in unit.layers}
        meta = {
            "layers": layer_configs(records),
            "learned": {name: asdict(self.learned[name]) for name in unit.layers},
            "votes": {name: vote.to_dict() for name, vote in self.votes.items() if name in unit.layers},
        }
        save_state(file, self.digest, meta, layer_tensors(records))

    def _record(self, name: str) -> LayerRecord:
        weight, activation = self.watchers[name]
        assert weight.decided is not None
        kind = self.prepared.meta[PLAN][name].kind
        return LayerRecord(
            name, kind, weight.decided, None if activation is None else activation.record(), weight.bias
        )

    def _restore(self, unit: Unit) -> bool:
        """Take a unit's decisions from its file; False when there is none."""
        saved = load_state(self._file(unit), self.digest, "a unit of a calibration")
        if saved is None:
            return False
        meta, tensors = saved
        self._take(layer_records(meta["layers"], tensors))
        self.learned |= {name: LayerLearning(**one) for name, one in meta["learned"].items()}
        self.votes |= {name: VoteReport.from_dict(vote) for name, vote in meta["votes"].items()}
        return True

    def _take(self, records: Mapping[str, LayerRecord]) -> None:
        for name, record in records.items():
            weight, activation = self.watchers[name]
            there = moved(record, self.device)
            weight.restore(there.weight, there.bias)
            if activation is not None and record.activation is not None:
                activation.channel_scale = record.activation.channel_scale
                activation.restore(record.activation)
