"""``dmq_ao.compile``: the same numbers, one compilation for all shapes and timesteps, and errors that help."""

import functools
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import dmq_ao
from dmq_ao.recipes import minmax
from tests.integer_sums import EXACT
from tests.plain import Plain, flow, plain_samples, relative, seeded

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
