"""Calibrate layer by layer: each unit sees its inputs from the network as quantized so far, and learns from them.

The network is never run again from the start: a ``Stream`` holds the values of all samples at the node where it
stands. A unit is a set of layers that share an input, or the parts of one split layer. What a unit decided is written
to the checkpoint at once; a later call takes it from there, and goes on to the same bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.algorithms.block_learner import BlockLearner
from dmq_ao.algorithms.blocks import find_blocks
from dmq_ao.algorithms.holdout import held_out
from dmq_ao.algorithms.inputs import InputLearning
from dmq_ao.algorithms.layer_rows import LayerRows
from dmq_ao.algorithms.row_layout import RowLayout, row_layouts
from dmq_ao.algorithms.stream import Stream
from dmq_ao.algorithms.units import BlockLearning, Decisions, LayerLearning, Unit, units_of
from dmq_ao.algorithms.weights import WeightLearning
from dmq_ao.config import Recipe
from dmq_ao.observers import VoteReport
from dmq_ao.quantizer.prepared import attention_observers, float_bias, observers
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization.checkpoint import Checkpoint

_UNTOLD = (
    "rounded to nearest, no channel scales: samples meet in the rows of its input, or lie in an order of their own"
)
_BLOCK_UNTOLD = "its block is not reconstructed: samples meet in the rows of what it reads, or in those of its outputs"


class Reconstruction:
    """One run over the graph.

    Attributes:
        holdout: [N] bool, samples that nothing is fitted to.
        learned: per layer.
        blocks: per block.
        votes: per input that voted.
        restored: indices of the units that came from the checkpoint.
    """

    def __init__(
        self,
        prepared: GraphModule,
        recipe: Recipe,
        samples: GraphSamples,
        *,
        batch_size: int,
        seed: int,
        max_memory: int,
        checkpoint: Checkpoint,
        bar: tqdm[Any],
    ) -> None:
        """A run about to start.

        Args:
            prepared: the graph; its observers are decided in place.
            recipe: scaling, rounding, bias correction and blocks.
            samples: to learn from.
            batch_size: samples per forward pass.
            seed: of all that is drawn.
            max_memory: bytes of values to hold.
            checkpoint: where units and spilled values go.
            bar: one tick a unit.
        """
        self.prepared, self.recipe, self.bar, self.count = prepared, recipe, bar, len(samples.timesteps)
        self.decisions = Decisions(prepared, checkpoint)
        self.watchers = observers(prepared)
        self.nodes = {name: node for name, node in graph.layer_nodes(prepared).items() if name in self.watchers}
        self.names = {node: name for name, node in self.nodes.items()}
        self.attention = attention_observers(prepared)
        self.unit_of = {name: unit for unit in units_of(prepared) for name in unit.layers}
        self.layouts = row_layouts(prepared, samples)
        batches = list(samples.batches(batch_size))
        self.holdout = held_out(len(samples), torch.Generator().manual_seed(seed))
        self.learned: dict[str, LayerLearning] = {}
        self.blocks: dict[str, BlockLearning] = {}
        self.restored: set[int] = set()
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
            folder=checkpoint.folder,
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
            self.holdout,
            seed,
        )
        self.inputs = InputLearning(prepared, recipe.scaling, self.stream, self.rows, self.count)
        self.weights = WeightLearning(prepared, recipe, self.rows, self.count)
        self.block_learner = BlockLearner(
            prepared, recipe.blocks, self.stream, self.rows, self.decisions, self._student
        )

    @property
    def votes(self) -> dict[str, VoteReport]:
        """Per input that voted, by the first layer that reads it."""
        return self.inputs.votes

    def run(self) -> None:
        """Decide every unit."""
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
                self.inputs.decide(unit)
        if unit.index not in self.restored:
            errors = self.weights.decide(name, node)
            gain, steps = self.inputs.scale_gain.get(name, (None, 0))
            note = "" if self.rows.layout(name) is not None else _UNTOLD
            self.learned[name] = LayerLearning(gain, steps, errors.nearest, errors.best, note)

    def _restore(self, unit: Unit) -> bool:
        """Take a unit's decisions from its file; False when there is none."""
        saved = self.decisions.load_unit(unit)
        if saved is None:
            return False
        learned, votes = saved
        self.learned |= learned
        self.inputs.votes |= votes
        return True

    def _after(self, node: Node) -> None:
        if node in self.attention:
            return
        unit = self.unit_of[self.names[node]]
        if self.names[node] != unit.layers[-1]:
            return
        if unit.index not in self.restored:
            self.decisions.save_unit(unit, self.learned, self.votes)
        worst = max(self.learned[name].rounded_error for name in unit.layers)
        self.bar.set_postfix(layer=unit.layers[0], error=f"{worst:.2e}")
        self.bar.update(1)

    def _passed(self, node: Node) -> None:
        if node not in self.ends:
            return
        block = self.ends[node]
        learned = self.block_learner.decide(block)
        if learned is not None:
            self.blocks[block.name] = learned
            return
        for name in block.layers:
            if not self.learned[name].note:
                self.learned[name] = replace(self.learned[name], note=_BLOCK_UNTOLD)
