"""The allocation example: every scheme is measured at the same mean bits, and the table holds them all."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain import Plain, plain_samples, seeded

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("captures_are_shared")


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("allocation")
    for name in ("allocation", "ablation", "quantize_custom_module"):
        sys.modules.pop(name, None)


def test_every_scheme_at_the_same_mean_bits(allocation: ModuleType) -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    subject = sys.modules["ablation"].Subject(net, lambda select, seed: samples, samples, lambda net: torch.zeros(1))
    results = []
    for scheme, config in allocation.SCHEMES.items():
        with torch.no_grad():
            found = allocation.measure(subject, "w3a16", config)
        assert found["mean_bits_of_codes"] == pytest.approx(3, abs=0.05)
        assert 0 < found["weight_error"] < 0.5
        results.append({"model": "plain", "bits": "w3a16", "scheme": scheme, **found})
    errors = {r["scheme"]: r["one_step_error"] for r in results}
    assert errors["error gain, whole model"] < errors["uniform"]
    text = allocation.table(results)
    assert all(f"| {scheme} |" in text for scheme in allocation.SCHEMES)
