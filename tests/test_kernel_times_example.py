"""The example that says where the time goes: every operator counts once, and the shares are those of a call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from plain import Plain, plain_samples, seeded

from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.peer_benchmark import Case

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import kernel_times

        yield kernel_times
    for name in ("kernel_times", "benchmark", "ablation", "footprint", "quantize_custom_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("dmq_ao_cpu::conv", "integer convolutions"),
        ("onednn::qconv_pointwise", "integer convolutions"),
        ("onednn::qlinear_pointwise", "integer linears"),
        ("dmq_ao::int_linear", "integer linears"),
        ("dmq_ao_cpu::attention", "attention"),
        ("dmq_ao_cpu::group_norm_quantize", "norm, SiLU and quantize"),
        ("graph_0_cpp_fused_add_3", "Inductor's loops"),
        ("aten::mkldnn_convolution", "float convolutions"),
        ("aten::addmm", "float products"),
        ("aten::empty_strided", "the rest"),
    ],
)
def test_operators_have_kinds(example: ModuleType, operator: str, kind: str) -> None:
    assert example.kind_of(operator) == kind


def test_time_of_a_product_is_the_products(example: ModuleType) -> None:
    x = torch.randn(600, 600)
    found = example.times(lambda: x @ x, 3)
    kinds = {kind: ms for kind, ms in found.items() if kind != "total"}
    operators = {kind: ms for kind, ms in kinds.items() if kind != example.WRAPPER}
    assert found["float products"] > 0.5 * sum(operators.values())
    assert sum(kinds.values()) >= found["total"] * (1 - 1e-6)  # what no operator took is the wrapper's


def test_a_run_is_a_table(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    monkeypatch.setattr(example, "case_of", lambda *_: Case(net, first_rows(samples, 4), samples, samples, 4))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    report: dict[str, Any] = example.run("plain", None, ["dmq_ao W8A8", "dmq_ao W4A16"], 2, tmp_path)
    assert set(report["ms"]) == {"dmq_ao W8A8", "dmq_ao W4A16"}
    assert report["ms"]["dmq_ao W4A16"].get("integer linears") is None
    text = example.table(report)
    assert "## plain, batch 4" in text
    assert "| total |" in text
    assert "(100%)" in text
