"""Rows of a layer's input, drawn from the values that a stream holds where it stands.

What a layer reads need not have one row for each sample: ``row_layout`` says whose they are, and here they come sorted
by sample. Where nobody can say, all rows count alike, and what is learned by sample is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.algorithms.moments import Moments, outputs, rows
from dmq_ao.algorithms.row_layout import Layout, Mixed, RowLayout, SharedValue
from dmq_ao.algorithms.sampled_rows import SampledRows, product
from dmq_ao.algorithms.stream import NodeValue, Stream
from dmq_ao.config import Rounding, Weighting
from dmq_ao.graph.geometry import Geometry, geometry
from dmq_ao.objectives import StepWeighting
from dmq_ao.quantizer.prepared import float_bias, float_weight, observers
from dmq_ao.records import WeightRecord
from dmq_ao.samples.graph_samples import Batch

HELD_ROWS = 2048
POOL_BYTES = 128 << 20


class Draw(IntEnum):
    """What is drawn for a layer or unit, each by a generator of its own; the numbers are part of what a seed gives."""

    SCALES = 1
    TEACHER = 2
    ROUNDING = 3
    STUDENT = 4
    MOMENTS = 5
    SAMPLE_WEIGHTS = 6
    BLOCK = 7


@dataclass(frozen=True, eq=False)
class _Look:
    """How a layer is looked at: its node and geometry, the output positions ``keep`` (None for all), the rounding."""

    name: str
    node: Node
    shape: Geometry
    keep: Tensor | None
    rounding: Rounding


class LayerRows:
    """What a layer is shown of all samples: some output positions of each."""

    def __init__(
        self,
        prepared: GraphModule,
        nodes: dict[str, Node],
        batches: Sequence[Batch],
        stream: Stream,
        layouts: Mapping[Node, RowLayout],
        steps: Tensor,
        count: int,
        holdout: Tensor,
        seed: int,
    ) -> None:
        """Of one run.

        Args:
            prepared: the graph.
            nodes: its quantized layers, by name.
            batches: of samples.
            stream: holds the teacher's and the student's values.
            layouts: of the graph's values.
            steps: [N] place of each sample on the sampler's list of steps.
            count: length of that list.
            holdout: [N] bool, samples that nothing is fitted to.
            seed: of the positions.
        """
        self.prepared, self.batches, self._stream, self.layouts = prepared, batches, stream, layouts
        self.steps, self.count, self.holdout, self.seed = steps, count, holdout, seed
        self._watchers = observers(prepared)
        self._nodes = nodes
        self.weights = {name: float_weight(prepared, node) for name, node in nodes.items()}
        self.places = {name: place for place, name in enumerate(nodes)}

    def timestep(self, index: int) -> Tensor | None:
        """Timesteps [b] of a batch; None for a denoiser without."""
        return self.batches[index].timestep

    def source(self, name: str) -> Node:
        """The node whose value a layer quantizes: its observer, or what that reads when it has not run yet."""
        source = self._nodes[name].args[0]
        assert isinstance(source, Node)
        if source not in self._stream.teacher_values:
            source = source.args[0]
        assert isinstance(source, Node)
        return source

    def generator(self, index: int, purpose: Draw) -> torch.Generator:
        """Of what is drawn for one unit or layer, whatever was drawn before."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 17 + purpose)

    def layout(self, name: str) -> Layout | SharedValue | None:
        """Of a layer's input and output; None where samples meet in their rows, or are the channels' axis."""
        node = self._nodes[name]
        ours, output = self.layouts[node.args[0]], self.layouts[node]  # type: ignore[index]
        if isinstance(ours, SharedValue):
            return ours
        if not isinstance(ours, Layout) or ours != output:
            return None
        beside_channels = ours.axis < node.meta["val"].dim() - 1 if node.target == graph.LINEAR else ours.axis == 0
        return ours if beside_channels else None

    def by_sample(self, name: str, x: Tensor, index: int) -> Tensor:
        """A batch's input or output of a layer [b, rows of a sample, ...]; [rows, 1, ...] where they are nobody's."""
        layout = self.layout(name)
        return x.unsqueeze(1) if layout is None else layout.by_sample(x, len(self.batches[index]))

    def pick(self, node: Node, value: NodeValue, samples: Tensor) -> Any:
        """Of a node's value that of ``samples`` [M], ascending numbers; whole numbers that grow with them too."""
        parts, start = [], 0
        for index, batch in enumerate(self.batches):
            places = samples[(samples >= start) & (samples < start + len(batch))] - start
            start += len(batch)
            if len(places):
                parts.append((value[index], places, len(batch)))
        layout = self.layouts[node]
        assert not isinstance(layout, Mixed)
        return layout.pick(parts)

    def channel_ranges(self, name: str, value: NodeValue) -> tuple[Tensor, Tensor]:
        """Smallest and largest value [N, C] of each channel of a layer's input in each sample."""
        axis = -1 if self._nodes[name].target == graph.LINEAR else 2
        parts = [self.by_sample(name, x.float(), index).movedim(axis, 1).flatten(2) for index, x in enumerate(value)]
        return torch.cat([x.amin(2) for x in parts]), torch.cat([x.amax(2) for x in parts])

    def teacher(self, name: str, value: NodeValue, positions: int) -> SampledRows:
        """Some positions of the float inputs ``value``, and the float layer's products of them."""
        node, weight = self._nodes[name], self.weights[name].float()
        shape = geometry(node, weight)
        keep = self._positions(name, shape, positions, Draw.TEACHER)
        x = torch.cat([self._inputs(name, x.float(), index, shape, keep) for index, x in enumerate(value)])
        return SampledRows(x, product(x, weight), self.steps, self.holdout)

    def student(self, name: str, node: Node, shape: Geometry, rounding: Rounding) -> SampledRows:
        """Some positions of the inputs as ``rounding`` wants to see them, and the float network's output there."""
        numbers = self.weights[name][0].numel() * shape.groups * len(self.steps)
        positions = max(1, min(rounding.positions, POOL_BYTES // (4 * numbers)))
        look = _Look(name, node, shape, self._positions(name, shape, positions, Draw.STUDENT), rounding)
        xs, ys = zip(*(self._pair(look, index) for index in range(len(self.batches))), strict=True)
        return SampledRows(torch.cat(xs), torch.cat(ys), self.steps, self.holdout)

    def moments(
        self,
        name: str,
        node: Node,
        shape: Geometry,
        weight: Tensor,
        nearest: WeightRecord,
        rounding: Rounding,
        *,
        second: bool,
    ) -> tuple[list[Moments], SampledRows]:
        """Moments of inputs and residuals over the samples to fit, and rows of those held out.

        Args:
            name: of the layer.
            node: of the layer.
            shape: of its product.
            weight: [out, ...] float32, channel scale multiplied in.
            nearest: the codes of rounding to nearest, by whose error steps are weighted.
            rounding: which inputs and outputs are looked at, and how many positions.
            second: whether the inputs' second moments are summed as well.

        Returns:
            The moments, one a group, and the rows.

        Raises:
            ValueError: for inputs that are NaN or infinite, naming the layer.
        """
        taps = weight[0].numel()
        fit = ~self.holdout if len(self.holdout) > 1 else torch.ones_like(self.holdout)
        positions = rounding.positions
        if second:  # as many rows as the second moments need to have full rank
            positions = max(positions, math.ceil(4 * taps / max(1, int(fit.sum()))))
        look = _Look(name, node, shape, self._positions(name, shape, positions, Draw.MOMENTS), rounding)
        sample_weights = self._sample_weights(name, node, shape, nearest, rounding)
        moments, holdout = self._summed(look, weight, fit, sample_weights, second=second)
        if second and not all(one.precise(rounding.damping) for one in moments):
            moments, holdout = self._summed(look, weight, fit, sample_weights, second=second, around=moments)
        if not all(bool(torch.isfinite(one.mean_x()).all()) for one in moments):
            raise ValueError(f"{name}: its input holds NaN or infinity; check the samples and the float denoiser")
        return moments, holdout

    def _summed(
        self,
        look: _Look,
        weight: Tensor,
        fit: Tensor,
        sample_weights: Tensor,
        *,
        second: bool,
        around: Sequence[Moments] | None = None,
    ) -> tuple[list[Moments], SampledRows]:
        """Moments of each group, in float64 where they are summed ``around`` means, and the rows held out."""
        groups, has_layout = look.shape.groups, self.layout(look.name) is not None
        out = len(weight) // groups
        moments = [
            Moments(
                weight[0].numel(),
                out,
                torch.float32 if around is None else torch.float64,
                weight.device,
                second=second,
                mixed=second and look.rounding.compensate,
                around=None if around is None else around[group],
            )
            for group in range(groups)
        ]
        xs, ys, start = [], [], 0
        for index, batch in enumerate(self.batches):
            where = slice(start, start := start + len(batch))
            x, y = self._pair(look, index)
            # Rows that are nobody's are all fitted to, and all looked at.
            everything = torch.ones(len(x), dtype=torch.bool)
            mask, holdout = (fit[where], self.holdout[where]) if has_layout else (everything, everything)
            few = max(1, HELD_ROWS // (max(1, int(self.holdout.sum())) if has_layout else len(x) * len(self.batches)))
            counts = sample_weights[where] if has_layout else everything.float()
            xs.append(x[holdout, :few])
            ys.append(y[holdout, :few])
            lost = y[mask] - product(x[mask], weight)
            repeated = counts[mask].repeat_interleave(x.shape[1])
            for group, one in enumerate(moments):
                part = lost[..., group * out : (group + 1) * out]
                one.update(x[mask, :, group].flatten(0, 1), part.flatten(0, 1), repeated)
        inputs = torch.cat(xs)
        targets = torch.cat(ys) if look.rounding.compensate else product(inputs, weight)
        steps = self.steps[self.holdout] if has_layout else torch.zeros(len(inputs), dtype=torch.int64)
        return moments, SampledRows(inputs, targets, steps, torch.ones(len(inputs)).bool())

    def _sample_weights(
        self, name: str, node: Node, shape: Geometry, nearest: WeightRecord, rounding: Rounding
    ) -> Tensor:
        """[N] float32: step weights from one look at the error of nearest rounding."""
        if rounding.step_weights.kind is Weighting.UNIFORM or self.layout(name) is None:
            return torch.ones(len(self.steps))
        look = _Look(name, node, shape, self._positions(name, shape, 32, Draw.SAMPLE_WEIGHTS), rounding)
        values, errors = nearest.dequantize(), []
        for index in range(len(self.batches)):
            x, y = self._pair(look, index)
            errors.append((product(x, values) - y).square().sum(-1).mean(-1))
        weighting = StepWeighting(rounding.step_weights, self.count)
        weights = weighting(torch.cat(errors), self.steps)
        return weights / weights.mean().clamp_min(1e-20)

    def _pair(self, look: _Look, index: int) -> tuple[Tensor, Tensor]:
        """A batch's inputs [b, positions, groups, K / groups] and the float network's outputs [b, positions, out].

        The outputs are without bias.
        """
        x = self._inputs(look.name, self._layer_input(look.name, look.rounding, index), index, look.shape, look.keep)
        y = self.by_sample(look.name, self._stream.teacher_values[look.node][index].float(), index)
        y = outputs(y.flatten(0, 1), look.shape, look.keep).reshape(len(y), -1, len(self.weights[look.name]))
        bias = float_bias(self.prepared, look.node)
        return x, y if bias is None else y - bias.float()

    def _inputs(self, name: str, x: Tensor, index: int, shape: Geometry, keep: Tensor | None) -> Tensor:
        """A batch's inputs [b, positions, groups, K / groups]."""
        x = self.by_sample(name, x, index)
        flat = rows(x.flatten(0, 1), shape, keep)
        return flat.reshape(len(x), -1, *flat.shape[1:])

    def _layer_input(self, name: str, rounding: Rounding, index: int) -> Tensor:
        """What a layer multiplies on a batch: its input, of the student or of the teacher, quantized or not."""
        activation = self._watchers[name][1]
        values = self._stream.student_values if rounding.propagate_error else self._stream.teacher_values
        x: Tensor = values[self.source(name)][index]
        if activation is None:
            return x.float()
        if not rounding.quantize_inputs:
            return activation.scaled(x).float()
        return activation.simulate(x, self.timestep(index)).float()

    def _positions(self, name: str, shape: Geometry, limit: int, purpose: Draw) -> Tensor | None:
        """Positions of the output to look at in each row, in order; None for all."""
        x = self.by_sample(name, self._stream.teacher_values[self.source(name)][0], 0)
        count, limit = _position_count(x[0], shape), max(1, limit // x.shape[1])
        if count <= limit:
            return None
        generator = self.generator(self.places[name], purpose)
        return torch.randperm(count, generator=generator)[:limit].sort().values


def _position_count(x: Tensor, shape: Geometry) -> int:
    """Output positions of one row of an input [rows, ...]."""
    if not shape.kernel:
        return x[0].numel() // x.shape[-1]
    sizes = zip(x.shape[2:], shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    return math.prod((n + 2 * pad - gap * (k - 1) - 1) // stride + 1 for n, k, stride, pad, gap in sizes)
