"""Linears of one input become one product, and every output stays what it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph
from dmq_ao.backends import products as integer_products
from dmq_ao.graph.values import replace_fake_tensors
from dmq_ao.passes import join_projections
from dmq_ao.recipes import minmax
from tests.integer_sums import EXACT
from tests.plain import flow, record, seeded

pytestmark = pytest.mark.skipif(not EXACT, reason="this CPU has no VNNI: there are no integer kernels")


class Heads(nn.Module):
    """Three linears of one input, one of another, and one whose output is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(16, 8)
        self.flat, self.other = nn.Linear(16, 8), nn.Linear(8, 16)
        self.last = nn.Linear(24, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        flat = self.flat(x).view(-1, 8).view(v.shape)
        return self.last((q * k.relu()) + torch.cat([v, self.other(v + flat)], -1) + t.to(x.dtype)[:, None, None])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Heads)


@pytest.fixture(scope="module")
def samples(model: nn.Module) -> dmq_ao.CalibrationSet:
    return record(model, lambda step: model(torch.randn(4, 5, 12), torch.full((4,), step)))


def products(denoiser: dmq_ao.QuantizedDenoiser) -> int:
    target = torch.ops.dmq_ao.int_linear.default
    return sum(node.target is target for node in denoiser.graph_module.graph.nodes)


@pytest.mark.parametrize("recipe", [minmax("w8a8"), minmax("w4a8", power_of_two=True)], ids=lambda recipe: recipe.name)
def test_siblings_are_one_product(
    recipe: dmq_ao.Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = flow(model, recipe, samples, backend="onednn")[0]
    monkeypatch.setattr(integer_products, "join_siblings", lambda gm, records: {})
    alone = flow(model, recipe, samples, backend="onednn")[0]
    layers = len(joint.kernels)
    assert joint.kernels == alone.kernels
    assert (products(joint), products(alone)) == (layers - 2, layers)
    x, t = torch.randn(3, 7, 12), torch.tensor([900, 300, 0])
    with torch.no_grad():
        assert torch.equal(joint(x, t), alone(x, t))


def test_different_widths_stay_apart(model: nn.Module, samples: dmq_ao.CalibrationSet) -> None:
    wide = dmq_ao.Override("k", weight=dmq_ao.TensorConfig(8, dmq_ao.Granularity.PER_CHANNEL, symmetric=True))
    recipe = minmax("w4a8")
    recipe = dmq_ao.Recipe(
        **{**vars(recipe), "config": dmq_ao.QuantConfig(**{**vars(recipe.config), "overrides": (wide,)})}
    )
    quantized = flow(model, recipe, samples, backend="onednn")[0]
    assert products(quantized) == len(quantized.kernels) - 1


class Timed(nn.Module):
    """Blocks that each make something of the timestep: two behind a SiLU, one without bias, one bare."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first = nn.Linear(1, 8), nn.Linear(4, 6)
        self.one, self.two, self.bare = nn.Linear(8, 6), nn.Linear(8, 12), nn.Linear(8, 6)
        self.plain = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        vector, act = self.time(t.to(x.dtype)[:, None] / 1000), nn.functional.silu
        x = self.first(x) + self.one(act(vector))[:, None] + self.bare(vector)[:, None]
        scale, shift = self.two(act(vector))[:, None].chunk(2, -1)
        return x * scale + shift + self.plain(act(vector))[:, None]


def test_projections_of_the_timestep_are_one_product() -> None:
    model = seeded(Timed)
    gm = graph.capture(model, {"x": torch.randn(4, 5, 4), "t": torch.arange(4)})
    replace_fake_tensors(gm, keep=())
    plan = GraphModule(gm, gm.graph)
    join_projections(plan)
    linears = [node for node in plan.graph.nodes if node.target == graph.LINEAR]
    assert len(linears) == 5  # time, first, one + two, bare, plain
    x, t = torch.randn(3, 7, 4), torch.tensor([900, 300, 0])
    with torch.no_grad():
        torch.testing.assert_close(plan(x, t), model(x, t))
