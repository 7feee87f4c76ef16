"""What is decided of a block whose layers are all decided: their codes and activation steps, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao.algorithms.blocks import Block, run_block
from dmq_ao.algorithms.blockwise import BlockData, layouts_of, learn_block
from dmq_ao.algorithms.layer_rows import Draw, LayerRows
from dmq_ao.algorithms.row_layout import Layout, SharedValue
from dmq_ao.algorithms.stream import NodeValue, Stream
from dmq_ao.algorithms.units import BlockLearning, Decisions
from dmq_ao.config import BlockReconstruction
from dmq_ao.quantizer.prepared import observers


class BlockLearner:
    """Decides one block after another."""

    def __init__(
        self,
        prepared: GraphModule,
        config: BlockReconstruction | None,
        stream: Stream,
        rows: LayerRows,
        decisions: Decisions,
        student: Callable[[Node, list[Any], int], Any],
    ) -> None:
        """Of one run.

        Args:
            prepared: the graph; its observers are decided in place.
            config: how blocks are learned; None for a run without.
            stream: holds the teacher's and the student's values.
            rows: what layers are shown of them.
            decisions: where blocks are saved.
            student: computes a quantized node from the node, its arguments and the batch's index.
        """
        self.prepared, self.config, self.stream, self.rows = prepared, config, stream, rows
        self.decisions, self._student = decisions, student
        self.watchers = observers(prepared)

    def decide(self, block: Block) -> BlockLearning | None:
        """Learn a block, and bring the student's values up to date; None where samples cannot be told apart in it."""
        layouts = layouts_of(block, self.rows.layouts)
        if layouts is None:
            return None
        saved = self.decisions.load_block(block.index)
        if saved is None:
            learned = self._learn(block, layouts)
            self.decisions.save_block(block.index, block.layers, asdict(learned))
        else:
            learned = BlockLearning(saved["before"], saved["after"], int(saved["steps"]))
        if learned.after < learned.before:
            for node in block.live:
                if self.stream.differs(node):
                    self.stream.replace(node, partial(self._rerun, block, node))
        return learned

    def _learn(self, block: Block, layouts: Mapping[Node, Layout | SharedValue]) -> BlockLearning:
        config = self.config
        assert config is not None

        def reader(values: dict[Node, NodeValue]) -> Callable[[Tensor], dict[Node, Any]]:
            return lambda samples: {node: self.rows.pick(node, values[node], samples) for node in block.inputs}

        students, teachers = reader(self.stream.student_values), reader(self.stream.teacher_values)
        data = BlockData(students, teachers, layouts, self.rows.steps, self.rows.count, self.rows.holdout)
        with torch.enable_grad():
            learned, codes, factors = learn_block(
                self.prepared, block, data, config, self.rows.generator(block.index, Draw.BLOCK)
            )
        for name, record in codes.items():
            weight, _ = self.watchers[name]
            weight.restore(record, weight.bias)
        for name, factor in factors.items():
            activation = self.watchers[name][1]
            assert activation is not None
            input_record = activation.record()
            activation.restore(replace(input_record, scale=input_record.scale * factor.to(input_record.scale)))
        return learned

    def _rerun(self, block: Block, node: Node, index: int) -> Any:
        """The student's value of a node of a block for a batch."""
        inputs = {source: self.stream.student_values[source][index] for source in block.inputs}

        def layer(quantized: Node, args: list[Any], _inputs: Mapping[Node, Any]) -> Any:
            return self._student(quantized, args, index)

        return run_block(self.prepared, block, inputs, layer, [node])[node]
