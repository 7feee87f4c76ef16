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


class Filled(nn.Module):
    """Rotary embeddings of Wan: memory that is made and then filled, every other place at a time."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[..., 0::2] = x[..., 1::2] * 2
        y[..., 1::2] = x[..., 0::2].neg()
        return y * 2


class FilledDeep(nn.Module):
    """A part of a part, and one place."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        before = y + 1
        y[1:, ::2] = x[1:, ::2].double()
        y[0, 1:3] = x[1, 1:3]
        return y + before


class Watched(nn.Module):
    """Who took a view before sees the change as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        view = y[1:].view(-1)
        y[1:] = x[1:] * 5
        return view + y[1:].view(-1)


class WatchedFill(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        view = y[1:]
        y[1:] = 0
        return view + y[1:]


class Masked(nn.Module):
    """A part that is filled, and one that is changed by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:1] = 0
        y[1:].mul_(3)
        return y + 1


class Broadcast(nn.Module):
    """One value for many places."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, 1:2] = x[:1, :1]
        return y


def test_what_is_filled_part_by_part_is_a_result_of_its_own() -> None:
    x = torch.randn(3, 4)
    for module in (Filled(), FilledDeep(), Broadcast(), Masked()):
        gm = captured(module, x)
        assert any(mutates(node) for node in gm.graph.nodes)
        out_of_place(gm)
        assert not any(mutates(node) for node in gm.graph.nodes)
        assert torch.equal(gm(x), module(x))
    assert aten.empty_like.default not in {node.target for node in gm.graph.nodes}


def test_what_others_see_is_filled_in_place() -> None:
    x = torch.randn(3, 4)
    for module in (Watched(), WatchedFill()):
        gm = captured(module, x)
        out_of_place(gm)
        assert any(mutates(node) for node in gm.graph.nodes)
        assert torch.equal(gm(x), module(x))


class Scaled(nn.Module):
    """Coordinates of LTX: each part is read by way of a view of a view, and written anew."""

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unsqueeze(0).repeat(2, 1, 1)
        for axis in range(2):
            grid[:, axis : axis + 1] = grid[:, axis : axis + 1] * (axis + 2) / 3
        return grid.flatten(1)


class ReadLater(nn.Module):
    """A view of a view from before the change is read after it."""

    def forward(self, x: Tensor) -> Tensor:
        grid = x * 1
        corner = grid[1:][:, 1:]
        grid[:, 1:2] = x[:, 1:2] * 5
        return corner.sum() + grid


def test_a_part_read_through_views_before_it_is_written_is_no_obstacle() -> None:
    x = torch.randn(3, 4)
    gm = captured(Scaled(), x)
    assert any(mutates(node) for node in gm.graph.nodes)
    out_of_place(gm)
    assert not any(mutates(node) for node in gm.graph.nodes)
    assert torch.equal(gm(x), Scaled()(x))


def test_a_view_of_a_view_that_is_read_later_sees_the_change() -> None:
    x = torch.randn(3, 4)
    gm = captured(ReadLater(), x)
    out_of_place(gm)
    assert any(mutates(node) for node in gm.graph.nodes)
    assert torch.equal(gm(x), ReadLater()(x))
