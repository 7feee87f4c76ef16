"""In-place operators become plain ones where nobody else sees the change, and nowhere else."""

import torch
from torch import Tensor, nn
from torch.export import export
from torch.fx import GraphModule

from dmq_ao.passes import out_of_place
from dmq_ao.passes.out_of_place import mutates

aten = torch.ops.aten


def captured(module: nn.Module, *inputs: Tensor) -> GraphModule:
    gm = export(module, inputs, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


class Fresh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(4, dtype=torch.float64)
        steps /= 4
        return x * (x * 2).relu_() + steps


class Seen(nn.Module):
    """The change of ``y`` shows in ``x`` and in ``view``."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        view = y[:2]
        y.mul_(3)
        z = y + 1
        z.add_(y)
        return z.sum() + view.sum() + y.sum()


def test_fresh_results_are_not_changed() -> None:
    x = torch.randn(4)
    gm = captured(Fresh(), x)
    assert any(mutates(node) for node in gm.graph.nodes)
    out_of_place(gm)
    assert not any(mutates(node) for node in gm.graph.nodes)
    assert torch.equal(gm(x), Fresh()(x))


def test_what_others_see_stays_in_place() -> None:
    x = torch.randn(4)
    gm = captured(Seen(), x)
    out_of_place(gm)
    left = [node.target for node in gm.graph.nodes if mutates(node)]
    assert left == [aten.mul_.Tensor]
    assert torch.equal(gm(x), Seen()(x))
