"""Copies of a layer that read the same become one, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain import flow, graph_arguments, record, relative, without_graph
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph, recipes
from dmq_ao.passes import merge_layers


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.table = nn.Linear(8, 16), nn.Linear(16, 16), nn.Embedding(5, 16)

    def forward(self, t: Tensor, label: Tensor) -> Tensor:
        waves = torch.arange(8, device=t.device).div(8.0).add(1.0)
        return self.two(nn.functional.silu(self.one(t[:, None] * waves / 1000))) + self.table(label)


class Copies(nn.Module):
    """Three blocks, each with an embedder of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.embedders = nn.ModuleList(Embedder() for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        x = self.first(x)
        for embedder, conv in zip(self.embedders, self.convs, strict=True):
            x = conv(nn.functional.silu(x) + embedder(t.to(x.dtype), label)[:, :, None, None])
        return self.last(x)


def inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x, label = torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(5, (batch,), generator=generator)
    return {"x": x, "t": torch.arange(batch) * 100, "label": label}


def copies() -> Copies:
    """Two embedders are alike, the third is not."""
    torch.manual_seed(0)
    model = Copies().eval()
    model.embedders[1].load_state_dict(model.embedders[0].state_dict())
    return model


def names(gm: GraphModule) -> list[str]:
    return [layer.name for layer in graph.find_layers(gm)]


def merged(model: nn.Module, given: dict[str, Tensor]) -> tuple[GraphModule, dict[str, str]]:
    """The graph after merging, which computes the same, bit for bit, at other sizes too."""
    gm = graph.capture(model, given)
    plain = copy.deepcopy(gm)
    gone = merge_layers(gm)
    assert set(names(gm)) | set(gone) == set(names(plain))
    assert set(graph.layer_nodes(gm)) == set(names(gm))
    for batch in (1, 2, 3):
        arguments = graph_arguments(gm, inputs(batch))
        torch.testing.assert_close(gm(*arguments), plain(*arguments), rtol=0, atol=0)
    return gm, gone


def test_copies_that_read_the_same_are_one() -> None:
    model = copies()
    gm, gone = merged(model, inputs())
    assert gone == {f"embedders.1.{name}": f"embedders.0.{name}" for name in ("one", "two", "table")}
    left = {name for name, _ in gm.named_parameters()}
    assert left == {f"denoiser.{n}" for n, _ in model.named_parameters() if not n.startswith("embedders.1.")}


@pytest.mark.parametrize("what", ["one.weight", "one.bias", "two.weight", "table.weight"])
def test_one_number_that_differs_keeps_a_layer_and_what_reads_it(what: str) -> None:
    model = copies()
    with torch.no_grad():
        model.get_parameter(f"embedders.1.{what}").view(-1)[-1].add_(1e-3)
    _, gone = merged(model, inputs())
    kept = {"one.weight": {"one", "two"}, "one.bias": {"one", "two"}, "two.weight": {"two"}, "table.weight": {"table"}}
    assert set(gone) == {f"embedders.1.{name}" for name in {"one", "two", "table"} - kept[what]}


def test_one_layer_that_reads_two_inputs_stays_two() -> None:
    class Twice(Copies):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            told = self.embedders[0](t.to(x.dtype), label) + self.embedders[0](t.to(x.dtype) + 1, label)
            return self.last(self.first(x) + told[:, :, None, None])

    torch.manual_seed(0)
    _, gone = merged(Twice().eval(), inputs())
    assert gone == {"embedders.0.table#2": "embedders.0.table"}


def test_a_graph_that_changes_what_others_read_is_left_alone() -> None:
    class Changes(Copies):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            seen = t.to(x.dtype)
            row = seen[:1]
            before = self.embedders[0](seen, label)
            row.add_(1)
            after = self.embedders[1](seen, label)
            return self.last(self.first(x) + (before - after)[:, :, None, None])

    torch.manual_seed(0)
    model = Changes().eval()
    model.embedders[1].load_state_dict(model.embedders[0].state_dict())
    _, gone = merged(model, inputs())
    assert gone == {}


def test_random_numbers_are_not_equal() -> None:
    class Noisy(Copies):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            told = [e(t.to(x.dtype) + torch.rand_like(x[:, 0, 0, 0]), label) for e in self.embedders[:2]]
            return self.last(self.first(x) + (told[0] - told[1])[:, :, None, None])

    torch.manual_seed(0)
    model = Noisy().eval()
    model.embedders[1].load_state_dict(model.embedders[0].state_dict())
    assert merge_layers(graph.capture(model, inputs())) == {"embedders.1.table": "embedders.0.table"}


def test_a_denoiser_with_copies_is_smaller_and_as_near(tmp_path: Path) -> None:
    model = copies()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.embedders[1].parameters():
            parameter.mul_(1.001)
    recipe = recipes.minmax("w8a8", embeddings=True)

    def quantized(net: nn.Module) -> dmq_ao.QuantizedDenoiser:
        samples = record(net, lambda step: net(**{**inputs(4), "t": torch.full((4,), step)}))
        return flow(net, recipe, samples, backend="onednn")[0]

    small, large = quantized(model), quantized(other)
    assert len(large.layer_reports()) - len(small.layer_reports()) == 3
    assert small.mean_bits < large.mean_bits
    assert relative(small(**inputs(3)), model(**inputs(3))) < 0.02
    dmq_ao.save(small, tmp_path)
    from_graph = dmq_ao.load(tmp_path)
    without_graph(tmp_path)
    exported_again = dmq_ao.load(tmp_path, model=Copies().eval())  # of other numbers, no two alike
    for loaded in (from_graph, exported_again):
        torch.testing.assert_close(loaded(**inputs(3)), small(**inputs(3)), rtol=0, atol=0)
        assert loaded.merged == small.merged
    assert small.merged == {f"embedders.1.{name}": f"embedders.0.{name}" for name in ("one", "two", "table")}


def test_the_embedder_that_a_dit_reads_twice_is_one(
    tiny_dit: tuple[nn.Module, dict[str, Tensor]], capture_once: Callable[..., GraphModule]
) -> None:
    gm = capture_once(*tiny_dit)
    gone = merge_layers(gm)
    assert len(gone) == 3
    assert all(name.endswith("#2") for name in gone)
    assert not [name for name in names(gm) if "#" in name]
