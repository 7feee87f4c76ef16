"""Run a prepared graph over a whole calibration set, node by node: every node once, in two versions.

The teacher's values are those of the float graph, the student's those of the layers as quantized so far. A node of
which no input differs has one value for both. Values live until their last reader has run; beyond ``max_memory`` those
needed last are written to disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph

SPILLED = "values-"


class Value:
    """What a node gave for each batch of samples; tensors may lie on disk."""

    def __init__(self, items: list[Any]) -> None:
        """``items`` has one entry a batch."""
        self.items, self.file = items, None

    file: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, views counted as if they were copies."""
        return sum(x.numel() * x.element_size() for x in self.items if isinstance(x, Tensor))

    def __getitem__(self, index: int) -> Any:
        """The value for one batch."""
        if self.file is None:
            return self.items[index]
        return load_file(self.file.with_suffix(f".{index}"))["value"]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def spill(self, file: Path) -> None:
        """Move the tensors to files named after ``file``, one a batch."""
        for index, item in enumerate(self.items):
            save_file({"value": item.contiguous()}, file.with_suffix(f".{index}"))
        self.file, self.items = file, [None] * len(self.items)

    def drop(self) -> None:
        """Let go of memory and files."""
        if self.file is not None:
            for index in range(len(self.items)):
                self.file.with_suffix(f".{index}").unlink(missing_ok=True)
        self.items = []


class Stream:
    """Teacher and student values of a graph, node after node."""

    def __init__(
        self,
        gm: GraphModule,
        batches: list[list[Tensor]],
        student: Callable[[Node, list[Any], int], Any],
        quantized: set[Node],
        *,
        max_memory: int,
        folder: Path | None = None,
    ) -> None:
        """A stream about to start.

        Args:
            gm: the graph; its observers let values through.
            batches: the graph's arguments, a list a batch.
            student: computes a quantized node from the node, its arguments and the batch's index.
            quantized: the nodes whose student differs from the teacher even on equal inputs.
            max_memory: bytes of values to hold in memory.
            folder: where the rest goes; a temporary folder when None.
        """
        self.gm, self.batches, self.student, self.quantized = gm, batches, student, quantized
        self.max_memory, self.folder = max_memory, folder
        self.teacher_values: dict[Node, Value] = {}
        self.student_values: dict[Node, Value] = {}
        self.last_use = _last_uses(gm)
        self.peak_bytes = self.spilled_bytes = 0

    def run(self, before: Callable[[Node], None], after: Callable[[Node], None]) -> None:
        """Go through the graph; ``before`` and ``after`` see each quantized node before and after its student ran."""
        for left_over in self.folder.glob(f"{SPILLED}*") if self.folder else ():  # of a run that was killed
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=SPILLED) as folder, torch.no_grad():
            order = list(self.gm.graph.nodes)
            inputs = iter(range(len(self.batches[0])))
            for position, node in enumerate(order):
                if node.op == "output":
                    break
                if node.op == "placeholder":
                    index = next(inputs)
                    self._set(node, Value([batch[index] for batch in self.batches]))
                    continue
                self._step(node, before, after)
                for used in self.last_use.get(node, ()):
                    self._free(used)
                self._bound(position, order, Path(folder))

    def _step(self, node: Node, before: Callable[[Node], None], after: Callable[[Node], None]) -> None:
        teacher = Value([self._evaluate(node, self.teacher_values, i) for i in range(len(self.batches))])
        differs = any(self.differs(source) for source in node.all_input_nodes)
        self.teacher_values[node] = self.student_values[node] = teacher
        if node in self.quantized:
            before(node)
            self.student_values[node] = Value(
                [self.student(node, self._arguments(node, self.student_values, i)[0], i) for i in range(len(teacher))]
            )
            after(node)
        elif differs:
            self.student_values[node] = Value(
                [self._evaluate(node, self.student_values, i) for i in range(len(teacher))]
            )

    def differs(self, node: Node) -> bool:
        """Whether the student's value of a node is another than the teacher's."""
        return self.student_values[node] is not self.teacher_values[node]

    def _arguments(self, node: Node, values: dict[Node, Value], index: int) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n][index])
        return list(args), dict(kwargs)

    def _evaluate(self, node: Node, values: dict[Node, Value], index: int) -> Any:
        if node.op == "get_attr":
            return graph.attribute(self.gm, node)
        if node.op == "call_module":  # an observer, which changes nothing
            return values[node.args[0]][index]  # type: ignore[index]
        args, kwargs = self._arguments(node, values, index)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _set(self, node: Node, value: Value) -> None:
        self.teacher_values[node] = self.student_values[node] = value

    def _free(self, node: Node) -> None:
        for values in (self.teacher_values, self.student_values):
            value = values.pop(node)
            if not any(value is other for other in [*self.teacher_values.values(), *self.student_values.values()]):
                value.drop()

    def _live(self) -> list[tuple[Node, Value]]:
        found: dict[int, tuple[Node, Value]] = {}
        for values in (self.teacher_values, self.student_values):
            for node, value in values.items():
                if node.op != "get_attr" and value.file is None and value.nbytes:
                    found.setdefault(id(value), (node, value))
        return list(found.values())

    def _bound(self, position: int, order: list[Node], folder: Path) -> None:
        live = self._live()
        total = sum(value.nbytes for _, value in live)
        self.peak_bytes = max(self.peak_bytes, total)
        if total <= self.max_memory:
            return
        where = {node: index for index, node in enumerate(order)}
        next_use = {
            id(value): min((where[user] for user in node.users if where[user] > position), default=len(order))
            for node, value in live
        }
        for node, value in sorted(live, key=lambda pair: -next_use[id(pair[1])]):
            if total <= self.max_memory or node.op == "placeholder":
                break
            total -= value.nbytes
            self.spilled_bytes += value.nbytes
            value.spill(folder / f"{node.name}-{id(value)}")


def _last_uses(gm: GraphModule) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
        last.setdefault(node, node)
    found: dict[Node, list[Node]] = {}
    for source, user in last.items():
        found.setdefault(user, []).append(source)
    return found
