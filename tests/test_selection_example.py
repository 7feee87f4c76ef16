"""The example that says what choosing samples costs: rows of the denoiser counted, kept bytes, a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from plain import Plain, seeded
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS, SIZE = 5, 8


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import selection

        yield selection
    for name in ("selection", "quantize_custom_module"):
        sys.modules.pop(name, None)


@torch.no_grad()
def sample(net: nn.Module, count: int, seed: int) -> Tensor:
    x = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    for step in reversed(range(STEPS)):
        x = x - 0.1 * net(x, torch.full((count,), 100 * step))
    return x


def test_collections_are_compared(example: ModuleType) -> None:
    args = argparse.Namespace(trajectories=12, samples=10, methods=["normal"], repeats=2)
    found = example.measure(seeded(Plain), sample, args)
    assert list(found) == ["uniform", "normal"]
    assert found["uniform"]["ratio"] == 1
    assert found["uniform"]["counts"] == [2] * STEPS
    for one in found.values():
        assert one["samples"] == sum(one["counts"]) == 10
        assert one["kept_mib"] == pytest.approx(10 * 4 * 3 * SIZE**2 / 2**20)
    assert found["uniform"]["evaluations"] == 12 * STEPS
    where = {"cpu": "some", "cores": 2, "torch": "2"}
    report = {"model": "plain", "trajectories": 12, "machine": where, "date": "today", "methods": found}
    assert "| uniform |" in example.table(report)
    assert "| 1.00 | 60 | 10 |" in example.table(report)
