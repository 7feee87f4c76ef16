"""The features found in the graph are what the module that a reader of the model would name gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain, graph_arguments, plain_samples, seeded
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import dmq_ao
from dmq_ao.algorithms.features import find_feature_node

pytestmark = pytest.mark.usefixtures("captures_are_shared")
RECIPE = dmq_ao.recipes.dmq("w4a8")  # splits layers, stands observers between operators


class Value(Interpreter):
    """What a graph computes at one node."""

    def of(self, node: Node, arguments: list[Tensor]) -> Tensor:
        self.seen: dict[Node, Any] = {}
        self.run(*arguments)
        value = self.seen[node]
        assert isinstance(value, Tensor)
        return value

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def prepared_of(model: nn.Module, inputs: dict[str, Tensor]) -> GraphModule:
    return dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a16"), inputs, backend="reference")


def seen_by(model: nn.Module, path: str, inputs: dict[str, Tensor], *, given: bool) -> Tensor:
    """What a module of the live model is given, or gives."""
    found: list[Any] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, args, output: found.append(args[0] if given else output))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    value = found[0]
    return value[0] if isinstance(value, tuple) else value


def assert_features(
    model: nn.Module, inputs: dict[str, Tensor], tap: str | None, path: str, ch_axis: int, *, given: bool = False
) -> None:
    prepared = prepared_of(model, inputs)
    node, found_axis = find_feature_node(prepared, tap)
    expected = seen_by(model, path, inputs, given=given)
    actual = Value(prepared).of(node, graph_arguments(prepared, inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert found_axis == ch_axis


@pytest.mark.parametrize(
    ("fixture", "path", "ch_axis"),
    [
        ("tiny_unet2d", "conv_norm_out", 1),
        ("tiny_unet2d_condition", "conv_norm_out", 1),
        ("tiny_dit", "norm_out", 2),
    ],
)
def test_the_last_norm_reads_them(fixture: str, path: str, ch_axis: int, request: pytest.FixtureRequest) -> None:
    model, inputs = request.getfixturevalue(fixture)
    assert_features(model, inputs, None, path, ch_axis, given=True)


@pytest.mark.parametrize(
    ("fixture", "path", "ch_axis"),
    [
        ("tiny_unet2d", "up_blocks.0", 1),
        ("tiny_unet2d", "mid_block.attentions.0", 1),
        ("tiny_unet2d_condition", "up_blocks.1.attentions.0", 1),
        ("tiny_dit", "transformer_blocks.0", 2),
    ],
)
def test_a_named_module_gives_them(fixture: str, path: str, ch_axis: int, request: pytest.FixtureRequest) -> None:
    model, inputs = request.getfixturevalue(fixture)
    assert_features(model, inputs, path, path, ch_axis)


def test_layers_that_are_split_and_observed() -> None:
    model = seeded(Plain)
    inputs = plain_samples(model).example(4)
    prepared = dmq_ao.prepare(model, RECIPE, inputs, backend="reference")
    for tap, path, ch_axis in ((None, "merge", 1), ("tokens", "tokens", 2), ("conv", "conv", 1)):
        node, found_axis = find_feature_node(prepared, tap)
        arguments = graph_arguments(prepared, inputs)
        expected = seen_by(model, path, inputs, given=False)
        torch.testing.assert_close(Value(prepared).of(node, arguments), expected, rtol=1e-4, atol=1e-4)
        assert found_axis == ch_axis


class Ending(nn.Module):
    """A denoiser that ends as it is told to."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.last, self.out = nn.LayerNorm(8), nn.Linear(8, 3), nn.Conv1d(8, 3, 1)
        self.vector = nn.Linear(8, 3)
        self.end = end

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.end(self, self.between(self.first(x)))  # type: ignore[call-arg]


ENDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], int]] = {
    "channels last": (lambda m, h: m.last(m.norm(h.movedim(1, -1))), (2, 4, 4, 8), 3),
    "one axis of pixels": (lambda m, h: m.out(nn.functional.silu(h.flatten(2))), (2, 8, 16), 1),
    "rescaled by itself": (lambda m, h: m.out((h / (1 + h.abs().mean(1, keepdim=True))).flatten(2)), (2, 8, 16), 1),
}


@pytest.mark.parametrize(("end", "shape", "ch_axis"), ENDS.values(), ids=ENDS.keys())
def test_other_ends(end: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], ch_axis: int) -> None:
    model = seeded(lambda: Ending(end))
    inputs = {"x": torch.randn(2, 3, 4, 4), "t": torch.tensor([1, 2])}
    prepared = prepared_of(model, inputs)
    node, found_axis = find_feature_node(prepared, None)
    assert tuple(Value(prepared).of(node, graph_arguments(prepared, inputs)).shape) == shape
    assert found_axis == ch_axis


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (None, r"the denoiser's last block gives no floating tensor .* name a module that does with Relation\(tap="),
        ("vector", "tap 'vector' gives no floating tensor"),
        ("norm", "tap 'norm' gives no floating tensor"),
        ("betwen", r"tap 'betwen' is no module of Ending; close ones are \['between'"),
    ],
)
def test_what_gives_no_features_is_refused(tap: str | None, message: str) -> None:
    model = seeded(lambda: Ending(lambda m, h: m.vector(h.mean((2, 3)))))  # type: ignore[attr-defined]
    prepared = prepared_of(model, {"x": torch.randn(2, 3, 4, 4), "t": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=message):
        find_feature_node(prepared, tap)
