"""A layer that reads a concatenation becomes one layer per part: the same function, a range of its own for each."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph.roles import roles_of
from dmq_ao.passes import split_concat

aten = torch.ops.aten


class Reader(nn.Module):
    """A layer that reads three tensors of three channels each, concatenated along ``axis``."""

    def __init__(self, layer: nn.Module, axis: int, detour: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.axis, self.detour = layer, axis, detour or nn.Identity()
        kernel = [] if isinstance(layer, nn.Linear) else layer.weight.shape[2:]
        self.gain = nn.Parameter(torch.rand(3, *[1] * len(kernel)))

    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        a, b = a * self.gain, b * self.gain  # from here on, the channels are known to be three
        joined: Tensor = self.layer(self.detour(torch.cat([a, torch.relu(b), a * 2], self.axis)))
        return joined


class Pair(nn.Module):
    """Two layers that read the same concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.gain = nn.Parameter(torch.rand(3))

    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        joined = torch.cat([a * self.gain, b * self.gain], -1)
        return self.first(joined) * self.second(joined)


class Twice(nn.Module):
    """A layer that reads two concatenations, one after the other, or the first alone."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.layer, self.both = nn.Linear(6, 6), both
        self.gain = nn.Parameter(torch.rand(3))

    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        a, b = a * self.gain, b * self.gain
        first = self.layer(torch.cat([a, b], -1)).relu()
        second: Tensor = self.layer(torch.cat([first[..., :3], b], -1) if self.both else first)
        return second


class Unsized(nn.Module):
    """A concatenation of inputs, of which only the sum of channels is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        joined: Tensor = self.layer(torch.cat([a, b], -1))
        return joined


def split_all(gm: GraphModule) -> list[str]:
    """Split every layer of role ``@concat``; returns the names of the layers before."""
    layers = graph.find_layers(gm)
    roles = roles_of(gm, layers)
    split_concat(gm, [layer.name for layer in layers if "@concat" in roles[layer.name]])
    return [layer.name for layer in layers]


def captured(model: nn.Module, a: Tensor, b: Tensor) -> tuple[GraphModule, list[Tensor]]:
    inputs = [a, b, torch.tensor([10, 500])]
    return graph.capture(model.eval(), tuple(inputs)), inputs


def names(gm: GraphModule) -> list[str]:
    return [layer.name for layer in graph.find_layers(gm)]


def weighted(gm: GraphModule) -> dict[str, Tensor]:
    return {
        layer.name: graph.attribute(gm, layer.node.args[1])  # type: ignore[arg-type]
        for layer in graph.find_layers(gm)
    }


@pytest.fixture(scope="module")
def unet(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> tuple[GraphModule, dict[str, Tensor], list[str], Tensor]:
    """A tiny UNet captured and split, its inputs, its layers and its output before."""
    model, inputs = tiny_unet2d
    gm = graph.capture(model, inputs)
    before = split_all(gm)
    with torch.no_grad():
        return gm, inputs, before, model(**inputs).sample


Unet = tuple[GraphModule, dict[str, Tensor], list[str], Tensor]


def test_a_split_unet_computes_the_same(unet: Unet) -> None:
    gm, inputs, _, expected = unet
    with torch.no_grad():
        assert torch.allclose(gm(*inputs.values()), expected, atol=1e-5)
        rows = {name: torch.cat([value, value.flip(0)[:1]]) for name, value in inputs.items()}
        assert torch.allclose(gm(*rows.values())[:2], expected, atol=1e-5)


def test_skip_connections_of_a_unet_are_split(unet: Unet) -> None:
    gm, _, before, _ = unet
    readers = [name for name in before if name.startswith("up_blocks") and name.endswith("conv_shortcut")]
    assert len(readers) == 4
    expected = [
        part for name in before for part in ([f"{name}.part0", f"{name}.part1"] if name in readers else [name])
    ]
    assert names(gm) == expected
    assert list(graph.layer_nodes(gm)) == expected


def test_parts_keep_the_role(unet: Unet) -> None:
    gm, _, _, _ = unet
    roles = roles_of(gm, graph.find_layers(gm))
    assert {name for name, found in roles.items() if "@concat" in found} == {n for n in roles if ".part" in n}
    assert roles["conv_in"] == {"@input"}
    assert roles["conv_out"] == {"@output"}


def test_parts_hold_the_weight_once_and_the_first_the_bias(
    unet: Unet, tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    gm, _, _, _ = unet
    whole = "up_blocks.0.resnets.1.conv_shortcut"
    weights, nodes = weighted(gm), graph.layer_nodes(gm)
    first, second = (weights[f"{whole}.part{i}"] for i in (0, 1))
    assert torch.equal(torch.cat([first, second], 1), tiny_unet2d[0].get_parameter(f"{whole}.weight"))
    assert (first.shape[1], second.shape[1]) == (32, 16)  # of the decoder, and of the encoder
    assert nodes[f"{whole}.part0"].args[2] is not None
    assert nodes[f"{whole}.part1"].args[2] is None
    assert f"{whole}.weight" not in {graph.parameter_name(node) for node in gm.graph.nodes if node.op == "get_attr"}
    assert not any(name.endswith(f"{whole}.weight") for name, _ in gm.named_parameters())


@pytest.mark.parametrize(
    ("layer", "axis", "shape"),
    [
        (nn.Linear(9, 4), -1, (2, 6, 3)),
        (nn.Linear(9, 4, bias=False), 2, (2, 6, 3)),
        (nn.Linear(9, 4), 1, (2, 3)),
        (nn.Conv1d(9, 4, 3, padding=1), 1, (2, 3, 6)),
        (nn.Conv2d(9, 4, 3, stride=2, bias=False), -3, (2, 3, 6, 6)),
        (nn.Conv3d(9, 4, 2, dilation=2), 1, (2, 3, 5, 5, 5)),
    ],
    ids=["tokens", "tokens, no bias", "vectors", "conv1d", "conv2d", "conv3d"],
)
def test_every_kind_of_layer_is_split_at_every_seam(layer: nn.Module, axis: int, shape: tuple[int, ...]) -> None:
    model = Reader(layer, axis)
    gm, inputs = captured(model, torch.randn(shape), torch.randn(shape))
    assert split_all(gm) == ["layer"]
    assert names(gm) == ["layer.part0", "layer.part1", "layer.part2"]
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)
    assert not any(node.target == aten.cat.default for node in gm.graph.nodes)


def test_operators_that_change_nothing_do_not_hide_a_concatenation() -> None:
    model = Reader(nn.Linear(9, 4), -1, nn.Dropout(0.5))
    gm, inputs = captured(model, torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    assert any(node.target == aten.dropout.default for node in gm.graph.nodes)
    split_all(gm)
    assert names(gm) == ["layer.part0", "layer.part1", "layer.part2"]
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "axis", "shape", "detour"),
    [
        (nn.Linear(3, 4), 1, (2, 6, 3), None),
        (nn.Conv2d(3, 4, 3, padding=1), 2, (2, 3, 6, 6), None),
        (nn.Linear(9, 4), -1, (2, 6, 3), nn.SiLU()),
    ],
    ids=["along tokens", "along height", "an activation between"],
)
def test_other_concatenations_are_not_split(
    layer: nn.Module, axis: int, shape: tuple[int, ...], detour: nn.Module | None
) -> None:
    gm, _ = captured(Reader(layer, axis, detour), torch.randn(shape), torch.randn(shape))
    code = gm.code
    assert roles_of(gm, graph.find_layers(gm))["layer"].isdisjoint({"@concat"})
    split_all(gm)
    split_concat(gm, ["layer"])  # asked for by name, it still has no seam
    assert names(gm) == ["layer"]
    assert gm.code == code


def test_a_grouped_convolution_stays_whole() -> None:
    model = Reader(nn.Conv2d(9, 6, 3, groups=3), 1)
    gm, inputs = captured(model, torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6))
    roles = roles_of(gm, graph.find_layers(gm))
    assert "@concat" in roles["layer"]
    split_all(gm)
    assert names(gm) == ["layer"]
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)


def test_only_the_layers_named_are_split() -> None:
    model = Pair()
    gm, inputs = captured(model, torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    split_concat(gm, ["second"])
    assert names(gm) == ["first", "second.part0", "second.part1"]
    assert any(node.target == aten.cat.default for node in gm.graph.nodes)
    split_concat(gm, ["first"])
    assert names(gm) == ["first.part0", "first.part1", "second.part0", "second.part1"]
    assert not any(node.target == aten.cat.default for node in gm.graph.nodes)
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_a_layer_used_twice_keeps_its_uses_apart(both: bool) -> None:
    model = Twice(both)
    gm, inputs = captured(model, torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    assert split_all(gm) == ["layer", "layer#2"]
    parts = ["layer.part0", "layer.part1"]
    assert names(gm) == parts + (["layer.part0#2", "layer.part1#2"] if both else ["layer"])
    assert list(graph.layer_nodes(gm)) == names(gm)
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)


def test_parts_of_unknown_size_stay_whole() -> None:
    model = Unsized()
    gm, inputs = captured(model, torch.randn(2, 6, 2), torch.randn(2, 6, 4))
    assert split_all(gm) == ["layer"]
    assert names(gm) == ["layer"]
    with torch.no_grad():
        assert torch.allclose(gm(*inputs), model(*inputs), atol=1e-5)
