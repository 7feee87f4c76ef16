"""Rows of a layer's input, drawn from the values that a stream holds where it stands."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.algorithms.moments import Moments, outputs, rows
from dmq_ao.algorithms.rounding import Rows, product
from dmq_ao.algorithms.stream import Stream, Value
from dmq_ao.config import Rounding, Weighting
from dmq_ao.graph.geometry import Geometry, geometry
from dmq_ao.objectives import StepWeighting
from dmq_ao.quantizer.prepared import float_bias, float_weight, observers
from dmq_ao.records import WeightRecord

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


class LayerRows:
    """What a layer is shown of all samples: some output positions of each."""

    def __init__(
        self,
        prepared: GraphModule,
        nodes: dict[str, Node],
        batches: list[list[Tensor]],
        stream: Stream,
        steps: Tensor,
        count: int,
        held: Tensor,
        seed: int,
    ) -> None:
        """Of one run.

        Args:
            prepared: the graph.
            nodes: its quantized layers, by name.
            batches: its arguments, a list a batch.
            stream: holds the teacher's and the student's values.
            steps: [N] place of each sample on the sampler's list of steps.
            count: length of that list.
            held: [N] bool, samples that nothing is fitted to.
            seed: of the positions.
        """
        self.prepared, self.batches, self._stream = prepared, batches, stream
        self.steps, self.count, self.held, self.seed = steps, count, held, seed
        self._watchers = observers(prepared)
        self._nodes = nodes
        self.weights = {name: float_weight(prepared, node) for name, node in nodes.items()}
        self.places = {name: place for place, name in enumerate(nodes)}
        signature = graph.signature_of(prepared)
        batch = signature.names.index(signature.batch)
        self.sizes = [len(arguments[batch]) for arguments in batches]
        self.time_index = None if signature.timestep is None else signature.names.index(signature.timestep)

    def timestep(self, index: int) -> Tensor | None:
        """Timesteps of a batch; None for a denoiser without."""
        return None if self.time_index is None else self.batches[index][self.time_index]

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

    def teacher(self, name: str, seen: Value, positions: int) -> Rows:
        """Some positions of the float inputs ``seen``, and the float layer's products of them."""
        node, weight = self._nodes[name], self.weights[name].float()
        shape = geometry(node, weight)
        keep = self._positions(name, shape, positions, Draw.TEACHER)
        x = torch.cat([_by_sample(rows(x.float(), shape, keep), len(x)) for x in seen])
        return Rows(x, product(x, weight), self.steps, self.held)

    def student(self, name: str, node: Node, shape: Geometry, rounding: Rounding) -> Rows:
        """Some positions of the inputs as ``rounding`` wants to see them, and the float network's output there."""
        numbers = self.weights[name][0].numel() * shape.groups * len(self.steps)
        wanted = max(1, min(rounding.positions, POOL_BYTES // (4 * numbers)))
        keep = self._positions(name, shape, wanted, Draw.STUDENT)
        bias = float_bias(self.prepared, node)
        xs, ys = [], []
        for index, y in enumerate(self._stream.teacher_values[node]):
            x = self._seen(name, rounding, index)
            xs.append(_by_sample(rows(x, shape, keep), len(x)))
            ys.append(outputs(y.float(), shape, keep).reshape(len(y), -1, len(self.weights[name])))
        target = torch.cat(ys)
        return Rows(torch.cat(xs), target if bias is None else target - bias.float(), self.steps, self.held)

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
    ) -> tuple[list[Moments], Rows]:
        """Moments of inputs and residuals over the samples to fit, and rows of those held out."""
        bias = float_bias(self.prepared, node)
        fit = ~self.held if len(self.held) > 1 else torch.ones_like(self.held)
        taps, out = weight[0].numel(), len(weight)
        wanted = rounding.positions
        if second:  # as many rows as the second moments need to have full rank
            wanted = max(wanted, math.ceil(4 * taps / max(1, int(fit.sum()))))
        keep = self._positions(name, shape, wanted, Draw.MOMENTS)
        sample_weights = self._sample_weights(name, node, shape, nearest, rounding)
        moments = [
            Moments(
                taps,
                out // shape.groups,
                device=weight.device,
                second=second,
                mixed=second and rounding.compensate,
            )
            for _ in range(shape.groups)
        ]
        few = max(1, HELD_ROWS // max(1, int(self.held.sum())))
        xs, ys, start = [], [], 0
        for index, wholly in enumerate(self._stream.teacher_values[node]):
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
        keep = self._positions(name, shape, 32, Draw.SAMPLE_WEIGHTS)
        bias, values, errors = float_bias(self.prepared, node), nearest.dequantize(), []
        for index, wholly in enumerate(self._stream.teacher_values[node]):
            x = _by_sample(rows(self._seen(name, rounding, index), shape, keep), len(wholly))
            y = outputs(wholly.float(), shape, keep).reshape(len(wholly), -1, len(values))
            y = y if bias is None else y - bias.float()
            errors.append((product(x, values) - y).square().sum(-1).mean(-1))
        weighting = StepWeighting(rounding.step_weights, self.count)
        weights = weighting(torch.cat(errors), self.steps)
        return weights / weights.mean().clamp_min(1e-20)

    def _seen(self, name: str, rounding: Rounding, index: int) -> Tensor:
        """What a layer multiplies on a batch: its input, of the student or of the teacher, quantized or not."""
        activation = self._watchers[name][1]
        values = self._stream.student_values if rounding.propagate_error else self._stream.teacher_values
        x: Tensor = values[self.source(name)][index]
        if activation is None:
            return x.float()
        if not rounding.quantize_inputs:
            return activation.scaled(x).float()
        return activation.simulate(x, self.timestep(index)).float()

    def _positions(self, name: str, shape: Geometry, wanted: int, purpose: Draw) -> Tensor | None:
        """Positions of the output to look at, in order; None for all."""
        count = _position_count(self._stream.teacher_values[self.source(name)][0], shape)
        if count <= wanted:
            return None
        generator = self.generator(self.places[name], purpose)
        return torch.randperm(count, generator=generator)[:wanted].sort().values


def _by_sample(flat: Tensor, count: int) -> Tensor:
    return flat.reshape(count, -1, *flat.shape[1:])


def _position_count(x: Tensor, shape: Geometry) -> int:
    if not shape.kernel:
        return x[0].numel() // x.shape[-1]
    sizes = zip(x.shape[2:], shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    return math.prod((n + 2 * pad - gap * (k - 1) - 1) // stride + 1 for n, k, stride, pad, gap in sizes)
