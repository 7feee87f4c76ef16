"""What is decided of a unit's inputs: channel scales, then ranges, then the vote."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from dmq_ao.algorithms.layer_rows import Draw, LayerRows
from dmq_ao.algorithms.scaling import ScaledInput, learn_scales
from dmq_ao.algorithms.stream import NodeValue, Stream
from dmq_ao.algorithms.units import Unit
from dmq_ao.config import ChannelScaling
from dmq_ao.graph.roles import whole_name
from dmq_ao.observers import ActivationObserver, VoteReport
from dmq_ao.quantizer.prepared import observers, state_of


class InputLearning:
    """Decides the inputs of one unit after another.

    Attributes:
        votes: per input that voted, by the first layer that reads it.
        scale_gain: per layer, held-out error with learned channel scales over that without, and the steps taken.
    """

    def __init__(
        self, prepared: GraphModule, scaling: ChannelScaling | None, stream: Stream, rows: LayerRows, count: int
    ) -> None:
        """Of one run.

        Args:
            prepared: the graph; its observers of inputs are decided in place.
            scaling: how channel scales are learned; None for none.
            stream: holds the teacher's and the student's values.
            rows: what layers are shown of them.
            count: steps of the sampler.
        """
        self.prepared, self.scaling, self.stream, self.rows, self.count = prepared, scaling, stream, rows, count
        self.watchers = observers(prepared)
        self.votes: dict[str, VoteReport] = {}
        self.scale_gain: dict[str, tuple[float, int]] = {}

    def decide(self, unit: Unit) -> None:
        """Decide every input of a unit."""
        inputs = self._inputs(unit)
        if self.scaling is not None and inputs:
            self._learn_scales(unit, inputs, self.scaling)
        for first, watcher in inputs.items():
            values = self.stream.student_values[self.rows.source(first)]
            watcher.start_ranges()
            self._show(watcher, values)
            watcher.start_votes()
            if watcher.vote is not None:
                self._show(watcher, values)
            watcher.decide()
            if watcher.election is not None:
                self.votes[first] = watcher.election.report()

    def _inputs(self, unit: Unit) -> dict[str, ActivationObserver]:
        """The observers of the unit's inputs, each by the first layer that reads it."""
        inputs: dict[int, tuple[str, ActivationObserver]] = {}
        for name in unit.layers:
            watcher = self.watchers[name][1]
            if watcher is not None:
                inputs.setdefault(id(watcher), (name, watcher))
        return dict(inputs.values())

    def _show(self, watcher: ActivationObserver, values: NodeValue) -> None:
        for index, x in enumerate(values):
            watcher(x, self.rows.timestep(index))

    def _learn_scales(self, unit: Unit, inputs: dict[str, ActivationObserver], config: ChannelScaling) -> None:
        state = state_of(self.prepared)
        learning = [watcher for first, watcher in inputs.items() if first in state.scaled]
        for watcher in inputs.values():
            watcher.channel_scale = None
        if not learning or any(self.rows.layout(name) is None for name in unit.layers):
            return
        scaled = [self._scaled_input(unit, watcher, config) for watcher in learning]
        with torch.enable_grad():
            outcome = learn_scales(scaled, config, self.count, self.rows.generator(unit.index, Draw.SCALES))
        for watcher, scale in zip(learning, outcome.scales, strict=True):
            watcher.channel_scale = None if scale is None else scale.cpu()  # where the ranges are
        for name in unit.layers:
            self.scale_gain[name] = (outcome.after / outcome.before, outcome.steps)

    def _scaled_input(self, unit: Unit, watcher: ActivationObserver, config: ChannelScaling) -> ScaledInput:
        """An input that learns scales, with rows of it for every layer of the unit that reads it."""
        targets = list(dict.fromkeys(whole_name(name) for name in unit.layers))
        members = [name for name in unit.layers if self.watchers[name][1] is watcher]
        values = self.stream.teacher_values[self.rows.source(members[0])]
        low, high = self.rows.channel_ranges(members[0], values)
        samples = [self.rows.teacher(name, values, config.positions) for name in members]
        layers = [
            (targets.index(whole_name(name)), self.rows.weights[name].float(), self.watchers[name][0].config, one)
            for name, one in zip(members, samples, strict=True)
        ]
        return ScaledInput(low, high, watcher.config, layers)
