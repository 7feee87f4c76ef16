"""Conditions on sizes: those that matter are kept and hold, what is none is refused, nothing is executed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from awkward import Net, all_layers, inputs
from hypothesis import given
from hypothesis import strategies as st
from plain import flow, record, seeded
from torch import Tensor, nn

import dmq_ao
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
    with pytest.raises(ValueError, match="not a condition on sizes"):
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


class AboveSixteen(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x * 2 if x.shape[-1] > 16 else x)


class FromSixRows(Net):
    """Six rows matter, ten do not."""

    def body(self, x: Tensor) -> Tensor:
        if x.shape[0] >= 6:
            x = x.flip(0)
        return super().body(x.contiguous() if x.shape[0] >= 10 else x)


class OneRow(Net):
    """Export takes one row for two or more, and leaves no guard."""

    def body(self, x: Tensor) -> Tensor:
        h = super().body(x)
        return h * 2 if x.shape[0] == 1 else h


class Squeezed(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) / x.squeeze().dim()


class NotEight(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x + 1 if x.shape[-2] != 12 else x)


class Lines(Net):
    """The number of steps becomes a number of the graph."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x * torch.linspace(1, 2, x.shape[2])[:, None])


class Root(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) * x.shape[-1] ** -0.5


class Bags(Net):
    """A bag of words from every row: where the bags begin is counted up to two rows or more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 3)

    def body(self, x: Tensor) -> Tensor:
        words = x[:, :, 0].flatten(1).argsort(-1) % 7
        return super().body(x + self.table(words)[:, :, None, None])


class NormedBags(Bags):
    """Norms are made of others too, and a part of them in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(1, 3)

    def body(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.group(x)
        return super().body(self.group(F.layer_norm(x, x.shape[-1:])))


@pytest.mark.parametrize(
    ("kind", "example", "good", "bad"),
    [
        (NormedBags, (2, 8, 8), [(1, 8, 8), (3, 8, 8)], []),
        (Bags, (2, 8, 8), [(1, 8, 8), (3, 8, 8)], []),
        (AboveSixteen, (2, 8, 8), [(1, 8, 16), (9, 3, 5)], [(2, 8, 17), (1, 8, 64)]),
        (AboveSixteen, (2, 8, 32), [(2, 8, 17)], [(2, 8, 16)]),
        (FromSixRows, (2, 8, 8), [(1, 8, 8), (5, 8, 8)], [(6, 8, 8), (12, 8, 8)]),
        (FromSixRows, (7, 8, 8), [(6, 8, 8), (12, 9, 8)], [(5, 8, 8)]),
        (OneRow, (2, 8, 8), [(2, 8, 8), (3, 4, 4)], [(1, 8, 8)]),
        (Squeezed, (2, 8, 8), [(3, 4, 4)], [(1, 8, 8), (2, 1, 8)]),
        (NotEight, (2, 8, 8), [(3, 11, 4)], [(2, 12, 8)]),
        (Lines, (2, 1, 8), [(5, 1, 3)], [(2, 4, 8)]),
        (Lines, (2, 6, 8), [(5, 6, 3)], [(2, 1, 8), (2, 12, 8)]),
        (Root, (2, 8, 8), [(3, 5, 12), (1, 8, 16), (3, 5, 8)], []),
        (Net, (2, 8, 8), [(1, 1, 1), (99, 3, 80)], []),
        (Net, (2, 1, 8), [(3, 1, 5)], [(2, 2, 8)]),
    ],
)
def test_sizes_at_which_the_code_computes_another_way_are_refused(
    kind: type[Net], example: tuple[int, ...], good: list[tuple[int, ...]], bad: list[tuple[int, ...]]
) -> None:
    module = seeded(kind)
    gm = graph.capture(module, inputs(*example))
    rules = graph.signature_of(gm).rules
    for sizes in good:
        x, t = inputs(*sizes)
        if broken(rules, {"x": x.shape, "t": t.shape}) is None:
            torch.testing.assert_close(gm(x, t), module(x, t), rtol=1e-4, atol=1e-5)
        else:
            assert kind is Root  # torch makes the root's argument a number, and says so by an equation
    for sizes in bad:
        assert broken(rules, {"x": inputs(*sizes)[0].shape, "t": (sizes[0],)}) is not None


def test_a_call_of_other_sizes_says_which_and_what_to_do(tmp_path: object) -> None:
    module = seeded(AboveSixteen)
    samples = record(module, lambda step: module(inputs(4, seed=step)[0], torch.full((4,), float(step))))
    quantized, _ = flow(module, all_layers(), samples)
    dmq_ao.save(quantized, f"{tmp_path}/out")
    message = r"needs shape\['x'\]\[3\] <= 16: 'x' dimension 3 is 20 \(8 in the example inputs\).*prepare with example"
    for denoiser in (quantized, dmq_ao.load(f"{tmp_path}/out", backend="reference")):
        with pytest.raises(ValueError, match=message):
            denoiser(*inputs(2, 8, 20))
        assert denoiser(*inputs(2, 8, 12)).shape == (2, 3, 8, 12)
    prepared = dmq_ao.prepare(module, all_layers(), samples.example())
    wide = dataclasses.replace(samples, inputs={"x": torch.randn(len(samples), 3, 8, 20)})
    with pytest.raises(ValueError, match=f"the samples' shapes .*{message}"):
        dmq_ao.calibrate(prepared, wide, progress=False)
