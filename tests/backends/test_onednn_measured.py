"""Layers that are slow on integers run in float, mean what they meant, and say why; the rest stays as it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import PowerOfTwo, QuantizedDenoiser, Ranges, Recipe, graph
from dmq_ao.backends.onednn import measured as onednn_measured
from dmq_ao.backends.onednn.measured import FloatProduct, Timing
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.numerics import ops
from dmq_ao.passes import lower_precision
from dmq_ao.quantizer.prepared import state_of
from dmq_ao.recipes import minmax
from tests.backends.one_layer import FLOAT, calibrated, everywhere, example, run
from tests.integer_sums import needs_exact_sums
from tests.plain import contents, relative

SHAPE = (2, 8, 6, 4)
SLOW, FAST = Timing(0.31, 0.22, SHAPE), Timing(0.31, 0.30, SHAPE)
WHY = "measured: int8 0.31 ms, float 0.22 ms on [2, 8, 6, 4]"
RECIPES = {
    "w8a8": minmax("w8a8"),
    "w4a8 votes per step": minmax(
        "w4a8", power_of_two=PowerOfTwo(layers=("first",), agreement=0.3), ranges=Ranges.PER_STEP
    ),
    "w4a12": minmax("w4a12"),
}


class Mixed(nn.Module):
    """Two convolutions alike, a pointwise one, two linears of one input, and one that stays weight-only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.point, self.last = nn.Conv2d(8, 6, 1, bias=False), nn.Linear(5, 4)
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.point(torch.relu(self.again(torch.relu(self.first(x))))).flatten(2).transpose(1, 2)
        result: Tensor = self.last(self.q(tokens) * self.k(tokens))
        return result


@pytest.fixture(scope="module", params=RECIPES)
def prepared(request: pytest.FixtureRequest) -> GraphModule:
    torch.manual_seed(0)
    recipe: Recipe = RECIPES[request.param]
    weight_only = dmq_ao.Override("last", activation=dmq_ao.TensorConfig(bits=16))
    samples = example((8, 6, 4))
    gm = dmq_ao.prepare(Mixed().eval(), everywhere(recipe, overrides=(weight_only,)), samples.example())
    dmq_ao.calibrate(gm, samples, progress=False)
    return gm


def fake_clock(monkeypatch: pytest.MonkeyPatch, *slow: str) -> None:
    """Let the layers called ``slow``, joint ones ``a+b``, be faster in float."""

    def timings(gm: GraphModule, products: Mapping[str, FloatProduct], inputs: object) -> dict[str, Timing]:
        assert set(slow) <= set(products)
        return {name: SLOW if name in slow else FAST for name in products}

    monkeypatch.setattr(onednn_measured, "timings", timings)


def agree(actual: QuantizedDenoiser, expected: QuantizedDenoiser) -> bool:
    x, t = torch.randn(3, 8, 5, 4), torch.tensor([900, 500, 100])
    return relative(run(actual, x, t), run(expected, x, t)) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The choice, without a clock


@needs_exact_sums
@pytest.mark.parametrize("slow", [("first",), ("point", "q+k"), ("first", "again", "point", "q+k")])
def test_slow_layers_run_in_float_and_say_why(
    slow: tuple[str, ...], prepared: GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch, *slow)
    chosen = dmq_ao.convert(prepared, latency_aware=True)
    integer, reference = dmq_ao.convert(prepared), dmq_ao.convert(prepared, "reference")
    members = {name for joint in slow for name in joint.split("+")}
    for name, kernel in chosen.kernels.items():
        assert (kernel.name, kernel.why) == (FLOAT, WHY) if name in members else kernel == integer.kernels[name]
    reports = {row["name"]: row for row in chosen.layer_reports()}
    assert all((reports[name]["kernel"], reports[name]["why"]) == (FLOAT, WHY) for name in members)
    assert agree(chosen, integer)
    assert agree(chosen, reference)


@needs_exact_sums
def test_a_weight_is_dequantized_once(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, "first", "q+k")
    gm = dmq_ao.convert(prepared, latency_aware=True).graph_module
    nodes = graph.layer_nodes(gm)
    for name in ("first", "q+k"):
        x, weight = nodes[name].all_input_nodes[:2]
        assert x.target is ops.dequantize
        assert weight.op == "get_attr"
        assert graph.attribute(gm, weight).dtype == torch.float32
    (left,) = gm.graph.find_nodes(op="call_function", target=ops.dequantize_weight)
    assert next(iter(left.users)) is nodes["last"]
    assert sum(buffer.dtype in (torch.int8, torch.uint8) for buffer in gm.buffers() if not buffer.is_mkldnn) == 1
    assert graph.attribute(gm, nodes["first"].all_input_nodes[1]).is_contiguous(memory_format=torch.channels_last)


@needs_exact_sums
def test_nothing_slow_changes_nothing(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch)
    chosen, integer = dmq_ao.convert(prepared, latency_aware=True), dmq_ao.convert(prepared)
    assert chosen.kernels == integer.kernels
    assert chosen.graph_module.code == integer.graph_module.code


@needs_exact_sums
def test_float_layers_stand_between_bfloat16_ones(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, "again", "q+k")
    chosen = dmq_ao.convert(prepared, latency_aware=True)
    narrow = lower_precision(chosen.graph_module, ALL_BACKENDS["onednn"].kernels)
    x, t = torch.randn(3, 8, 5, 4), torch.tensor([900, 500, 100])
    with torch.no_grad():
        assert relative(narrow(x, t), run(chosen, x, t)) < 0.05


@needs_exact_sums
def test_a_saved_denoiser_is_timed_when_loaded(
    prepared: GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    integer = dmq_ao.convert(prepared)
    asked: list[str] = []
    real = onednn_measured.timings

    def timings(gm: GraphModule, products: Mapping[str, FloatProduct], inputs: list[Tensor]) -> dict[str, Timing]:
        found = real(gm, products, inputs, lambda calls: {name: float(call() is None) for name, call in calls.items()})
        asked.extend(found)
        return {name: SLOW if name == "first" else FAST for name in found}

    monkeypatch.setattr(onednn_measured, "timings", timings)
    dmq_ao.save(integer, tmp_path / "integer")
    loaded = dmq_ao.load(tmp_path / "integer", model=Mixed(), latency_aware=True)
    assert asked == ["first", "again", "point", "q+k"]
    assert [name for name, kernel in loaded.kernels.items() if kernel.why == WHY] == ["first"]
    assert not any(buffer.is_meta for buffer in loaded.graph_module.buffers())
    assert agree(loaded, integer)
    dmq_ao.save(loaded, tmp_path / "chosen")
    assert contents(tmp_path / "chosen") == contents(tmp_path / "integer")


def test_float_must_be_faster_by_a_margin() -> None:
    assert Timing(0.31, 0.22, (4, 64, 64, 64)).why == "measured: int8 0.31 ms, float 0.22 ms on [4, 64, 64, 64]"
    assert Timing(1.0, 0.89, (1,)).why
    assert not Timing(1.0, 0.91, (1,)).why
    assert not Timing(1.0, 2.0, (1,)).why


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@needs_exact_sums
def test_layers_that_are_alike_are_timed_once(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[torch.Size, torch.Size]] = []
    calls_of_a_layer = set()
    found: dict[str, Timing] = {}
    real = onednn_measured.timings

    def clock(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        integers, in_float = calls["int8"](), calls["float"]()
        assert isinstance(integers, list)
        calls_of_a_layer.add(len(integers))
        shapes.append((integers[-1].shape, in_float.shape))  # type: ignore[attr-defined]
        return {"int8": float(len(shapes)), "float": 100.0}

    def timings(gm: GraphModule, products: Mapping[str, FloatProduct], inputs: list[Tensor]) -> dict[str, Timing]:
        found.update(real(gm, products, inputs, clock))
        return found

    monkeypatch.setattr(onednn_measured, "timings", timings)
    dmq_ao.convert(prepared, latency_aware=True)
    twelve_bits = state_of(prepared).plan["first"].activation.bits > 8
    assert calls_of_a_layer == {3 if twelve_bits else 1}  # a product for each byte, and their sum
    rows = graph.signature_of(prepared).example["x"][0][0]
    assert [timing.integer_ms for timing in found.values()] == [1, 1, 2, 3]
    assert found["q+k"].shape == (rows, 24, 6)
    assert shapes[0] == ((rows, 8, 6, 4), (rows, 8, 6, 4))
    assert shapes[2] == ((rows, 24, 10), (rows, 24, 10))


@needs_exact_sums
@pytest.mark.parametrize("layer", [nn.Conv1d(8, 6, 3, padding=2, dilation=2, bias=False), nn.Linear(9, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clock_runs(dtype: torch.dtype, layer: nn.Module) -> None:
    samples = example((8, 9))
    samples = replace(samples, inputs={"x": samples.inputs["x"].to(dtype)})
    prepared = calibrated(layer.to(dtype), minmax("w8a8", ranges=Ranges.DYNAMIC), samples, "auto")
    chosen, reference = dmq_ao.convert(prepared, latency_aware=True), dmq_ao.convert(prepared, "reference")
    kernel = chosen.kernels["layer"]
    assert kernel.is_integer or kernel.why.startswith("measured: int8 ")
    x, t = torch.randn(3, 8, 9, dtype=dtype), torch.tensor([900, 500, 100])
    assert relative(run(chosen, x, t), run(reference, x, t)) < max(1e-4, 2 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_packed_codes_and_latency_do_not_go_together(prepared: GraphModule) -> None:
    with pytest.raises(ValueError, match="packed=True saves memory .* leave one of them out"):
        dmq_ao.convert(prepared, packed=True, latency_aware=True)


def test_the_reference_has_no_choice_of_kernels(prepared: GraphModule) -> None:
    with pytest.raises(ValueError, match="latency_aware=True chooses among .*'onednn'.* 'reference'"):
        dmq_ao.convert(prepared, "reference", latency_aware=True)


def test_auto_says_so_where_it_would_take_the_reference() -> None:
    votes = PowerOfTwo(layers=("layer",), per_step=True)
    recipe = minmax("w4a8", power_of_two=votes, ranges=Ranges.PER_STEP)
    prepared = calibrated(nn.Linear(8, 6), recipe, example((8,)), "auto")
    with pytest.raises(ValueError, match="would run on 'reference'; leave latency_aware out"):
        dmq_ao.convert(prepared, latency_aware=True)
