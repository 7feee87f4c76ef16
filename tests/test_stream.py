"""The stream: the graph node by node, twice, within a bound on memory that changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import seeded
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import dmq_ao
from dmq_ao import graph
from dmq_ao.algorithms.stream import NodeValue, Stream
from dmq_ao.quantizer.prepared import observers
from dmq_ao.samples.graph_samples import Batch, GraphSamples

QUANTIZED = ["conv", "tokens", "merge.part0", "merge.part1"]
AMPLE = 1 << 40
Values = dict[str, list[Any]]


pytestmark = pytest.mark.usefixtures("captures_are_shared")


@pytest.fixture(scope="module")
def prepared(model: nn.Module, samples: dmq_ao.CalibrationSet) -> GraphModule:
    return dmq_ao.prepare(model, dmq_ao.recipes.minmax("w4a8"), samples.example(), backend="reference")


@pytest.fixture(scope="module")
def batches(prepared: GraphModule, samples: dmq_ao.CalibrationSet) -> list[Batch]:
    return list(GraphSamples.of(prepared, samples).batches(5))


def coarse(node: Node, args: list[Any], index: int) -> Any:
    """A student of its own: the input rounded, and a batch told from the others."""
    return node.target((8 * args[0]).round() / 8 + index, *args[1:])  # type: ignore[operator]


class Whole(Interpreter):
    """A batch through the whole graph, every value kept."""

    def __init__(self, gm: GraphModule, names: set[Node], index: int) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.names, self.index, self.found = names, index, {}

    def run_node(self, n: Node) -> Any:
        if n in self.names:
            result = coarse(n, list(self.fetch_args_kwargs_from_env(n)[0]), self.index)
        else:
            result = super().run_node(n)
        self.found[n.name] = result
        return result


def layers(prepared: GraphModule, names: list[str]) -> dict[Node, str]:
    return {node: name for name, node in graph.layer_nodes(prepared).items() if name in names}


def streamed(
    prepared: GraphModule, batches: list[Batch], names: list[str] = QUANTIZED, **given: Any
) -> tuple[Stream, Values, Values, list[str]]:
    """The stream after its run, what it held after each layer, and the order of the calls."""
    nodes, teacher, student, calls = layers(prepared, names), {}, {}, []

    def before(node: Node) -> None:
        calls.append(f"before {nodes[node]}")
        assert stream.student_values[node] is stream.teacher_values[node]

    def after(node: Node) -> None:
        calls.append(f"after {nodes[node]}")
        for values, found in ((stream.teacher_values, teacher), (stream.student_values, student)):
            found |= {held.name: list(value) for held, value in values.items()}

    stream = Stream(prepared, batches, coarse, set(nodes), **{"max_memory": AMPLE, **given})
    stream.run(before, after)
    return stream, teacher, student, calls


def whole(prepared: GraphModule, batches: list[Batch], names: list[str]) -> Values:
    nodes, found = set(layers(prepared, names)), {}
    with torch.no_grad():
        for index, batch in enumerate(batches):
            run = Whole(prepared, nodes, index)
            run.run(*batch.arguments)
            for name, value in run.found.items():
                found.setdefault(name, []).append(value)
    return found


def assert_equal(actual: Values, expected: Values) -> None:
    for name, values in actual.items():
        for one, other in zip(values, expected[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name


@pytest.mark.parametrize("names", [QUANTIZED, ["tokens"], ["merge.part1"]], ids=" ".join)
def test_values_are_those_of_whole_runs(names: list[str], prepared: GraphModule, batches: list[Batch]) -> None:
    _, teacher, student, calls = streamed(prepared, batches, names)
    assert calls == [f"{when} {name}" for name in names for when in ("before", "after")]
    assert set(teacher) == set(student)
    assert_equal(teacher, whole(prepared, batches, []))
    assert_equal(student, whole(prepared, batches, names))


def test_the_student_differs_after_a_quantized_layer_alone(prepared: GraphModule, batches: list[Batch]) -> None:
    node = next(iter(layers(prepared, ["tokens"])))
    below = {node}
    for other in prepared.graph.nodes:
        if any(source in below for source in other.all_input_nodes):
            below.add(other)
    seen = set()

    def note(_: Node) -> None:
        for held in stream.teacher_values:
            seen.add(held)
            assert stream.differs(held) == (held in below), held.name

    stream = Stream(prepared, batches, coarse, {node}, max_memory=AMPLE)
    stream.run(lambda _: None, note)
    assert node in seen
    assert len(seen) > 2


def test_values_that_nobody_reads_any_more_are_let_go(prepared: GraphModule, batches: list[Batch]) -> None:
    held = []
    nodes = set(layers(prepared, QUANTIZED))
    order = {node: place for place, node in enumerate(prepared.graph.nodes)}
    stream = Stream(prepared, batches, coarse, nodes, max_memory=AMPLE)

    def note(node: Node) -> None:
        held.append(len(stream.teacher_values))
        for other in stream.teacher_values:
            assert other is node or any(order[user] >= order[node] for user in other.users), other.name

    stream.run(note, note)
    assert max(held) < len(order) / 2
    assert set(stream.teacher_values) == {node for node in order if "output" in {user.op for user in node.users}}


@pytest.mark.parametrize("max_memory", [0, 1, 60_000])
def test_a_bound_on_memory_changes_no_bit_and_leaves_no_files(
    max_memory: int, prepared: GraphModule, batches: list[Batch], tmp_path: Path
) -> None:
    ample, *expected = streamed(prepared, batches)
    bound, *found = streamed(prepared, batches, max_memory=max_memory, folder=tmp_path)
    assert ample.spilled_bytes == 0
    assert bound.spilled_bytes > 0
    assert 0 < bound.peak_bytes < ample.peak_bytes
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        assert set(actual) == set(wanted)
        assert_equal(actual, wanted)
    assert not list(tmp_path.iterdir())


def test_what_is_on_disk_is_beside_the_state_and_bounded(
    prepared: GraphModule, batches: list[Batch], tmp_path: Path
) -> None:
    counts = []
    nodes = set(layers(prepared, QUANTIZED))
    stream = Stream(prepared, batches, coarse, nodes, max_memory=1, folder=tmp_path)

    def note(_: Node) -> None:
        files = list(tmp_path.glob("values-*/*"))
        spilled = {
            id(value)
            for values in (stream.teacher_values, stream.student_values)
            for value in values.values()
            if value.files
        }
        counts.append(len(files))
        assert len(files) == len(spilled) * len(batches)

    stream.run(note, note)
    assert max(counts) > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_no_files(
    error: type[BaseException], prepared: GraphModule, batches: list[Batch], tmp_path: Path
) -> None:
    def stop(_: Node) -> None:
        assert list(tmp_path.iterdir())
        raise error

    stream = Stream(prepared, batches, coarse, set(layers(prepared, ["tokens"])), max_memory=1, folder=tmp_path)
    with pytest.raises(error):
        stream.run(stop, stop)
    assert not list(tmp_path.iterdir())


def test_no_gradient_is_kept_and_no_observer_fed(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    gm = dmq_ao.prepare(model, dmq_ao.recipes.minmax("w4a8"), samples.example(), backend="reference")
    _, teacher, student, _ = streamed(gm, list(GraphSamples.of(gm, samples).batches(8)))
    for name in (node.name for node in layers(gm, QUANTIZED)):
        assert not any(value.requires_grad for value in [*teacher[name], *student[name]])
    assert not any(activation.ranges.rows for _, activation in observers(gm).values() if activation is not None)


class Pieces(nn.Module):
    """Values that are no tensors, and views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, -1)
        h = self.middle(torch.cat([b.expand(x.shape[0], 4), a], -1)).view(x.shape[0], -1)
        return self.last(h + h.t().contiguous().t()) + a.sum(-1, keepdim=True) + t[:, None]


def test_pieces_and_sizes(tmp_path: Path) -> None:
    denoiser = seeded(Pieces)
    inputs = {"x": torch.randn(3, 8), "t": torch.tensor([1, 2, 3])}
    gm = dmq_ao.prepare(denoiser, dmq_ao.recipes.minmax("w4a8"), inputs, backend="reference")
    given = [Batch(torch.arange(n), [torch.randn(n, 8), torch.arange(n)], torch.arange(n)) for n in (3, 2)]
    parts = ["middle.part0", "middle.part1"]
    _, teacher, student, calls = streamed(gm, given, parts, max_memory=0, folder=tmp_path)
    assert calls == [f"{when} {name}" for name in parts for when in ("before", "after")]
    assert_equal(teacher, whole(gm, given, []))
    assert_equal(student, whole(gm, given, parts))
    assert not list(tmp_path.iterdir())


def test_a_value_on_disk_is_the_value(tmp_path: Path) -> None:
    items = [torch.randn(4, 3).t(), torch.arange(5), torch.randn(2, 6)[:, ::2].half()]
    value = NodeValue(list(items))
    assert value.nbytes == 4 * 12 + 8 * 5 + 2 * 6
    value.spill(tmp_path / "one")
    assert value.nbytes == 0
    assert len(value) == 3
    for actual, expected in zip(value, items, strict=True):
        assert actual.dtype is expected.dtype
        assert torch.equal(actual, expected)
    assert len(list(tmp_path.iterdir())) == 3
    value.drop()
    assert not list(tmp_path.iterdir())
