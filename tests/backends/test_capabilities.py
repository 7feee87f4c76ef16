"""What backends say that they can, and what is made of it."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch.fx import GraphModule

import dmq_ao
from dmq_ao.backends import registry
from dmq_ao.backends.backend import Backend, Lowered, MaxPlan
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda import peak as cuda_peak
from dmq_ao.backends.onednn.operators import INTEGER_KERNELS, int_conv, int_linear
from dmq_ao.backends.onednn.peak import cpu_products
from dmq_ao.backends.registry import ALL_BACKENDS, choose_backend
from dmq_ao.benchmarks.roofline import int8_peak
from dmq_ao.passes import lower_precision
from dmq_ao.recipes import minmax
from dmq_ao.records import LayerPlan, LayerRecord
from tests.integer_sums import needs_exact_sums
from tests.plain import Plain, flow, plain_samples, seeded

CPU = torch.device("cpu")


class Renamed(type(ALL_BACKENDS["reference"])):  # type: ignore[misc]
    """The reference under a name that nobody has heard of, and unasked for."""

    name = "elsewhere"
    automatic = False
    max_plan = MaxPlan(lambda gm: gm, {"shape_padding": False})


class Bare(Backend):
    """What must be said, and no more."""

    name = "bare"

    def why_not_on(self, device: torch.device) -> str:
        return f"not on {device}"

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        return [*plan]

    def lower(self, gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
        return gm, {}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend: Backend = Renamed()
    monkeypatch.setitem(ALL_BACKENDS, backend.name, backend)
    return backend


def test_a_new_backend_is_an_entry(elsewhere: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else knows it, and everything that it says is heard."""
    model = seeded(Plain)
    samples = plain_samples(model)
    quantized, _ = flow(model, minmax("w8a8"), samples, "elsewhere")
    assert quantized.backend == "elsewhere"
    assert choose_backend("auto", CPU, quantized.plan).name != "elsewhere"
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.update(options) or module)
    dmq_ao.compile(quantized, "max")
    assert asked["options"]["shape_padding"] is False
    with pytest.raises(ValueError, match="packed=True keeps codes packed on the backends .'onednn'., .* 'elsewhere'"):
        choose_backend("elsewhere", CPU, quantized.plan, packed=True)
    with pytest.raises(ValueError, match="kernels of the backends .'cuda', 'onednn'., .* 'elsewhere'"):
        choose_backend("elsewhere", CPU, quantized.plan, latency_aware=True)


def test_a_backend_that_packs_and_measures_is_taken_at_its_word(elsewhere: Backend) -> None:
    elsewhere.keeps_packed = True
    elsewhere.measured = lambda gm, records, inputs: elsewhere.lower(gm, records)
    assert choose_backend("elsewhere", CPU, {}, packed=True) is elsewhere
    assert choose_backend("elsewhere", CPU, {}, latency_aware=True) is elsewhere


def test_auto_takes_the_first_that_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Renamed()
    monkeypatch.setattr(registry, "ALL_BACKENDS", {first.name: first, **ALL_BACKENDS})
    assert choose_backend("auto", CPU, {}) is not first
    first.automatic = True
    assert choose_backend("auto", CPU, {}) is first
    first.why_not_on = lambda device: "it is far away"
    assert choose_backend("auto", CPU, {}) is not first
    with pytest.raises(ValueError, match="backend 'elsewhere' is unavailable: it is far away, or use 'reference'"):
        choose_backend("elsewhere", CPU, {})


def test_a_bare_backend_has_nothing() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Backend()  # type: ignore[abstract]
    bare = Bare()
    assert (bare.kernels, bare.measured, bare.max_plan, bare.keeps_packed, bare.automatic) == ((), None, None, 0, 0)
    assert (bare.multiplies_integers(), bare.peak_products(CPU), bare.examine()) == (False, [], [])


# ---------------------------------------------------------------------------------------------------------------------
# Tables of kernels


def macs(backend: str, target: object) -> object:
    return next(one.integer_macs for one in ALL_BACKENDS[backend].kernels if one.target is target)


def test_multiply_accumulates_of_kernels_by_hand() -> None:
    scales = ((1,), (1,), (6, 4, 3, 2), (6,), (6,), None)
    conv = ((2, 8, 9, 9), *scales, [2, 1], [1, 0], [1, 1], 2, [3, 2], torch.float32)
    assert macs("onednn", int_conv)(*conv, out_shape=(2, 6, 5, 8)) == 2 * 6 * 5 * 8 * (8 // 2) * 6
    assert macs("onednn", int_linear)((2, 5, 8), *scales, torch.float32, out_shape=(2, 5, 6)) == 2 * 5 * 6 * 8
    rest = (None, None, [(6, 48)], [8], None, (6,), None, (6, 6), (6,), None, None)
    windows = ([3, 2], [2, 1], [1, 0], [1, 1])
    conv = ((2, 8, 9, 9), *rest, *windows, torch.float32)
    assert macs("cuda", cuda_ops.cuda_conv)(*conv, out_shape=(2, 6, 5, 8)) == 2 * 6 * 5 * 8 * 8 * 6
    for linear in (cuda_ops.cuda_linear, cuda_ops.library_linear):
        assert macs("cuda", linear)((2, 5, 8), *rest, torch.float32, out_shape=(2, 5, 6)) == 2 * 5 * 6 * 8
    assert macs("cuda", cuda_ops.float8_linear) is None


@needs_exact_sums
def test_only_kernels_that_are_told_are_narrowed() -> None:
    model = seeded(Plain)
    quantized, _ = flow(model, minmax("w8a8"), plain_samples(model), "onednn")

    def dtypes(gm: GraphModule) -> set[object]:
        targets = {kernel.target for kernel in INTEGER_KERNELS}
        return {node.args[-1] for node in gm.graph.nodes if node.target in targets}

    assert dtypes(lower_precision(quantized.graph_module)) == {torch.float32}
    blind = [replace(kernel, writes_dtype=False) for kernel in INTEGER_KERNELS]
    assert dtypes(lower_precision(quantized.graph_module, blind)) == {torch.float32}
    assert dtypes(lower_precision(quantized.graph_module, INTEGER_KERNELS)) >= {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Peaks, and what is examined


@needs_exact_sums
def test_peak_products_run_and_say_their_work() -> None:
    linear, convolution = cpu_products(linears=((3, 16, 8),), convolutions=((2, 4, 5),))
    assert (linear.macs, linear.call().shape) == (3 * 16 * 8, (3, 8))  # type: ignore[attr-defined]
    assert (convolution.macs, convolution.call().shape) == (2 * 4 * 4 * 9 * 25, (2, 4, 5, 5))  # type: ignore[attr-defined]


def test_the_product_of_a_gpu_is_that_of_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_peak, "PEAK_SIZES", (32, 64))
    small, large = cuda_peak.gpu_products(CPU)
    assert (small.macs, large.macs) == (32**3, 64**3)
    assert large.call().dtype == torch.int32  # type: ignore[attr-defined]


def test_a_device_without_integer_products_has_no_peak() -> None:
    assert int8_peak(device="meta") is None


def test_a_gpu_that_cannot_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (finding,) = ALL_BACKENDS["cuda"].examine()
    assert (finding.level, finding.subject) == ("slow", "cuda")
    assert "a GPU: no integer kernels here: compute capability (7, 5)" in finding.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (finding,) = ALL_BACKENDS["cuda"].examine()
    assert (finding.level, "backend 'cuda' has integer kernels" in finding.text) == ("ok", True)
