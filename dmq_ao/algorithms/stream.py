"""Run a prepared graph over a whole calibration set, node by node: every node once, in two versions.

The teacher's values are those of the float graph, the student's those of the layers as quantized so far. A node of
which no input differs has one value for both. Values live until their last reader has run; beyond ``max_memory`` those
needed last are written to disk.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.samples.graph_samples import Batch

SPILLED = "values-"


class NodeValue:
    """What a node gave for each batch of samples; tensors may lie on disk."""

    def __init__(self, items: list[Any]) -> None:
        """``items`` has one entry a batch."""
        self.items: list[Any] = items
        self.files: dict[int, tuple[Path, list[int], torch.device]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, views counted as if they were copies."""
        return sum(x.numel() * x.element_size() for x in self.items if isinstance(x, Tensor))

    def __getitem__(self, index: int) -> Any:
        """The value for one batch."""
        if index not in self.files:
            return self.items[index]
        file, axes, device = self.files[index]
        # A copy: tensors in a mapped file lie at odd addresses, where kernels may sum in another order.
        return load_file(file)["value"].to(device, copy=True).permute(axes)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def spill(self, stem: Path) -> None:
        """Move the tensors held to files named after ``stem``, one a batch."""
        for index, item in enumerate(self.items):
            if isinstance(item, Tensor):
                file = stem.with_name(f"{stem.name}.{index}")
                # Axes lie on disk as they lie in memory: a kernel may sum in another order over another layout.
                strides = item.stride()
                order = sorted(range(item.dim()), key=strides.__getitem__, reverse=True)
                save_file({"value": item.permute(order).contiguous().cpu()}, file)
                self.files[index] = file, [order.index(axis) for axis in range(item.dim())], item.device
                self.items[index] = None

    def drop(self) -> None:
        """Let go of memory and files."""
        for file, *_ in self.files.values():
            file.unlink(missing_ok=True)
        self.items, self.files = [], {}


class Stream:
    """Teacher and student values of a graph, node after node."""

    def __init__(
        self,
        gm: GraphModule,
        batches: Sequence[Batch],
        student: Callable[[Node, list[Any], int], Any],
        quantized: set[Node],
        *,
        max_memory: int,
        folder: Path | None = None,
        hold: Mapping[Node, Node] | None = None,
    ) -> None:
        """A stream about to start.

        Args:
            gm: the graph; its observers let values through.
            batches: of samples.
            student: computes a quantized node from the node, its arguments and the batch's index.
            quantized: the nodes whose student differs from the teacher even on equal inputs.
            max_memory: bytes of values to hold in memory.
            folder: where the rest goes; a temporary folder when None.
            hold: nodes whose values live until another node has run, if their readers do not need them longer.
        """
        self.gm, self.batches, self.student, self.quantized = gm, batches, student, quantized
        self.max_memory, self.folder = max_memory, folder
        self.teacher_values: dict[Node, NodeValue] = {}
        self.student_values: dict[Node, NodeValue] = {}
        self.last_use = _last_uses(gm, hold or {})
        self.external = _external_nodes(gm)
        self.order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self.peak_bytes = self.spilled_bytes = 0
        self._spill_to = Path()  # of the run under way

    def run(
        self,
        before: Callable[[Node], None],
        after: Callable[[Node], None],
        passed: Callable[[Node], None] | None = None,
    ) -> None:
        """Go through the graph.

        Args:
            before: sees each quantized node before its student runs.
            after: sees it afterwards.
            passed: sees every computed node, while the values it has read are still there.
        """
        if self.folder is not None:
            for left_over in self.folder.glob(f"{SPILLED}*"):  # of a run that was killed
                shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=SPILLED) as folder, torch.no_grad():
            self._spill_to = Path(folder)
            inputs = iter(range(len(self.batches[0].arguments)))
            for node in self.order:
                if node.op == "output":
                    break
                if node.op == "placeholder":
                    index = next(inputs)
                    self._set(node, NodeValue([batch.arguments[index] for batch in self.batches]))
                    continue
                self._step(node, before, after)
                if passed is not None:
                    passed(node)
                for used in self.last_use.get(node, ()):
                    self._free(used)
                if node in self.quantized:
                    _return_freed()

    def _step(self, node: Node, before: Callable[[Node], None], after: Callable[[Node], None]) -> None:
        differs = any(self.differs(source) for source in node.all_input_nodes)
        value = NodeValue([])
        self._set(node, value)
        self._fill(node, value, lambda i: self._evaluate(node, self.teacher_values, i))
        if node not in self.quantized and not differs:
            return
        if node in self.quantized:
            before(node)
        value = self.student_values[node] = NodeValue([])
        if node in self.quantized:
            self._fill(node, value, lambda i: self.student(node, self._arguments(node, self.student_values, i)[0], i))
            after(node)
        else:
            self._fill(node, value, lambda i: self._evaluate(node, self.student_values, i))

    def replace(self, node: Node, compute: Callable[[int], Any]) -> None:
        """Give a node another student's value: ``compute`` of each batch's index."""
        old, value = self.student_values[node], NodeValue([])
        self.student_values[node] = value
        self._fill(node, value, compute)
        if old is not self.teacher_values[node]:
            old.drop()

    def _fill(self, node: Node, value: NodeValue, compute: Callable[[int], Any]) -> None:
        """Compute a value batch by batch, never holding more than the bound and one batch."""
        for index in range(len(self.batches)):
            value.items.append(compute(index))
            self._bound(node)

    def differs(self, node: Node) -> bool:
        """Whether the student's value of a node is another than the teacher's."""
        return self.student_values[node] is not self.teacher_values[node]

    def _arguments(self, node: Node, values: dict[Node, NodeValue], index: int) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n][index])
        return list(args), dict(kwargs)

    def _evaluate(self, node: Node, values: dict[Node, NodeValue], index: int) -> Any:
        if node.op == "get_attr":
            return graph.attribute(self.gm, node)
        if node.op == "call_module":  # an observer, which changes nothing
            return values[node.args[0]][index]  # type: ignore[index]
        args, kwargs = self._arguments(node, values, index)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _set(self, node: Node, value: NodeValue) -> None:
        self.teacher_values[node] = self.student_values[node] = value

    def _free(self, node: Node) -> None:
        for values in (self.teacher_values, self.student_values):
            value = values.pop(node)
            if not any(value is other for other in [*self.teacher_values.values(), *self.student_values.values()]):
                value.drop()

    def _live(self) -> list[tuple[Node, NodeValue]]:
        live: dict[int, tuple[Node, NodeValue]] = {}
        for values in (self.teacher_values, self.student_values):
            for node, value in values.items():
                if node not in self.external:
                    live.setdefault(id(value), (node, value))
        return list(live.values())

    def _bound(self, now: Node) -> None:
        """Write what is needed last to disk until the rest fits; what ``now`` reads is needed first."""
        live = self._live()
        sizes = {id(value): value.nbytes for _, value in live}
        total = sum(sizes.values())
        self.peak_bytes = max(self.peak_bytes, total)
        if total <= self.max_memory:
            return
        for node, value in sorted(live, key=lambda pair: -self._next_use(pair[0], now)):
            if total <= self.max_memory:
                break
            total -= sizes[id(value)]
            self.spilled_bytes += sizes[id(value)]
            value.spill(self._spill_to / f"{node.name}-{id(value)}")

    def _next_use(self, node: Node, now: Node) -> int:
        return min((self.order[user] for user in node.users if self.order[user] >= self.order[now]), default=1 << 60)


def _return_freed() -> None:
    """Give freed memory back to the system: glibc keeps blocks of some megabytes, and a stream frees gigabytes."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _external_nodes(gm: GraphModule) -> set[Node]:
    """Nodes that hold samples or parameters, whose memory is not ours."""
    nodes: set[Node] = set()
    for node in gm.graph.nodes:
        observed = node.op == "call_module" and all(source in nodes for source in node.all_input_nodes)
        if node.op in ("get_attr", "placeholder") or observed:
            nodes.add(node)
    return nodes


def _last_uses(gm: GraphModule, hold: Mapping[Node, Node]) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
        last.setdefault(node, node)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    for node, until in hold.items():
        last[node] = max(last[node], until, key=order.__getitem__)
    last_reads: dict[Node, list[Node]] = {}
    for source, user in last.items():
        last_reads.setdefault(user, []).append(source)
    return last_reads
