"""Linears on float8 codes: the numbers, the recipe, files and the products of the cuda backend, run on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import flow, relative, repeated_samples
from torch import Tensor, nn

import dmq_ao
from dmq_ao import QuantizedDenoiser, Recipe, numerics, recipes
from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.backends.cuda import lowering
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.config import Ranges, TensorConfig

pytestmark = pytest.mark.usefixtures("captures_are_shared")
Tiny = tuple[nn.Module, dict[str, Tensor]]


def e4m3_values() -> Tensor:
    """Every finite number of the format, from its bits: sign, four of exponent (bias 7), three of mantissa."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    positive = torch.tensor(values, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.floats(2**-10, 2**10, width=32))
def test_codes_are_the_nearest_numbers_of_the_format(values: list[float], scale: float) -> None:
    x, step = torch.tensor(values), torch.tensor(scale)
    codes = numerics.to_float8(x, step)
    scaled = (x / step).double()
    nearest = (scaled[:, None] - e4m3_values()).abs().amin(1)
    assert torch.equal((codes.double() - scaled).abs(), nearest)


@given(st.floats(-1e3, 0, width=32), st.floats(0, 1e3, width=32))
def test_the_largest_magnitude_is_the_largest_number(low: float, high: float) -> None:
    ends = torch.tensor([low, high])
    scale, zero_point = numerics.float8_qparams(ends[0], ends[1])
    assert int(zero_point) == 0
    largest = numerics.to_float8(ends, scale).double().abs().max()
    assert float(largest) == pytest.approx(448.0) or float(ends.abs().max()) < 448 * numerics.EPS


def test_the_recipe_and_what_goes_against_it() -> None:
    recipe = recipes.minmax("w8a8-fp8", embeddings=True)
    assert recipe.config.weight.float8
    assert recipe.config.activation.float8
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="nothing learns its codes"):
        dataclasses.replace(recipe, bias_correction=True)
    with pytest.raises(ValueError, match="float8 is symmetric, of 8 bits"):
        recipes.minmax("w8a8-fp8", ranges=Ranges.DYNAMIC)
    with pytest.raises(ValueError, match="float8 is symmetric, of 8 bits"):
        TensorConfig(bits=4, symmetric=True, float8=True)
    with pytest.raises(ValueError, match="float8 has its own exponents"):
        recipes.minmax("w8a8-fp8", power_of_two=True)
    for method in (recipes.dmq, recipes.eda_dm, recipes.default, recipes.mpq_dm):
        with pytest.raises(ValueError, match="float8"):
            method("w8a8-fp8")


def quantized(tiny: Tiny, ranges: Ranges) -> QuantizedDenoiser:
    model, inputs = tiny
    return flow(model, recipes.minmax("w8a8-fp8", ranges=ranges), repeated_samples(inputs))[0]


@pytest.fixture(scope="module")
def dit(tiny_dit: Tiny) -> QuantizedDenoiser:
    return quantized(tiny_dit, Ranges.PER_STEP)


@pytest.fixture(scope="module")
def unet(tiny_unet2d: Tiny) -> QuantizedDenoiser:
    return quantized(tiny_unet2d, Ranges.STATIC)


@pytest.mark.parametrize(("name", "net"), [("dit", "tiny_dit"), ("unet", "tiny_unet2d")])
def test_linears_are_float8_and_a_file_holds_their_codes(
    name: str, net: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Convolutions are integers."""
    (model, inputs), made = request.getfixturevalue(net), request.getfixturevalue(name)
    for record in made.records.values():
        assert record.weight.float8 == record.activation.float8 == (record.kind == "linear")
    answer = made(**inputs).sample
    assert 0 < relative(answer, model(**inputs).sample) < 0.1
    dmq_ao.save(made, tmp_path)
    loaded = dmq_ao.load(tmp_path, backend="reference")
    for layer, record in made.records.items():
        codes = loaded.records[layer].weight.codes
        assert codes.dtype == record.weight.codes.dtype
        assert torch.equal(codes.view(torch.uint8), record.weight.codes.view(torch.uint8))
    assert torch.equal(loaded(**inputs).sample, answer)


def test_the_product_of_the_cuda_backend_equals_the_reference(
    dit: QuantizedDenoiser, tiny_dit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "why_not_here", lambda device: "")
    dmq_ao.save(dit, tmp_path)
    lowered = dmq_ao.load(tmp_path, backend="cuda")
    assert {kernel.name for kernel in lowered.kernels.values()} == {"float8 linear"}
    _, inputs = tiny_dit
    assert relative(lowered(**inputs).sample, dit(**inputs).sample) < 0.01  # each layer's output is a bfloat16
    joint = [node for node in lowered.graph_module.graph.nodes if node.target == cuda_ops.float8_linear]
    assert len(joint) < len(lowered.kernels)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_product_against_float64(rows: int) -> None:
    x, weight = torch.randn(3, 5, 32), torch.randn(48, 32)
    scale = torch.full((rows,), 0.01) * torch.arange(1, rows + 1)
    weight_scale, bias = torch.rand(48) + 0.1, torch.randn(48)
    codes = numerics.to_float8(x, scale.reshape(-1, 1, 1))
    coded = numerics.to_float8(weight, torch.tensor(0.01))
    expected = (codes.double() * scale.reshape(-1, 1, 1)) @ (coded.double() * weight_scale[:, None]).T + bias
    actual = cuda_ops.float8_linear(codes, scale, coded, weight_scale, bias, torch.float32)
    assert relative(actual, expected) < 2**-8


def test_what_has_no_product_says_why(dit: QuantizedDenoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dmq_ao.save(dit, tmp_path)
    on_cpu = dmq_ao.load(tmp_path, backend="onednn")
    assert {kernel.why for kernel in on_cpu.kernels.values()} == {"float8: CPUs multiply no such codes; use w8a8"}
    monkeypatch.setattr(cuda, "why_not_here", lambda device: "")
    monkeypatch.setattr(lowering, "FLOAT8_MULTIPLE", 24)
    on_gpu = dmq_ao.load(tmp_path, backend="cuda")
    assert all("float8 products take sizes in multiples" in kernel.why for kernel in on_gpu.kernels.values())
    assert not any(kernel.is_integer for kernel in on_gpu.kernels.values())


def test_a_gpu_without_float8_says_so_before_calibration(tiny_dit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not_here", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    model, inputs = tiny_dit
    with pytest.raises(dmq_ao.UnsupportedByBackend, match=r"float8 needs compute capability \(8, 9\)"):
        dmq_ao.prepare(model, recipes.minmax("w8a8-fp8"), inputs, backend="cuda")
    dmq_ao.prepare(model, recipes.minmax("w8a8"), inputs, backend="cuda")
