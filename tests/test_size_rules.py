"""Equations between sizes: those of export are kept and hold, what is no equation is refused, nothing is executed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dmq_ao import graph
from dmq_ao.graph.size_rules import broken, holds

sizes = st.integers(1, 99)


@given(sizes, sizes)
def test_equations_mean_what_python_means(height: int, width: int) -> None:
    shapes = {"x": (2, height, width)}
    assert holds("shape['x'][1] == shape['x'][2]", shapes) is (height == width)
    assert holds("(3*shape['x'][1] + (-1)) % 4 == 0", shapes) is ((3 * height - 1) % 4 == 0)
    assert holds("shape['x'][1] == (2 + 2*(((-1) + shape['x'][1]) // 2))", shapes) is (height % 2 == 0)
    assert holds("shape['x'][0] == 1 or shape['x'][1] == shape['x'][2]", shapes) is (height == width)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd() == 1",
        "shape['x'][0].bit_length() == 2",
        "[1 for _ in shape] == 1",
        "shape['y'][0] == 2",
        "shape['x'][7] == 2",
        "shape['x'][0] % 0 == 0",
        "shape['x'][0] ** 9 == 2",
        "shape['x'][0] ==",
        "other['x'][0] == 2",
    ],
)
def test_what_is_no_equation_of_sizes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an equation of sizes"):
        holds(text, {"x": (2, 3)})


def test_the_broken_rule_is_named() -> None:
    rules = ("shape['x'][1] == 3", "shape['x'][2] % 2 == 0")
    assert broken(rules, {"x": (1, 3, 4)}) is None
    assert broken(rules, {"x": (1, 3, 5)}) == "shape['x'][2] % 2 == 0"


class Halves(nn.Module):
    """Needs even widths, and treats large batches another way that gives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] >= 8:
            x = x.contiguous()
        left, right = x.unflatten(-1, (2, -1)).unbind(-2)
        return self.conv(left + right) * t.view(-1, 1, 1, 1)


def test_a_graph_keeps_its_equations_and_no_inequality() -> None:
    module = Halves().eval()
    gm = graph.capture(module, {"x": torch.randn(2, 3, 4, 8), "t": torch.ones(2)})
    rules = graph.signature_of(gm).rules
    assert broken(rules, {"x": (64, 3, 4, 8), "t": (64,)}) is None
    assert "[1] == 3" in str(broken(rules, {"x": (2, 4, 4, 8), "t": (2,)}))
    assert "% 2" in str(broken(rules, {"x": (2, 3, 4, 7), "t": (2,)}))
    assert broken(rules, {"x": (2, 3, 4, 8), "t": (3,)}) is not None
    x, t = torch.randn(64, 3, 4, 8), torch.randn(64)
    torch.testing.assert_close(gm(x, t), module(x, t))
