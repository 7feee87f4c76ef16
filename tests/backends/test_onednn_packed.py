"""4-bit codes packed in memory: integer layers compute the same bits, float ones the same values, half the bytes."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import dmq_ao
from dmq_ao import PowerOfTwo, QuantizedDenoiser, Ranges, Recipe, graph
from dmq_ao.backends.onednn import packed as onednn_packed
from dmq_ao.backends.onednn.cpu import multiplies_bfloat16
from dmq_ao.backends.onednn.fused import fastest_on_cpu
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.numerics import code_range
from dmq_ao.passes import lower_precision
from dmq_ao.recipes import minmax
from dmq_ao.records import PackedWeight, shifted_codes
from tests.backends.one_layer import FLOAT, LAYERS, VOTES, calibrated, everywhere, example, run
from tests.backends.test_onednn import Small
from tests.integer_sums import needs_integers
from tests.plain import contents, relative

PER_CALL = ", unpacked per call"
RECIPES: dict[str, Recipe] = {
    "w4a8": minmax("w4a8"),
    "w4a8 votes per step": minmax("w4a8", power_of_two=VOTES, ranges=Ranges.PER_STEP),
    "w3a6 votes": minmax("w3a6", power_of_two=VOTES),
    "w4a12 votes": minmax("w4a12", power_of_two=VOTES),
    "w4a8 finest votes": minmax("w4a8", power_of_two=replace(VOTES, max_exponent=5)),
}

# ---------------------------------------------------------------------------------------------------------------------
# The operators


@given(
    bits=st.integers(1, 4),
    symmetric=st.booleans(),
    groups=st.sampled_from([1, 2, 6]),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
    exponents=st.none() | st.lists(st.integers(0, 3), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_unpacked_codes_are_the_shifted_ones(
    bits: int, symmetric: bool, groups: int, kernel: tuple[int, ...], exponents: list[int] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits, symmetric)
    codes = torch.randint(low, high + 1, (6, 6 // groups, *kernel), generator=generator)
    zero_point = torch.randint(0, 1 if symmetric else high + 1, (6, 1), generator=generator, dtype=torch.int32)
    weight = PackedWeight(bits, symmetric, codes, torch.ones(6, 1), zero_point)
    votes = None if exponents is None else torch.tensor(exponents, dtype=torch.int8)
    gm = GraphModule(nn.Module(), Graph())
    node = onednn_packed.unpacked(gm, "layer", weight, votes, groups, codes.shape)
    gm.graph.output(node)
    gm.recompile()
    actual = gm()
    assert actual.dtype == torch.int8
    assert torch.equal(actual.int(), shifted_codes(weight, votes, groups)[0])
    told = node.target(*(_meta(gm, arg) for arg in node.args))  # type: ignore[operator]
    assert (told.shape, told.stride(), told.dtype) == (actual.shape, actual.stride(), actual.dtype)


def _meta(gm: GraphModule, arg: object) -> object:
    return graph.attribute(gm, arg).to("meta") if isinstance(arg, torch.fx.Node) else arg


def int4_layer(out: int, inputs: int, group_size: int | None, dtype: torch.dtype, bias: bool) -> QuantizedDenoiser:
    """A weight-only linear, quantized and packed."""
    recipe = minmax("w4a16", group_size=group_size)
    samples = replace(example((8,)), inputs={"x": torch.randn(12, 3, inputs).to(dtype)})
    prepared = calibrated(nn.Linear(inputs, out, bias=bias).to(dtype), recipe, samples)
    return dmq_ao.convert(prepared, "onednn", packed=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out", "inputs", "group_size", "tolerance"),
    [(16, 32, None, 2**-7), (48, 96, None, 2**-7), (64, 256, None, 2**-7), (32, 128, 64, 2**-6), (80, 64, 32, 2**-6)],
)
def test_a_bfloat16_linear_runs_on_the_int4_kernel(
    out: int, inputs: int, group_size: int | None, tolerance: float, bias: bool
) -> None:
    quantized = int4_layer(out, inputs, group_size, torch.bfloat16, bias)
    kernel = quantized.kernels["layer"]
    assert (kernel.name, kernel.is_integer) == (onednn_packed.INT4, False)
    assert kernel.why == "weight-only: the input is float"
    x = torch.randn(2, 5, inputs).bfloat16()
    weight = quantized.records["layer"].weight.dequantize().double()
    expected = x.double() @ weight.T
    if bias:
        expected = expected + next(value for value in quantized.float_tensors.values()).double()
    actual = run(quantized, x, torch.tensor([900, 100]))
    assert actual.dtype == torch.bfloat16
    assert float((actual.double() - expected).abs().max() / expected.abs().max()) < tolerance


def test_one_scale_per_output_is_not_rounded() -> None:
    """Ones choose single columns, whose values bfloat16 then rounds once, and nothing else does."""
    quantized = int4_layer(16, 32, None, torch.bfloat16, bias=False)
    x = torch.eye(32).bfloat16()
    expected = quantized.records["layer"].weight.dequantize().T.bfloat16()
    assert torch.equal(run(quantized, x[:, None], torch.full((32,), 900))[:, 0], expected)


@pytest.mark.parametrize("bias", [None, torch.randn(16)])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (2, 0, 32)])
def test_the_compiler_is_told_the_shape_of_an_int4_linear(shape: tuple[int, ...], bias: Tensor | None) -> None:
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (16, 32), dtype=torch.int32), 1)
    tensors = (torch.randn(shape), weight, torch.ones(1, 16, 2).bfloat16(), torch.ones(16), bias)
    actual = onednn_packed.int4_linear(*tensors, 32)
    meta = [None if tensor is None else tensor.to("meta") for tensor in tensors]
    told = onednn_packed.int4_linear(*meta, 32)
    assert (told.shape, told.stride(), told.dtype) == (actual.shape, actual.stride(), actual.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# One layer


@needs_integers
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_integer_layer_computes_the_same_bits(kind: str, recipe: str) -> None:
    build, shape = LAYERS[kind]
    samples = example(shape, -1 if kind == "tokens" else 1)
    prepared = calibrated(build(), RECIPES[recipe], samples)
    plain, packed = (dmq_ao.convert(prepared, "onednn", packed=packed) for packed in (False, True))
    for x, t in ((samples.inputs["x"], samples.timestep), (samples.inputs["x"][:1] * 0.7, torch.tensor([480]))):
        assert torch.equal(run(packed, x, t), run(plain, x, t))
    before, after = plain.kernels["layer"], packed.kernels["layer"]
    assert (after.name, after.why) == (before.name + PER_CALL, before.why)
    assert after.is_integer == before.is_integer
    assert not any(tensor.is_mkldnn for tensor in packed.graph_module.buffers())


FLOATS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Recipe, str]] = {
    "convolution": (LAYERS["conv2d"][0], (8, 9, 7), minmax("w4a16"), "weight-only: the input is float"),
    "conv3d": (lambda: nn.Conv3d(8, 5, 2), (8, 4, 3, 3), minmax("w4a8"), "no int8 kernel for 3-d convolutions"),
    "no fit": (LAYERS["tokens"][0], (7, 8), minmax("w4a16"), "the int4 kernel wants outputs by 16 and inputs of a"),
    "no fit in groups": (
        lambda: nn.Linear(32, 16),
        (7, 32),
        minmax("w4a16", group_size=16),
        "the int4 kernel wants outputs by 16",
    ),
    "float32": (
        lambda: nn.Linear(32, 16),
        (7, 32),
        minmax("w3a16"),
        "the int4 kernel multiplies bfloat16: mode='max'",
    ),
    "groups": (lambda: nn.Linear(64, 16), (64,), minmax("w4a8", group_size=32), "a scale per group of inputs"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_layer_reads_packed_codes_and_says_why_it_is_float(name: str) -> None:
    build, shape, recipe, why = FLOATS[name]
    samples = replace(example((8,)), inputs={"x": torch.randn(12, *shape)})
    prepared = calibrated(build(), recipe, samples)
    plain, packed = (dmq_ao.convert(prepared, "onednn", packed=packed) for packed in (False, True))
    x, t = samples.inputs["x"], samples.timestep
    assert torch.equal(run(packed, x, t), run(plain, x, t))
    assert packed.kernels["layer"].name == FLOAT + PER_CALL
    assert why in packed.kernels["layer"].why
    assert "unpack_codes" in packed.graph_module.code


def test_wider_codes_stay_prepacked() -> None:
    build, shape = LAYERS["conv2d"]
    packed = dmq_ao.convert(calibrated(build(), minmax("w5a8"), example(shape)), "onednn", packed=True)
    assert PER_CALL not in packed.kernels["layer"].name
    assert not isinstance(packed.records["layer"].weight, PackedWeight)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


class Wide(nn.Module):
    """Nearly all bytes are weights: a convolution, and a linear that fits the int4 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(8, 64, 3, padding=1), nn.Linear(64, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.layer(x)).flatten(2).transpose(1, 2))
        return result


def pair(model: nn.Module, recipe: Recipe) -> tuple[QuantizedDenoiser, QuantizedDenoiser]:
    """A model as it is by default, and packed."""
    samples = example((8, 6, 4))
    prepared = dmq_ao.prepare(model.eval(), everywhere(recipe), samples.example(), backend="onednn")
    dmq_ao.calibrate(prepared, samples, progress=False)
    return dmq_ao.convert(prepared, "onednn"), dmq_ao.convert(prepared, "onednn", packed=True)


@needs_integers
@pytest.mark.parametrize("bits", ["w4a8", "w4a16"])
def test_a_packed_denoiser_holds_half_the_bytes(bits: str) -> None:
    plain, packed = pair(Wide(), minmax(bits))
    codes = sum(record.weight.codes.numel() for record in plain.records.values())
    rest = plain.graph_bytes - codes
    assert 0 < rest < codes / 2
    outputs = 128  # a zero point each, beside the codes
    assert codes / 2 <= packed.graph_bytes <= codes / 2 + rest + outputs
    # The records hold the codes that save writes: a second time by default, the same bytes when packed.
    assert plain.resident_bytes >= plain.graph_bytes + (codes if bits == "w4a8" else 0)
    assert packed.resident_bytes < packed.graph_bytes + 20 * outputs


@needs_integers
@pytest.mark.parametrize("bits", ["w4a8", "w4a16"])
def test_a_packed_denoiser_is_saved_and_loaded(bits: str, tmp_path: Path) -> None:
    model = Small()
    plain, packed = pair(model, minmax(bits))
    dmq_ao.save(plain, tmp_path / "plain")
    dmq_ao.save(packed, tmp_path / "packed")
    assert contents(tmp_path / "plain") == contents(tmp_path / "packed")
    assert packed.mean_bits == plain.mean_bits
    loaded = dmq_ao.load(tmp_path / "plain", model=model, backend="onednn", packed=True)
    assert loaded.kernels == packed.kernels
    x, t = torch.randn(3, 8, 5, 4), torch.tensor([900, 500, 100])
    assert torch.equal(run(loaded, x, t), run(plain, x, t))


@needs_integers
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", ["w4a8", "w4a16"])
def test_one_compilation_serves_all_shapes(bits: str, compiler: str) -> None:
    _, packed = pair(Wide(), minmax(bits))
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend=compiler, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows, size in itertools.product((2, 5), (6, 9)):
            x, t = torch.randn(rows, 8, size, size + 1), torch.full((rows,), 500)
            assert relative(compiled(x, t), packed(x, t)) < 1e-6


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
def test_the_plan_of_max_puts_float32_linears_on_the_int4_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmq_ao.backends.onednn.compiled.load_kernels", lambda: None)
    plain, packed = pair(Wide(), minmax("w4a16"))
    code = packed.graph_module.code
    fast = fastest_on_cpu(packed.graph_module)
    assert "int4_linear" in fast.code
    assert fast.code.count("ops.dmq_ao.unpack_codes") == 1  # the convolution
    assert packed.graph_module.code == code
    x, t = torch.randn(3, 8, 5, 4), torch.tensor([900, 500, 100])
    with torch.no_grad():
        assert relative(fast(x, t), plain(x, t)) < 5e-3


@needs_integers
def test_an_int4_linear_between_narrow_layers_is_narrow() -> None:
    mixed = minmax("w4a8")
    inputs = replace(mixed.config.activation, bits=16)
    weight_only = replace(mixed, config=replace(mixed.config, overrides=(dmq_ao.Override("last", activation=inputs),)))
    plain, packed = pair(Wide(), weight_only)
    narrow = lower_precision(onednn_packed.use_int4(packed.graph_module), ALL_BACKENDS["onednn"].kernels)
    (node,) = narrow.graph.find_nodes(op="call_function", target=onednn_packed.int4_linear)
    assert node.meta["val"].dtype == torch.bfloat16
    x, t = torch.randn(3, 8, 5, 4), torch.tensor([900, 500, 100])
    with torch.no_grad():
        assert relative(narrow(x, t), plain(x, t)) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_the_reference_keeps_nothing_packed() -> None:
    prepared = calibrated(nn.Linear(8, 6), minmax("w4a8"), example((8,)), "reference")
    with pytest.raises(ValueError, match="packed=True keeps codes packed on the backends .'onednn'., .* 'reference'"):
        dmq_ao.convert(prepared, "reference", packed=True)


def test_auto_says_so_where_it_would_take_the_reference() -> None:
    votes = PowerOfTwo(layers=("layer",), per_step=True)
    recipe = minmax("w4a8", power_of_two=votes, ranges=Ranges.PER_STEP)
    prepared = calibrated(nn.Linear(8, 6), recipe, example((8,)), "auto")
    with pytest.raises(ValueError, match="would run on 'reference'; leave packed out, or use a recipe and"):
        dmq_ao.convert(prepared, packed=True)
