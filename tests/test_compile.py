"""``dmq_ao.compile``: the same numbers, one compilation for all shapes and timesteps, and errors that help."""

import functools
import importlib
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao.recipes import minmax
from tests import families
from tests.integer_sums import EXACT
from tests.plain import Plain, flow, plain_samples, record, relative, seeded

compile_module = importlib.import_module("dmq_ao.api.compile")  # the public name is the function

MAX = pytest.param(
    "max",
    marks=pytest.mark.skipif(
        not EXACT or find_spec("ninja") is None or shutil.which("c++") is None,
        reason="no VNNI, no ninja or no C++ compiler",
    ),
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@functools.cache
def made(bits: str, backend: str = "auto") -> dmq_ao.QuantizedDenoiser:
    model = seeded(Plain)
    return flow(model, minmax(bits), plain_samples(model), backend=backend)[0]


@pytest.mark.parametrize(("mode", "tolerance"), [("default", 1e-4), pytest.param(*MAX.values, 0.02, marks=MAX.marks)])
def test_one_compilation_serves_all_shapes_and_timesteps(mode: str, tolerance: float) -> None:
    quantized = made("w8a8")
    compiled = dmq_ao.compile(quantized, mode)
    compiled(torch.randn(2, 3, 8, 8), 900)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (8, 12, 16):
            for batch in (2, 3):
                for timestep in range(0, 1000, 50):
                    x = torch.randn(batch, 3, size, size)
                    actual = compiled(x, timestep)
    assert relative(actual, quantized(x, timestep)) < tolerance


@pytest.mark.parametrize("mode", ["default", pytest.param(*MAX.values, marks=[*MAX.marks, pytest.mark.slow])])
def test_two_denoisers_keep_their_own_graphs(mode: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    pairs = [(quantized, dmq_ao.compile(quantized, mode)) for quantized in (made("w8a8"), made("w3a8"))]
    outputs = [compiled(x, 500) for _, compiled in pairs]
    for (quantized, _), actual in zip(pairs, outputs, strict=True):
        assert relative(actual, quantized(x, 500)) < 0.02
    assert relative(outputs[0], outputs[1]) > 0.05


def test_what_is_no_quantized_denoiser_is_refused() -> None:
    with pytest.raises(TypeError, match=r"compile takes what dmq_ao.convert or dmq_ao.load returned, got Linear"):
        dmq_ao.compile(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'default' or 'max', got 'fast'"):
        dmq_ao.compile(made("w8a8"), "fast")  # type: ignore[arg-type]


def test_max_is_a_plan_of_some_backends() -> None:
    with pytest.raises(ValueError, match="backends .'cuda', 'onednn'., and this denoiser runs on 'reference'"):
        dmq_ao.compile(made("w8a8", backend="reference"), "max")


def as_traced(gm: GraphModule, inputs: object, **given: object) -> Callable[..., object]:
    """A compiler that compiles nothing: recompilations are counted by what is traced."""
    del inputs, given
    return gm.forward


def test_a_square_is_taken_for_a_coincidence() -> None:
    quantized = made("w8a8")
    compiled = dmq_ao.compile(quantized, backend=as_traced)
    compiled(torch.randn(4, 3, 4, 4), 900)  # as many samples as pixels a side, too
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 3, 8, 12), (3, 3, 16, 8), (5, 3, 4, 6), (2, 3, 9, 9)):
            x = torch.randn(shape)
            assert relative(compiled(x, 500), quantized(x, 500)) < 1e-4
    assert torch.fx.experimental._config.use_duck_shape  # as it was, for everybody else


def test_a_call_that_is_refused_is_refused_in_the_same_words() -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0, frames: int = 2) -> Tensor:
            return super().forward(x, t) * scale * frames

    net = seeded(Scaled)
    samples = record(net, lambda step: net(torch.randn(4, 3, 8, 8), torch.full((4,), step), scale=2.0, frames=3))
    prepared = dmq_ao.prepare(net, minmax("w8a8"), samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    compiled = dmq_ao.compile(dmq_ao.convert(prepared), backend=as_traced)
    x = torch.randn(2, 3, 8, 8)
    assert compiled(x, 500, scale=2.0, frames=3).shape == x.shape
    with pytest.raises(TypeError, match="argument 'frames' is 3 in the exported graph, got 5"):
        compiled(x, 500, scale=2.0, frames=5)
    with pytest.raises(TypeError, match="argument 'scale' is 2.0 in the exported graph, got 1.5"):
        compiled(x, 500, scale=1.5)
    with pytest.raises(TypeError, match="missing argument 't'"):
        compiled(x)


@pytest.mark.parametrize(
    "family",
    ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux", "sana", "wan"))],
)
def test_a_family_is_compiled_once_for_batches_and_sizes(family: str) -> None:
    pytest.importorskip("diffusers")
    case = families.built(family)
    inputs = case.inputs(2, 2)
    with dmq_ao.record(case.model, num_samples=4) as recorder, torch.no_grad():
        for _ in range(2):
            case.model(**inputs)
    samples = recorder.calibration_set()
    prepared = dmq_ao.prepare(case.model, minmax("w8a8"), samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    quantized = dmq_ao.convert(prepared)
    compiled = dmq_ao.compile(quantized, backend=as_traced)
    compiled(**inputs)  # a square
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in ((2, 3), (3, 3), (4, 2), (5, 1)):
            other = case.inputs(batch, size)
            assert relative(compiled(**other).sample, quantized(**other).sample) < 1e-3
