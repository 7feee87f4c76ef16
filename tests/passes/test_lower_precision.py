"""Narrow floats between integer layers: which values become narrow, what stays wide, and how little it changes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace

import dmq_ao
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.numerics import ops
from dmq_ao.passes import lower_precision
from dmq_ao.recipes import minmax
from tests.integer_sums import EXACT
from tests.plain import Plain, flow, plain_samples, relative, seeded

aten = torch.ops.aten
KERNELS = ALL_BACKENDS["onednn"].kernels
pytestmark = pytest.mark.skipif(not EXACT, reason="this CPU has no VNNI: there are no integer kernels")


@pytest.fixture(scope="module")
def lowered() -> dmq_ao.QuantizedDenoiser:
    model = seeded(Plain)
    return flow(model, minmax("w8a8"), plain_samples(model), backend="onednn")[0]


@pytest.fixture
def inputs(lowered: dmq_ao.QuantizedDenoiser) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.full((4,), 600)


class Recorder(Interpreter):
    """Runs a graph and keeps every value by node."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def test_values_between_kernels_are_narrow_and_the_output_is_not(
    lowered: dmq_ao.QuantizedDenoiser, inputs: tuple[Tensor, Tensor]
) -> None:
    narrow = lower_precision(lowered.graph_module, KERNELS)
    recorder = Recorder(narrow)
    with torch.no_grad():
        output = recorder.run(*inputs)
    assert output.dtype == torch.float32
    kernels = [node for node in recorder.seen if "dmq_ao.int_" in str(node.target)]
    assert kernels
    for node in [*kernels, *(n for n in recorder.seen if n.target in (aten.silu.default, aten.cat.default))]:
        fed = [
            source
            for source in node.all_input_nodes
            if getattr(recorder.seen[source], "dtype", None) == torch.bfloat16
        ]
        value = recorder.seen[node]
        assert isinstance(value, Tensor)
        assert value.dtype == (torch.bfloat16 if node in kernels or fed else torch.float32), node
    for node, value in recorder.seen.items():
        if isinstance(value, Tensor) and isinstance(node.meta.get("val"), Tensor):
            assert node.meta["val"].dtype == value.dtype, node


def test_vectors_stay_wide() -> None:
    model = seeded(Plain)
    net = flow(model, minmax("w8a8", embeddings=True), plain_samples(model), backend="onednn")[0]
    recorder = Recorder(lower_precision(net.graph_module, KERNELS))
    with torch.no_grad():
        recorder.run(torch.randn(4, 3, 8, 8), torch.full((4,), 600))
    kernels = [value for node, value in recorder.seen.items() if "dmq_ao.int_" in str(node.target)]
    types = {len(value.shape): value.dtype for value in kernels if isinstance(value, Tensor)}
    assert types == {2: torch.float32, 3: torch.bfloat16, 4: torch.bfloat16}


def test_it_changes_little_and_leaves_the_given_graph_alone(
    lowered: dmq_ao.QuantizedDenoiser, inputs: tuple[Tensor, Tensor]
) -> None:
    with torch.no_grad():
        before = lowered.graph_module(*inputs)
        nodes = len(lowered.graph_module.graph.nodes)
        narrow = lower_precision(lowered.graph_module, KERNELS)(*inputs)
        after = lowered.graph_module(*inputs)
    assert torch.equal(before, after)
    assert len(lowered.graph_module.graph.nodes) == nodes
    assert 0 < relative(narrow, before) < 0.02


def test_tensors_are_shared(lowered: dmq_ao.QuantizedDenoiser) -> None:
    own = {tensor.data_ptr() for tensor in lowered.graph_module.buffers() if not tensor.is_mkldnn}
    packed = {id(tensor) for tensor in lowered.graph_module.buffers() if tensor.is_mkldnn}
    for tensor in lower_precision(lowered.graph_module, KERNELS).buffers():
        if tensor.is_mkldnn:
            assert id(tensor) in packed
        elif tensor.dtype != torch.bfloat16:
            assert tensor.data_ptr() in own


def test_an_unknown_operator_gets_its_own_type_back(lowered: dmq_ao.QuantizedDenoiser) -> None:
    gm = GraphModule(lowered.graph_module, copy.deepcopy(lowered.graph_module.graph))
    kernel = next(node for node in gm.graph.nodes if "dmq_ao.int_" in str(node.target))
    with gm.graph.inserting_after(kernel):
        strange = gm.graph.call_function(aten.cumsum.default, (kernel, 1))
    strange.meta = dict(kernel.meta)
    kernel.replace_all_uses_with(strange, lambda user: user is not strange)
    gm.recompile()
    recorder = Recorder(lower_precision(gm, KERNELS))
    with torch.no_grad():
        recorder.run(torch.randn(4, 3, 8, 8), torch.full((4,), 600))
    value = next(value for node, value in recorder.seen.items() if node.target is aten.cumsum.default)
    assert isinstance(value, Tensor)
    assert value.dtype == torch.float32


def test_a_graph_that_writes_in_place_stays_as_it_is(lowered: dmq_ao.QuantizedDenoiser) -> None:
    gm = GraphModule(lowered.graph_module, copy.deepcopy(lowered.graph_module.graph))
    silu = next(node for node in gm.graph.nodes if node.target is aten.silu.default)
    silu.target = aten.silu_.default
    with pytest.warns(UserWarning, match=r"aten\.silu_\.default changes a tensor in place"):
        kept = lower_precision(gm, KERNELS)
    assert [str(n.target) for n in kept.graph.nodes] == [str(n.target) for n in gm.graph.nodes]


def test_without_integer_kernels_nothing_happens() -> None:
    gm = symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.SiLU()))
    x = torch.randn(2, 4)
    assert torch.equal(lower_precision(gm, KERNELS)(x), gm(x))
    assert ops.quantize not in {node.target for node in gm.graph.nodes}
