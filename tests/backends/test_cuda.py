"""Graphs lowered to CUDA equal the quantize/dequantize graph, in Triton's interpreter; machine code compiles too."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import needs_interpreter, without_lost_checks
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import dmq_ao
from dmq_ao import BitPlan, CalibrationSet, QuantizedDenoiser, UnsupportedByBackend, graph
from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.backends.cuda import lowering
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda import tiles as cuda_tiles
from dmq_ao.backends.cuda.tiles import Shape, Tile
from dmq_ao.backends.products import LOOK_UP
from dmq_ao.backends.registry import choose_backend
from dmq_ao.mixed_precision.bit_plan import LayerBits
from dmq_ao.recipes import minmax
from tests.backends.exact import run_exactly
from tests.backends.one_layer import FLOAT, LAYERS, RECIPES, Net, calibrated, distance, everywhere, example, run

pytestmark = needs_interpreter
without_lost_checks()

# The interpreter takes each program by itself: few, but more than one, the last not full.
SMALL = Tile(rows=32, outs=16, lanes=32, parts=1, warps=4, stages=2)
WIDE = SMALL._replace(rows=128, outs=64, lanes=64)  # for whole nets
ROUNDING = 1e-6
# The functions themselves: the fixture below puts others in their place.
WHY_NOT_HERE, TILE_FOR = cuda.why_not_here, cuda_tiles.tile_for


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    """Kernels run here, in the interpreter and in small tiles."""
    with (
        mock.patch.object(cuda, "why_not_here", return_value=""),
        mock.patch.object(cuda_tiles, "tile_for", return_value=SMALL),
    ):
        yield


def both(prepared: GraphModule) -> tuple[QuantizedDenoiser, QuantizedDenoiser]:
    return dmq_ao.convert(prepared, "cuda"), dmq_ao.convert(prepared, "reference")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_equals_the_quantize_dequantize_graph(kind: str, recipe: str) -> None:
    build, shape = LAYERS[kind]
    samples = example(shape, -1 if kind == "tokens" else 1)
    lowered, reference = both(calibrated(build(), RECIPES[recipe], samples, "reference"))
    x, t = samples.inputs["x"][:5], torch.tensor([900, 100, 520, 100, 0])
    actual, expected = run(lowered, x, t), run(reference, x, t)
    exact, _ = run_exactly(reference, x=x, t=t)
    assert distance(actual, expected) < 1e-4
    kernel = lowered.kernels["layer"]
    if kind == "grouped":
        assert (kernel.name, kernel.why) == (FLOAT, "no int8 kernel for grouped convolutions on CUDA")
        return
    assert distance(actual, exact) < ROUNDING
    word = "linear" if kind in ("tokens", "vectors") else "convolution"
    stored = 4 if recipe.startswith("w4") else 8
    assert re.fullmatch(rf"triton int8 {word}( x\d)?, weight in {stored} bits", kernel.name)
    many = {"w4a12", "w8a9 dynamic", "w4a12 votes per step", "w8a10 votes", "w8a8 votes"}
    assert (" x" in kernel.name) is (recipe in many) or kind == "vectors"


@pytest.mark.parametrize("shape", [pytest.param((1, 8, 5, 4), marks=pytest.mark.slow), (3, 8, 12, 16)])
def test_any_batch_and_size_under_the_compiler(shape: tuple[int, ...]) -> None:
    build, calibrated_shape = LAYERS["conv2d"]
    samples = example(calibrated_shape)
    lowered, reference = both(calibrated(build(), RECIPES["w4a8 votes per step"], samples, "reference"))
    x, t = torch.randn(*shape), torch.tensor([480, 900, 20])[: shape[0]]
    exact, _ = run_exactly(reference, x=x, t=t)
    compiled = dmq_ao.compile(lowered)
    with torch.no_grad():
        assert distance(compiled(x=x, t=t), exact) < ROUNDING


class Residual(nn.Module):
    """Layers whose outputs are added to something, one of them twice read and one in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.vector = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.conv(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.tokens(h) + h
        again = self.twice(h)
        h = h + again + again.relu()
        return h + self.vector(h.mean(1, keepdim=True))


def test_what_is_added_to_a_layer_is_added_by_its_kernel() -> None:
    torch.manual_seed(0)
    net, x, t = Residual().eval(), torch.randn(12, 8, 6, 5), torch.full((12,), 500)
    samples = CalibrationSet({"x": x}, {}, t, torch.zeros(12, dtype=torch.long), "t")
    prepared = dmq_ao.prepare(net, everywhere(minmax("w8a8")), samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    lowered, reference = both(prepared)
    assert distance(run(lowered, x[:3], t[:3]), run(reference, x[:3], t[:3])) < 1e-4
    kinds = (cuda_ops.cuda_conv, cuda_ops.cuda_linear)
    nodes = [node for node in lowered.graph_module.graph.nodes if node.target in kinds]
    assert [node.args[lowering.RESIDUAL] is not None for node in nodes] == [False, True, True, False, False]


class LayerByLayer(Interpreter):
    """Runs a lowered graph; every layer must equal the exact one, which goes on in its place: no code moves later."""

    def __init__(self, gm: GraphModule, exact: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self.exact, self.compared = exact, set[str]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        members = str(n.meta.get(graph.LAYER)).split("+")
        if not self.exact.keys() >= set(members):
            return result
        expected = torch.cat([self.exact[member] for member in members], -1 if len(members) > 1 else 0)
        assert distance(result, expected) < 1e-5, members
        self.compared.update(members)
        return expected


@pytest.mark.parametrize(
    ("net", "bits"),
    [
        pytest.param("tiny_unet2d", "w4a8", marks=pytest.mark.slow),
        pytest.param("tiny_unet2d_condition", "w8a8", marks=pytest.mark.slow),
        ("tiny_dit", "w4a8"),
    ],
)
def test_a_denoiser_equals_the_quantize_dequantize_graph(
    net: str, bits: str, request: pytest.FixtureRequest, capture_once: Callable[..., GraphModule]
) -> None:
    denoiser, inputs = request.getfixturevalue(net)
    rest = {name: value for name, value in inputs.items() if name != "timestep"}
    samples = CalibrationSet(rest, {}, inputs["timestep"], torch.arange(2), "timestep")
    with mock.patch("dmq_ao.graph.capture", capture_once):
        prepared = dmq_ao.prepare(
            denoiser, minmax(bits, power_of_two=bits == "w4a8", embeddings=True), inputs, backend="reference"
        )
    dmq_ao.calibrate(prepared, samples, progress=False)
    reference = dmq_ao.convert(prepared, "reference")
    with mock.patch.object(lowering, "_add_residuals"):
        apart = dmq_ao.convert(prepared, "cuda")
    exact, layers = run_exactly(reference, **inputs)
    assert all(kernel.is_integer or kernel.name == LOOK_UP for kernel in apart.kernels.values())
    with torch.no_grad(), mock.patch.object(cuda_tiles, "tile_for", return_value=WIDE):
        checked = LayerByLayer(apart.graph_module, layers)
        last = checked.run(*(inputs[name] for name in reference.signature.names))
        whole = dmq_ao.convert(prepared, "cuda")(**inputs).sample
    assert checked.compared == set(layers)
    last = last[0] if isinstance(last, tuple) else last
    assert distance(last, exact) < 1e-5
    # Left to themselves, a last bit moves a code now and then, and in nets as small as these one code shows.
    assert (whole - exact).norm() <= 0.03 * exact.norm()


def test_widths_of_channels_take_segments() -> None:
    build, shape = LAYERS["conv2d"]
    samples = example(shape)
    prepared = dmq_ao.prepare(Net(build()).eval(), everywhere(minmax("w4a8")), samples.example(), backend="reference")
    widths = BitPlan({"layer": LayerBits(72, (2, 4, 3, 7, 1))})
    dmq_ao.calibrate(prepared, samples, progress=False, bits=widths)
    lowered, reference = both(prepared)
    assert lowered.kernels["layer"].name == "triton int8 convolution, weight in 2+4+8 bits"
    x, t = samples.inputs["x"][:5], samples.timestep[:5]
    assert distance(run(lowered, x, t), run(reference, x, t)) < 1e-4


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_floats_reads_packed_codes(kind: str) -> None:
    build, shape = LAYERS[kind]
    samples = example(shape, -1 if kind == "tokens" else 1)
    narrow = replace(samples, inputs={"x": samples.inputs["x"].half()})
    lowered, reference = both(calibrated(build().half(), minmax("w4a16"), narrow, "reference"))
    x, t = narrow.inputs["x"][:5], samples.timestep[:5]
    # The reference rounds the weight to float16; here its codes are exact, and the sum is scaled.
    assert distance(run(lowered, x, t).float(), run(reference, x, t).float()) < 0.005
    name = lowered.kernels["layer"].name
    assert name == (FLOAT if kind == "grouped" else "triton float16, weight in 4 bits")
    wide = dmq_ao.convert(calibrated(build(), minmax("w4a16"), samples, "reference"), "cuda").kernels["layer"]
    assert (wide.name, "bfloat16 or float16" in wide.why) == (FLOAT, kind != "grouped")


def test_centred_codes_wider_than_a_byte_stay_in_float() -> None:
    build, shape = LAYERS["tokens"]
    samples = example(shape, -1)
    narrow = replace(samples, inputs={"x": samples.inputs["x"].half()})
    recipe = minmax("w8a16")
    recipe = replace(recipe, config=replace(recipe.config, weight=replace(recipe.config.weight, symmetric=False)))
    kernel = dmq_ao.convert(calibrated(build().half(), recipe, narrow, "reference"), "cuda").kernels["layer"]
    assert (kernel.name, "wider than a byte" in kernel.why) == (FLOAT, True)


# ---------------------------------------------------------------------------------------------------------------------
# What does not run, tiles, and machine code for GPUs that are not here


def test_a_device_that_cannot_is_told_what_to_do() -> None:
    plan: dict[str, Any] = {}
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert "finds no CUDA device" in WHY_NOT_HERE(torch.device("cuda"))
    with (
        mock.patch.object(cuda, "why_not_here", WHY_NOT_HERE),
        mock.patch("torch.cuda.is_available", return_value=True),
    ):
        with pytest.raises(
            ValueError, match="'cuda' is unavailable: it runs on CUDA devices .* on cpu; move the denoiser, or"
        ):
            choose_backend("cuda", torch.device("cpu"), plan)
        assert choose_backend("auto", torch.device("cpu"), plan).name != "cuda"
        with mock.patch("importlib.util.find_spec", return_value=None):
            assert "pip install triton" in WHY_NOT_HERE(torch.device("cuda"))
        with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
            assert "(7, 5) of cuda is below (8, 0)" in WHY_NOT_HERE(torch.device("cuda"))
        with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
            assert choose_backend("cuda", torch.device("cuda"), plan).name == "cuda"


def test_what_no_stored_weight_can_hold_is_refused() -> None:
    samples = example((8, 9, 7))
    recipe = minmax("w8a8")
    asymmetric = replace(recipe.config.weight, symmetric=False)
    changed, net = everywhere(recipe, weight=asymmetric), Net(LAYERS["conv2d"][0]()).eval()
    with pytest.raises(UnsupportedByBackend, match="layer: asymmetric 8-bit weight codes do not fit int8"):
        dmq_ao.prepare(net, changed, samples.example(), backend="cuda")


@given(
    rows=st.integers(1, 10**6),
    outs=st.integers(1, 5000),
    row_bytes=st.integers(1, 160).map(lambda lanes: 32 * lanes),
    taps=st.sampled_from([1, 9]),
    bits=st.sampled_from([2, 4, 8]),
)
def test_tiles_fit_the_kernels(rows: int, outs: int, row_bytes: int, taps: int, bits: int) -> None:
    tile = cuda_tiles.rule(Shape(rows, outs, row_bytes, taps, bits), multiprocessors=132)
    for size, least, most in ((tile.rows, 16, 128), (tile.outs, 64, 128), (tile.lanes, 32, 128)):
        assert least <= size <= most
        assert size & (size - 1) == 0
    steps = taps * -(-row_bytes // tile.lanes)
    assert 1 <= tile.parts <= max(1, steps // 4)


def test_measured_tiles_come_before_the_rule(tmp_path: Path) -> None:
    file, shape = tmp_path / "tiles.json", Shape(1000, 320, 160, 9, 4)
    measured = SMALL._replace(parts=5)
    file.write_text(json.dumps({"cpu": {cuda_tiles.key(shape): measured}}))
    with mock.patch.object(cuda_tiles, "TILE_FILE", file):
        cuda_tiles.forget_tiles()
        assert TILE_FOR(shape, torch.device("cpu")) == measured
        assert TILE_FOR(shape._replace(rows=1024), torch.device("cpu")) == measured
        assert TILE_FOR(shape._replace(rows=1025), torch.device("cpu")) != measured
    cuda_tiles.forget_tiles()


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_to_integer_tensor_core_code(capability: int) -> None:
    """Without a GPU: the interpreter takes programs that the compiler refuses."""
    script = Path(__file__).with_name("compile_ahead.py")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], env=plain, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    machine = "wgmma.mma_async" if capability == 90 else "mma.sync"
    for name, facts in found.items():
        types = "f32.bf16.bf16" if name.endswith("True)") else "s32.s8.s8"
        assert [machine in product and types in product for product in facts["products"]] == [True], name
        assert facts["copies"] > 0, f"{name}: tiles are not loaded ahead"


def test_max_replays_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = LAYERS["conv2d"]
    lowered, _ = both(calibrated(build(), RECIPES["w8a8"], example(shape), "reference"))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda module, **given: asked.append(given) or module)
    for mode in ("default", "max"):
        dmq_ao.compile(lowered, mode)
    assert [given["options"].get("triton.cudagraphs", False) for given in asked] == [False, True]
    assert all(given["fullgraph"] for given in asked)
