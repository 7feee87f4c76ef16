"""A denoiser of one layer, and recipes for it: what the tests of several backends share."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import CalibrationSet, PowerOfTwo, QuantizedDenoiser, Ranges, Recipe, graph
from dmq_ao.numerics import along
from dmq_ao.recipes import minmax

FLOAT = "float on dequantized values"
TIMESTEPS = torch.tensor([900, 500, 100])
VOTES = PowerOfTwo(layers=("layer",), agreement=0.3)


class Net(nn.Module):
    """One layer, and a timestep that it does not read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(8, 5, 3, stride=2, padding=1), (8, 9, 7)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=2, dilation=2, bias=False), (8, 9)),
    "grouped": (lambda: nn.Conv2d(8, 6, (3, 1), padding=(1, 0), groups=2), (8, 6, 5)),
    "tokens": (lambda: nn.Linear(8, 6), (7, 8)),
    "vectors": (lambda: nn.Linear(8, 6, bias=False), (8,)),
}
RECIPES = {
    "w8a8": minmax("w8a8"),
    "w4a8": minmax("w4a8"),
    "w4a8 votes": minmax("w4a8", power_of_two=VOTES),
    "w8a8 votes": minmax("w8a8", power_of_two=VOTES),
    "w5a8 votes": minmax("w5a8", power_of_two=VOTES),
    "w4a6 per step": minmax("w4a6", ranges=Ranges.PER_STEP),
    "w4a8 votes per step": minmax("w4a8", power_of_two=VOTES, ranges=Ranges.PER_STEP),
    "w4a12": minmax("w4a12"),
    "w8a9 dynamic": minmax("w8a9", ranges=Ranges.DYNAMIC),
    "w4a12 votes per step": minmax("w4a12", power_of_two=VOTES, ranges=Ranges.PER_STEP),
    "w8a10 votes": minmax("w8a10", power_of_two=VOTES),
    "w8a8 dynamic": minmax("w8a8", ranges=Ranges.DYNAMIC),
    "w4a8 votes dynamic": minmax("w4a8", power_of_two=VOTES, ranges=Ranges.DYNAMIC),
}


def everywhere(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe for a model that is one layer, and so both input and output projection."""
    return replace(recipe, config=replace(recipe.config, keep_float=(), **changes))


def example(shape: tuple[int, ...], ch_axis: int = 1, rows: int = 12) -> CalibrationSet:
    """Off-centre rows whose channels fill shares of the range that call for different exponents."""
    x = torch.randn(rows, *shape) + 0.7
    if x.dim() > 2:  # every channel of every row fills its share
        by_channel = x.movedim(ch_axis, 1).flatten(2)
        by_channel[:, :, 0], by_channel[:, :, 1] = -2.0, 4.0
    x = x.clamp(-2, 4) * along(torch.exp2(-(torch.arange(8.0) % 4)), ch_axis, x.dim())
    step = torch.arange(rows) % 3
    return CalibrationSet({"x": x * along(1 + step / 4, 0, x.dim())}, {}, TIMESTEPS[step], step, "t")


_CAPTURE = graph.capture
_captures: dict[str, tuple[nn.Module, GraphModule]] = {}


def _capture(net: nn.Module, inputs: Any, timestep_arg: str | None = None) -> GraphModule:
    """The graph of a net as of the first of its kind: a layer's ``repr`` is all of it but its numbers."""
    likeness = [(x.shape, x.dtype) for x in (*inputs.values(), *net.parameters())]
    kind = f"{net} {likeness} {timestep_arg}"
    if kind not in _captures:
        _captures[kind] = net, _CAPTURE(net, inputs, timestep_arg)
    first, captured = _captures[kind]
    own = dict(net.named_parameters())
    return copy.deepcopy(captured, {id(tensor): own[name] for name, tensor in first.named_parameters()})


def calibrated(layer: nn.Module, recipe: Recipe, samples: CalibrationSet, backend: str = "onednn") -> GraphModule:
    with mock.patch.object(graph, "capture", _capture):
        prepared = dmq_ao.prepare(Net(layer).eval(), everywhere(recipe), samples.example(), backend=backend)
    dmq_ao.calibrate(prepared, samples, progress=False)
    return prepared


def run(quantized: QuantizedDenoiser, x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = quantized(x=x, t=t)
    return output


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return float((actual - expected).abs().max() / expected.abs().max())
