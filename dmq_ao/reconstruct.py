"""Calibrate layer by layer: each unit sees its inputs from the network as quantized so far, and learns from them.

The network is never run again from the start: a ``Stream`` holds the values of all samples at the node where it
stands. A unit is a set of layers that share an input, or the parts of one split layer. What a unit decided is written
to ``state_dir`` at once; a later call takes it from there, and goes on to the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from tqdm.auto import tqdm

from dmq_ao import graph, serialization
from dmq_ao.annotate import PLAN, SCALED, float_bias, float_weight, observers
from dmq_ao.config import Recipe, Rounding, RoundingMethod, Weighting
from dmq_ao.layer import LayerRecord, WeightRecord
from dmq_ao.learn import (
    Rows,
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
from dmq_ao.moments import Geometry, Moments, geometry, outputs, rows
from dmq_ao.objectives import StepWeighting
from dmq_ao.observers import ActivationObserver, VoteReport, quantize_weight
from dmq_ao.observers.channel_scale import spread
from dmq_ao.state import load_state, save_state
from dmq_ao.stream import Stream, Value

HELD_ROWS = 2048
POOL_BYTES = 128 << 20


@dataclass(frozen=True)
class LayerLearning:
    """What one layer learned.

    Attributes:
        scale_gain: held-out error with learned channel scales over that without, 1 where they were not kept; None
            where none were asked for.
        scale_steps: gradient steps taken for them.
        nearest_error: held-out error of nearest rounding, relative to the output.
        rounded_error: of the codes that were kept.
    """

    scale_gain: float | None
    scale_steps: int
    nearest_error: float
    rounded_error: float


@dataclass(frozen=True)
class Unit:
    """Layers that are decided together: names in graph order, and their observers of inputs."""

    index: int
    layers: tuple[str, ...]


def whole_name(name: str) -> str:
    """Name of the layer that a part of a split layer belongs to; any other layer's own."""
    return name.rpartition(".part")[0] if ".part" in name else name


def units_of(prepared: GraphModule) -> list[Unit]:
    """Quantized layers by shared input observer and, where no layer elsewhere shares it, by whole layer; in order.

    A part of a split layer may read the tensor that a layer far above reads: that unit is decided there, where the
    other part has no input yet.
    """
    groups: dict[int | str, list[str]] = {}
    for name, (_, activation) in observers(prepared).items():
        groups.setdefault(name if activation is None else id(activation), []).append(name)
    merged: dict[str, list[str]] = {}
    for names in groups.values():
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
        batches: list[list[Tensor]],
        steps: Tensor,
        count: int,
        *,
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
            batches: the graph's arguments, a list a batch.
            steps: [N] place of each sample on the sampler's list of steps.
            count: length of that list.
            seed: of all that is drawn.
            max_memory: bytes of values to hold.
            state_dir: where units and spilled values go.
            digest: of everything the result depends on.
            bar: one tick a unit.
        """
        self.prepared, self.recipe, self.batches, self.steps = prepared, recipe, batches, steps
        self.seed, self.bar = seed, bar
        self.folder = None if state_dir is None else state_dir / "units"
        self.digest = digest
        self.watchers = observers(prepared)
        self.nodes = {name: node for name, node in graph.layer_nodes(prepared).items() if name in self.watchers}
        self.names = {node: name for name, node in self.nodes.items()}
        self.places = {name: place for place, name in enumerate(self.nodes)}
        self.units = units_of(prepared)
        self.unit_of = {name: unit for unit in self.units for name in unit.layers}
        self.weights = {name: float_weight(prepared, node) for name, node in self.nodes.items()}
        self.count = count
        self.held = held_out(len(steps), torch.Generator().manual_seed(seed))
        self.learned: dict[str, LayerLearning] = {}
        self.votes: dict[str, VoteReport] = {}
        self.restored: set[int] = set()
        self.scale_gain: dict[str, tuple[float | None, int]] = {}
        signature = graph.signature_of(prepared)
        self.time_index = None if signature.timestep is None else signature.names.index(signature.timestep)
        self.stream = Stream(
            prepared, batches, self._student, set(self.names), max_memory=max_memory, folder=state_dir
        )

    def run(self) -> None:
        """Decide every unit."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.stream.run(self._before, self._after)

    def _timestep(self, index: int) -> Tensor | None:
        return None if self.time_index is None else self.batches[index][self.time_index]

    def _student(self, node: Node, args: list[Any], index: int) -> Any:
        """A quantized layer's output on a batch."""
        weight, activation = self.watchers[self.names[node]]
        assert weight.decided is not None
        x = args[0] if activation is None else activation.simulate(args[0], self._timestep(index))
        values = weight.decided.dequantize().to(args[1])
        bias = float_bias(self.prepared, node) if weight.bias is None else weight.bias.to(values)
        return node.target(x, values, bias, *args[3:])  # type: ignore[operator]

    def _before(self, node: Node) -> None:
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
        unit = self.unit_of[self.names[node]]
        if self.names[node] != unit.layers[-1]:
            return
        if unit.index not in self.restored:
            self._save(unit)
        worst = max(self.learned[name].rounded_error for name in unit.layers)
        self.bar.set_postfix(layer=unit.layers[0], error=f"{worst:.2e}")
        self.bar.update(1)

    # ---- inputs: channel scale, range, vote

    def _source(self, name: str) -> Node:
        """The node whose value a layer quantizes: its observer, or what that reads when it has not run yet."""
        source = self.nodes[name].args[0]
        assert isinstance(source, Node)
        if source not in self.stream.teacher_values:
            source = source.args[0]
        assert isinstance(source, Node)
        return source

    def _decide_inputs(self, unit: Unit) -> None:
        inputs = self._inputs(unit)
        if self.recipe.scaling is not None and inputs:
            self._learn_scales(unit, inputs)
        for first, watcher in inputs.items():
            seen = self.stream.student_values[self._source(first)]
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

    def _show(self, watcher: ActivationObserver, seen: Value) -> None:
        for index, x in enumerate(seen):
            watcher(x, self._timestep(index))

    def _learn_scales(self, unit: Unit, inputs: dict[str, ActivationObserver]) -> None:
        config = self.recipe.scaling
        assert config is not None
        plan = self.prepared.meta[PLAN]
        scaled = self.prepared.meta[SCALED]
        learning = {first: watcher for first, watcher in inputs.items() if first in scaled}
        for watcher in inputs.values():
            watcher.channel_scale = None
        if not learning:
            return
        wholes = {name: whole_name(name) for name in unit.layers}
        targets = list(dict.fromkeys(wholes.values()))
        given = []
        for _, watcher in learning.items():
            members = [name for name in unit.layers if self.watchers[name][1] is watcher]
            seen = self.stream.teacher_values[self._source(members[0])]
            low, high = _channel_ranges(seen, watcher.ch_axis)
            sampled = [self._teacher_rows(name, seen, config.positions) for name in members]
            given.append(
                ScaledInput(
                    low,
                    high,
                    watcher.config,
                    [
                        (targets.index(wholes[name]), self.weights[name].float(), plan[name].weight, one)
                        for name, one in zip(members, sampled, strict=True)
                    ],
                )
            )
        with torch.enable_grad():
            outcome = learn_scales(given, config, self.count, self._generator(unit.index, 1))
        for watcher, scale in zip(learning.values(), outcome.scales, strict=True):
            watcher.channel_scale = scale
        for name in unit.layers:
            self.scale_gain[name] = (outcome.after / outcome.before, outcome.steps)

    def _generator(self, index: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 17 + purpose)

    def _teacher_rows(self, name: str, seen: Value, positions: int) -> Rows:
        node, weight = self.nodes[name], self.weights[name].float()
        shape = geometry(node, weight)
        keep = self._positions(name, seen[0], shape, positions, 2)
        x = torch.cat([_by_sample(rows(x.float(), shape, keep), len(x)) for x in seen])
        return Rows(x, product(x, weight), self.steps, self.held)

    def _positions(self, name: str, x: Tensor, shape: Geometry, wanted: int, purpose: int) -> Tensor | None:
        """Positions of the output to look at, in order; None for all."""
        count = _position_count(x, shape)
        if count <= wanted:
            return None
        generator = self._generator(self.places[name], purpose)
        return torch.randperm(count, generator=generator)[:wanted].sort().values

    # ---- weight: codes and bias

    def _decide_weight(self, name: str, node: Node) -> None:
        observer, activation = self.watchers[name]
        weight = self.weights[name].float()
        shape = geometry(node, weight)
        scale = None if activation is None else activation.record().channel_scale
        if scale is not None:
            factors = spread(scale, len(weight), weight[0, 0].numel(), shape.groups)
            weight = weight * factors.reshape(weight.shape)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: its weight holds NaN or infinity; check the float checkpoint")
        try:
            nearest = quantize_weight(weight, observer.config, observer.estimator)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        rounding = self.recipe.rounding
        chosen = rounding or Rounding()
        moments, held = self._moments(name, node, shape, weight, nearest, chosen)
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
        self.learned[name] = LayerLearning(gain, taken, before, left)

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
            return round_by_feedback(weight, observer.config, observer.estimator, moments, rounding)
        data = self._student_rows(name, node, shape, rounding)
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
                self._generator(self.places[name], 3),
            )

    def _seen(self, name: str, rounding: Rounding, index: int) -> Tensor:
        """What a layer multiplies on a batch: its input, of the student or of the teacher, quantized or not."""
        activation = self.watchers[name][1]
        values = self.stream.student_values if rounding.propagate_error else self.stream.teacher_values
        x: Tensor = values[self._source(name)][index]
        if activation is None:
            return x.float()
        if not rounding.quantize_inputs:
            return activation.scaled(x).float()
        return activation.simulate(x, self._timestep(index)).float()

    def _student_rows(self, name: str, node: Node, shape: Geometry, rounding: Rounding) -> Rows:
        first = self._seen(name, rounding, 0)
        numbers = self.weights[name][0].numel() * shape.groups * len(self.steps)
        wanted = max(1, min(rounding.positions, POOL_BYTES // (4 * numbers)))
        keep = self._positions(name, first, shape, wanted, 4)
        bias = float_bias(self.prepared, node)
        xs, ys = [], []
        for index, y in enumerate(self.stream.teacher_values[node]):
            x = self._seen(name, rounding, index)
            xs.append(_by_sample(rows(x, shape, keep), len(x)))
            ys.append(outputs(y.float(), shape, keep).reshape(len(y), -1, len(self.weights[name])))
        target = torch.cat(ys)
        return Rows(torch.cat(xs), target if bias is None else target - bias.float(), self.steps, self.held)

    def _moments(
        self,
        name: str,
        node: Node,
        shape: Geometry,
        weight: Tensor,
        nearest: WeightRecord,
        rounding: Rounding,
    ) -> tuple[list[Moments], Rows]:
        """Moments of the inputs and residuals over the samples to fit, and rows of those held out."""
        bias = float_bias(self.prepared, node)
        first = self._seen(name, rounding, 0)
        fit = ~self.held if len(self.held) > 1 else torch.ones_like(self.held)
        taps, out = weight[0].numel(), len(weight)
        wanted = rounding.positions
        feedback = self.recipe.rounding is not None and rounding.method is RoundingMethod.FEEDBACK
        if feedback:  # as many rows as the second moments need to have full rank
            wanted = max(wanted, math.ceil(4 * taps / max(1, int(fit.sum()))))
        keep = self._positions(name, first, shape, wanted, 5)
        sample_weights = self._sample_weights(name, node, shape, nearest, rounding)
        moments = [
            Moments(
                taps,
                out // shape.groups,
                device=weight.device,
                second=feedback,
                mixed=feedback and rounding.compensate,
            )
            for _ in range(shape.groups)
        ]
        few = max(1, HELD_ROWS // max(1, int(self.held.sum())))
        xs, ys, start = [], [], 0
        for index, wholly in enumerate(self.stream.teacher_values[node]):
            x = _by_sample(rows(self._seen(name, rounding, index), shape, keep), len(wholly))
            y = outputs(wholly.float(), shape, keep).reshape(len(wholly), -1, out)
            y = y if bias is None else y - bias.float()
            where = slice(start, start := start + len(wholly))
            mask, held = fit[where], self.held[where]
            xs.append(x[held, :few])
            ys.append(y[held, :few])
            lost = y[mask] - product(x[mask], weight)
            repeated = sample_weights[where][mask].repeat_interleave(x.shape[1])
            for group, one in enumerate(moments):
                part = slice(group * (out // shape.groups), (group + 1) * (out // shape.groups))
                one.update(x[mask, :, group].flatten(0, 1), lost[..., part].flatten(0, 1), repeated)
        inputs, wanted_y = torch.cat(xs), torch.cat(ys)
        if not rounding.compensate:
            wanted_y = product(inputs, weight)
        return moments, Rows(inputs, wanted_y, self.steps[self.held], torch.ones(len(inputs)).bool())

    def _sample_weights(
        self, name: str, node: Node, shape: Geometry, nearest: WeightRecord, rounding: Rounding
    ) -> Tensor:
        """[N] float32: step weights from one look at the error of nearest rounding."""
        if rounding.step_weights.kind is Weighting.UNIFORM:
            return torch.ones(len(self.steps))
        keep = self._positions(name, self._seen(name, rounding, 0), shape, 32, 6)
        bias, values, errors = float_bias(self.prepared, node), nearest.dequantize(), []
        for index, wholly in enumerate(self.stream.teacher_values[node]):
            x = _by_sample(rows(self._seen(name, rounding, index), shape, keep), len(wholly))
            y = outputs(wholly.float(), shape, keep).reshape(len(wholly), -1, len(values))
            y = y if bias is None else y - bias.float()
            errors.append((product(x, values) - y).square().sum(-1).mean(-1))
        weighting = StepWeighting(rounding.step_weights, self.count)
        weights = weighting(torch.cat(errors), self.steps)
        return weights / weights.mean().clamp_min(1e-20)

    # ---- state

    def _file(self, unit: Unit) -> Path | None:
        return None if self.folder is None else self.folder / f"{unit.index:04d}.safetensors"

    def _save(self, unit: Unit) -> None:
        file = self._file(unit)
        if file is None:
            return
        records = {name: self._record(name) for name in unit.layers}
        meta = {
            "layers": serialization.layer_configs(records),
            "learned": {name: asdict(self.learned[name]) for name in unit.layers},
            "votes": {name: vote.to_dict() for name, vote in self.votes.items() if name in unit.layers},
        }
        save_state(file, self.digest, meta, serialization.layer_tensors(records))

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
        for name, record in serialization.layer_records(meta["layers"], tensors).items():
            weight, activation = self.watchers[name]
            weight.restore(record.weight, record.bias)
            if activation is not None and record.activation is not None:
                activation.channel_scale = record.activation.channel_scale
                activation.restore(record.activation)
            self.learned[name] = LayerLearning(**meta["learned"][name])
        self.votes |= {name: VoteReport.from_dict(vote) for name, vote in meta["votes"].items()}
        return True


def _channel_ranges(seen: Value, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value [N, C] of each channel in each sample."""
    ends = [x.float().movedim(ch_axis, 1).flatten(2) if x.dim() > 2 else x.float().unsqueeze(-1) for x in seen]
    return torch.cat([x.amin(2) for x in ends]), torch.cat([x.amax(2) for x in ends])


def _by_sample(flat: Tensor, count: int) -> Tensor:
    return flat.reshape(count, -1, *flat.shape[1:])


def _position_count(x: Tensor, shape: Geometry) -> int:
    if not shape.kernel:
        return x[0].numel() // x.shape[-1]
    sizes = zip(x.shape[2:], shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    return math.prod((n + 2 * pad - gap * (k - 1) - 1) // stride + 1 for n, k, stride, pad, gap in sizes)
