"""Whose the rows of a value are: found out for every order, and learned from whatever the order is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import flow, record, relative, seeded, small
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import graph
from dmq_ao.algorithms.row_layout import Count, Layout, Mixed, RowLayout, Several, SharedValue, is_known, row_layouts
from dmq_ao.samples.graph_samples import GraphSamples


class Conv(nn.Module):
    """A denoiser of three convolutions, one of which is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.middle(x))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.between(self.first(x) + t[:, None, None, None] / 1000))


class Guidance(Conv):
    """Classifier-free guidance inside forward: all samples twice."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, u = super().forward(torch.cat([x, x * 0.5]), torch.cat([t, t])).chunk(2)
        return u + 3 * (c - u)


class Windows(Conv):
    """Four windows of each sample as rows, the rows of a sample together."""

    def between(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(b * 4, c, h // 2, w // 2)
        rows = super().between(rows).reshape(b, 2, 2, c, h // 2, w // 2)
        return rows.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class WindowsFirst(Conv):
    """Windows as rows, the first of all samples, then the second."""

    def between(self, x: Tensor) -> Tensor:
        top, bottom = super().between(torch.cat(x.chunk(2, 2))).chunk(2)
        return torch.cat([top, bottom], 2)


class GuidedWindows(Windows):
    """All samples twice, and of each four windows."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, u = super().forward(torch.cat([x, x * 0.5]), torch.cat([t, t])).chunk(2)
        return u + 3 * (c - u)


class Tokens(Conv):
    """A linear layer over tokens of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(16, 16)  # type: ignore[assignment]

    def between(self, x: Tensor) -> Tensor:
        return super().between(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class TokensFirst(Tokens):
    """Tokens on the first axis, samples on the second."""

    def between(self, x: Tensor) -> Tensor:
        return Conv.between(self, x.flatten(2).permute(2, 0, 1)).permute(1, 2, 0).reshape(x.shape)


class Flat(Tokens):
    """Tokens of all samples on one axis."""

    def between(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2).flatten(0, 1)
        return Conv.between(self, rows).reshape(x.shape[0], -1, 16).transpose(1, 2).reshape(x.shape)


class Chunks(Conv):
    """Half of the samples at a time, to save memory."""

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([self.middle(part) for part in x.chunk(2)])


class Backwards(Conv):
    """The samples in opposite order."""

    def between(self, x: Tensor) -> Tensor:
        return self.middle(x.flip(0)).flip(0)


class Pairs(Conv):
    """The second half of the batch is guided by the first, as in a denoiser that is given both."""

    def between(self, x: Tensor) -> Tensor:
        half = x[: x.shape[0] // 2]
        return self.middle(torch.cat([half, half + x[x.shape[0] // 2 :]]))


class Vector(Conv):
    """A linear layer on a learned vector, which is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.read = nn.Parameter(torch.randn(16)), nn.Linear(16, 16)

    def between(self, x: Tensor) -> Tensor:
        return super().between(x) + self.read(self.vector)[:, None, None]


class Positions(Tokens):
    """A linear layer on a learned table of positions, which all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(64, 16)), nn.Linear(16, 16)

    def between(self, x: Tensor) -> Tensor:
        places = self.read(self.table).T.reshape(16, 8, 8)
        return super().between(x + places)


TWICE, FOUR, AFTER = Layout(2, 1), Layout(1, 4), Layout(2, 4)
KNOWN: dict[type[Conv], RowLayout] = {
    Conv: Layout(),
    Guidance: TWICE,
    Windows: FOUR,
    WindowsFirst: TWICE,
    GuidedWindows: AFTER,
    Tokens: Layout(),
    TokensFirst: Layout(axis=1),
    Flat: Layout(1, 64),
    Vector: Layout(),
    Positions: Layout(),
}
UNKNOWN: list[type[Conv]] = [Chunks, Backwards, Pairs]


def samples_of(model: nn.Module) -> dmq_ao.CalibrationSet:
    generator = torch.Generator().manual_seed(0)

    def call(step: int) -> None:
        model(torch.randn(4, 3, 8, 8, generator=generator) * (2 - step / 900), torch.full((4,), step))

    return record(model, call)


def prepared_of(kind: type[Conv], recipe: dmq_ao.Recipe) -> tuple[GraphModule, nn.Module, dmq_ao.CalibrationSet]:
    model = seeded(kind)
    samples = samples_of(model)
    return dmq_ao.prepare(model, recipe, samples.example(4), backend="reference"), model, samples


@pytest.mark.parametrize("kind", [*KNOWN, *UNKNOWN])
def test_layouts(kind: type[Conv]) -> None:
    prepared, _, samples = prepared_of(kind, dmq_ao.recipes.minmax())
    layouts = row_layouts(prepared, GraphSamples.of(prepared, samples))
    nodes = graph.layer_nodes(prepared)
    assert layouts[nodes["middle"]] == KNOWN.get(kind, Mixed())
    guided = kind in (Guidance, GuidedWindows)
    assert layouts[nodes["last"]] == (Mixed() if kind is Pairs else TWICE if guided else Layout())
    if kind in (Vector, Positions):
        assert layouts[nodes["read"]] == SharedValue()


RECIPES = {
    "default": small(dmq_ao.recipes.default("w4a8"), 6),
    "dmq": small(dmq_ao.recipes.dmq("w4a8"), 6),
    "eda_dm": small(dmq_ao.recipes.eda_dm("w4a8"), 6),
    "all inputs": small(
        dataclasses.replace(dmq_ao.recipes.dmq("w4a8"), scaling=dmq_ao.config.ChannelScaling(("*",), steps=6)), 6
    ),
}
_FEW = {"default": [Guidance, TokensFirst, Vector, Chunks, Pairs], "eda_dm": [GuidedWindows, TokensFirst, Backwards]}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        pytest.param(
            recipe,
            kind,
            marks=() if kind in _FEW.get(recipe, ()) else pytest.mark.slow,
            id=f"{recipe} {kind.__name__}",
        )
        for recipe in RECIPES
        for kind in (*KNOWN, *UNKNOWN)
    ],
)
def test_every_recipe_takes_every_order(recipe: str, kind: type[Conv]) -> None:
    prepared, model, samples = prepared_of(kind, RECIPES[recipe])
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    denoiser = dmq_ao.convert(prepared, "reference")
    layer = report.layers["middle"]
    assert bool(layer.note) == (kind in UNKNOWN)
    if kind in UNKNOWN:
        assert "samples meet in the rows of its input" in layer.note
        assert layer.scale_gain is None
        assert layer.rounded_error == layer.nearest_error
    [inputs] = samples.batches(16)
    with torch.no_grad():
        assert relative(denoiser(**inputs), model(**inputs)) < 0.2


@pytest.mark.parametrize("kind", [Guidance, Windows, TokensFirst])
def test_blocks_are_learned_whatever_the_order(kind: type[Conv]) -> None:
    model = seeded(kind)
    _, report = flow(model, small(dmq_ao.recipes.eda_dm("w3a8"), 40), samples_of(model))
    assert report.blocks["middle"].after < report.blocks["middle"].before


def test_a_block_whose_rows_are_nobodys_is_left_out() -> None:
    prepared, _, samples = prepared_of(Pairs, RECIPES["eda_dm"])
    report = dmq_ao.calibrate(prepared, samples, progress=False)
    assert "middle" not in report.blocks


class Meets(Conv):
    """Every row of the output is of all samples."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).flip(0)


def test_distillation_says_that_it_cannot_tell_the_outputs_apart() -> None:
    model = seeded(Meets)
    _, report = flow(model, RECIPES["default"], samples_of(model))
    assert report.distillation is not None
    assert report.distillation.steps == 0
    assert report.distillation.before == report.distillation.after > 0
    assert "cannot be told apart by sample" in report.distillation.note


@pytest.mark.parametrize("kind", [Guidance, Windows, TokensFirst, GuidedWindows])
def test_what_is_picked_is_what_the_samples_alone_give(kind: type[Conv]) -> None:
    prepared, _, samples = prepared_of(kind, dmq_ao.recipes.minmax())
    whole = GraphSamples.of(prepared, samples)
    layouts = row_layouts(prepared, whole)
    chosen = torch.tensor([1, 4, 5, 9])
    batches = [_values(prepared, batch.arguments) for batch in whole.batches(6)]
    alone = _values(prepared, whole.batch(chosen).arguments)
    places = [(index, chosen[(chosen >= 6 * index) & (chosen < 6 * index + 6)] - 6 * index) for index in range(2)]
    for node, layout in layouts.items():
        assert is_known(layout)
        parts = [(batches[index][node], some, 6) for index, some in places]
        actual = layout.pick(parts)  # type: ignore[union-attr]
        if isinstance(actual, Tensor):
            assert torch.allclose(actual, alone[node], atol=1e-5), node
        elif not isinstance(layout, Several):
            assert actual == alone[node], node


def _values(prepared: GraphModule, arguments: list[Tensor]) -> dict[Any, Any]:
    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    values: dict[Any, Any] = {}
    with torch.no_grad():
        Keep(prepared).run(*arguments)
    return values


# --- arithmetic of layouts ---------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 4), st.data())
def test_pick_is_the_rows_of_each_sample(outer: int, inner: int, axis: int, count: int, data: st.DataObject) -> None:
    """Rows numbered by place: (outer, sample, inner) in this order."""
    layout = Layout(outer, inner, axis)
    numbers = torch.arange(outer * count * inner).reshape(outer, count, inner)
    x = numbers.flatten()[:, None, None].expand(-1, 2, 3).movedim(0, axis)
    chosen = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    actual = layout.pick([(x, torch.tensor(chosen), count)])
    expected = numbers[:, chosen].flatten()
    assert torch.equal(actual.movedim(axis, 0)[:, 0, 0], expected)
    by_sample = layout.by_sample(x, count)
    assert torch.equal(by_sample[:, :, 0, 0], numbers.transpose(0, 1).flatten(1))


def test_parts_of_several_batches_join_sample_by_sample() -> None:
    layout = Layout(2, 1)
    first, second = torch.tensor([0, 1, 10, 11]), torch.tensor([2, 3, 4, 12, 13, 14])
    parts = [(first, torch.tensor([1]), 2), (second, torch.tensor([0, 2]), 3)]
    assert layout.pick(parts).tolist() == [1, 2, 4, 11, 12, 14]
    assert Count(3, 2).pick(parts) == 9
    assert Several((SharedValue(), layout)).pick([([7, item], places, size) for item, places, size in parts])[0] == 7


@pytest.mark.parametrize("call", [lambda: Layout(2, 2, 1), SharedValue])
def test_channels_stand_where_they_are_said_to(call: Callable[[], Layout | SharedValue]) -> None:
    layout = call()
    x = torch.randn(5, 8, 6) if isinstance(layout, Layout) else torch.randn(8, 5, 6)
    by_sample = layout.by_sample(x, 2)
    for ch_axis in (0, 2) if isinstance(layout, Layout) else (1, 2):
        assert by_sample.shape[layout.channel(ch_axis) + 1] == x.shape[ch_axis]


class Fixed(Tokens):
    """Takes the number of samples as a Python number, so that it is captured for that number."""

    def between(self, x: Tensor) -> Tensor:
        rows = Conv.between(self, x.flatten(2).transpose(1, 2).flatten(0, 1))
        return rows.reshape(int(x.shape[0]), -1, 16).transpose(1, 2).reshape(x.shape)


def test_a_graph_of_one_number_of_samples_is_an_error_that_says_so() -> None:
    prepared, _, samples = prepared_of(Fixed, RECIPES["default"])
    with pytest.raises(ValueError, match=r"captured for some numbers of samples alone: shape.*== 4.*example\(4\)"):
        row_layouts(prepared, GraphSamples.of(prepared, samples))


def test_fewer_samples_than_are_looked_at() -> None:
    prepared, _, samples = prepared_of(Guidance, dmq_ao.recipes.minmax())
    layouts = row_layouts(prepared, GraphSamples.of(prepared, samples.select([0, 1, 2])))
    assert layouts[graph.layer_nodes(prepared)["middle"]] == TWICE
