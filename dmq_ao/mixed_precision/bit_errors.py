"""What each width of an output channel, or of an input, costs in error: the curves that the search for bits trades on.

Inputs are measured on some samples of the float network, scaled in closed form as learned scaling starts; then every
output channel's error is known at each width, on the final grid. Over the whole model a layer's errors count by what
rounding that layer alone does to the denoiser's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.config import MAX_BITS, BitAllocation, ChannelScaling, Granularity, Scorer, TensorConfig
from dmq_ao.graph.geometry import geometry
from dmq_ao.mixed_precision.allocation import error_curves, kurtosis
from dmq_ao.mixed_precision.probe import Perturbed
from dmq_ao.numerics import input_peak
from dmq_ao.observers import MinMax, WeightObserver, quantize_weight
from dmq_ao.observers.channel_scale import closed_form, spread
from dmq_ao.quantizer.prepared import float_weight, observers, readers, state_of
from dmq_ao.records import LayerPlan, widest_that_fits
from dmq_ao.samples import CalibrationSet
from dmq_ao.samples.graph_samples import GraphSamples

# What a layer does to the output is asked at a width whose error is small enough to add up with others'.
PROBE_BITS = 4
PROBE_SAMPLES = 4
# A channel's error is summed over so many of its weights, drawn at random, and extrapolated.
SEEN_WEIGHTS = 1024


@dataclass(frozen=True, eq=False)
class WeightErrors:
    """What each width costs in error, of the weights of one layer.

    Attributes:
        curves: [out, candidates] of ``error_curves``.
        scores: [out] kurtosis.
        candidates: widths, ascending.
        cost: weights of an output channel.
        nominal: the recipe's width.
        share: by which its errors count in the whole.
        scale: [C] closed form that the curves are of.
    """

    curves: Tensor
    scores: Tensor
    candidates: tuple[int, ...]
    cost: int
    nominal: int
    share: float
    scale: Tensor


def weight_errors(
    prepared: GraphModule,
    samples: CalibrationSet,
    allocation: BitAllocation,
    probe: Perturbed | None,
    batch_size: int,
    bar: tqdm[Any],
) -> tuple[dict[str, WeightErrors], dict[str, tuple[int, int]]]:
    """Curves and scores of the layers that are searched, weights and width of the others.

    Args:
        prepared: the graph.
        samples: to measure inputs on.
        allocation: candidates, and the number of samples.
        probe: tells how much each layer's errors count in the whole; None when every layer is by itself.
        batch_size: rows per forward pass.
        bar: one tick a layer.

    Raises:
        ValueError: for non-finite weights or inputs, naming the layer.
    """
    watchers, nodes, plan = observers(prepared), graph.layer_nodes(prepared), state_of(prepared).plan
    inputs = _inputs(prepared, GraphSamples.of(prepared, samples).spread(allocation.samples), batch_size)
    scales = _closed_forms(prepared, inputs)
    layers: dict[str, WeightErrors] = {}
    fixed: dict[str, tuple[int, int]] = {}
    for place, (name, (observer, _)) in enumerate(watchers.items()):
        bar.set_postfix(layer=name)
        bar.update(1)
        weight, node = float_weight(prepared, nodes[name]).float(), nodes[name]
        observer.check(weight)
        candidates = _candidates(allocation, plan[name], observer.config)
        if not candidates:
            fixed[name] = (weight.numel(), observer.config.bits)
            continue
        scaled = weight * _factors(scales[name], node, weight)
        importance = _factors(inputs[name].squares / scales[name].square(), node, weight).flatten(1)
        curves = _curves(scaled, importance, observer, candidates, place)
        share = 1.0 if probe is None else _share(probe, node, weight, inputs[name].squares)
        layers[name] = WeightErrors(
            curves,
            kurtosis(scaled.flatten(1)),
            candidates,
            weight[0].numel(),
            observer.config.bits,
            share,
            scales[name],
        )
    return layers, fixed


def _factors(channels: Tensor, node: Node, weight: Tensor) -> Tensor:
    """A number per input channel [C] in the shape of a layer's weight."""
    return spread(channels, len(weight), weight[0, 0].numel(), geometry(node, weight).groups).reshape(weight.shape)


def error_of_rounded_weights(
    prepared: GraphModule, probe: Perturbed, layers: Mapping[str, WeightErrors], widths: Mapping[str, Tensor] | None
) -> float:
    """Relative error of the denoiser's output when the weights of all ``layers`` are rounded to nearest at once.

    Args:
        prepared: the graph.
        probe: of it.
        layers: of ``weight_errors``.
        widths: [out] of each layer; the recipe's own where None.
    """
    nodes, changed = graph.layer_nodes(prepared), {}
    for name, (observer, _) in observers(prepared).items():
        if name in layers:
            weight = float_weight(prepared, nodes[name]).float()
            factors = _factors(layers[name].scale, nodes[name], weight)
            bits = None if widths is None else widths[name].to(torch.uint8)
            rounded = quantize_weight(weight * factors, observer.config, observer.estimator, bits).dequantize()
            changed[nodes[name]] = (rounded / factors, None)
    return probe.error_of(changed)


def error_of_rounded_inputs(prepared: GraphModule, probe: Perturbed, widths: Mapping[str, int]) -> float:
    """The same with the inputs of layers rounded, to so many bits."""
    nodes = graph.layer_nodes(prepared)
    return probe.error_of({nodes[name]: (None, bits) for name, bits in widths.items()})


def _candidates(allocation: BitAllocation, item: LayerPlan, config: TensorConfig) -> tuple[int, ...]:
    """Widths that a layer may have; none for a layer that keeps its own, wider than all or one scale for all."""
    if config.granularity is Granularity.PER_TENSOR:
        return ()
    if allocation.scorer is Scorer.KURTOSIS:
        widths: Sequence[int] = range(max(1, config.bits - 1), config.bits + 2)
    else:
        widths = () if allocation.leaves(config.bits) else allocation.candidates
    return tuple(bits for bits in widths if bits <= widest_that_fits(item, config))


def _curves(
    weight: Tensor, importance: Tensor, observer: WeightObserver, candidates: Sequence[int], seed: int
) -> Tensor:
    """``error_curves`` on some weights of each channel, as if on all."""
    count = weight[0].numel()
    if count <= SEEN_WEIGHTS or observer.config.group_size is not None:
        return error_curves(weight, importance, observer.config, observer.estimator, candidates)
    places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SEEN_WEIGHTS].sort().values
    parts = (weight.flatten(1)[:, places], importance[:, places])
    return error_curves(*parts, observer.config, observer.estimator, candidates) * (count / SEEN_WEIGHTS)


@dataclass(frozen=True, eq=False)
class _Input:
    """Largest absolute value and mean square [C] of a layer's input channels."""

    peak: Tensor
    squares: Tensor


class _InputStatistics(Interpreter):
    """Runs the float graph and looks at every quantized layer's input."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        names = observers(prepared)
        self.names = {node: name for name, node in graph.layer_nodes(prepared).items() if name in names}
        self.found: dict[str, _Input] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        if n in self.names:
            args, _ = self.fetch_args_kwargs_from_env(n)
            name, x = self.names[n], args[0].float()
            rows = x if x.dim() > 1 else x[None]
            flat = rows.movedim(-1 if n.target == graph.LINEAR else 1, 0).flatten(1)
            peak, squares = flat.abs().amax(1), flat.square().mean(1) * len(rows)
            if name in self.found:
                before = self.found[name]
                peak, squares = torch.maximum(peak, before.peak), squares + before.squares
            self.found[name] = _Input(peak, squares)
        return super().run_node(n)


def _inputs(prepared: GraphModule, samples: GraphSamples, batch_size: int) -> dict[str, _Input]:
    run = _InputStatistics(prepared)
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            run.run(*batch.arguments)
    for name, one in run.found.items():
        if not bool(torch.isfinite(one.squares).all()):
            raise ValueError(f"{name}: its input holds NaN or infinity on these samples; check the float denoiser")
    return {name: _Input(one.peak, one.squares / len(samples)) for name, one in run.found.items()}


def _closed_forms(prepared: GraphModule, inputs: Mapping[str, _Input]) -> dict[str, Tensor]:
    """The channel scales [C] that learning starts from; ones for layers without. Readers of one input share theirs."""
    recipe, scaled_layers = state_of(prepared).recipe, state_of(prepared).scaled
    config, nodes = recipe.scaling or ChannelScaling(), graph.layer_nodes(prepared)
    scales: dict[str, Tensor] = {}
    for activation, names in readers(prepared):
        scaled = recipe.scaling is not None and activation is not None and names[0] in scaled_layers
        peaks = [_input_peak(prepared, nodes[name]) for name in names]
        peak = inputs[names[0]].peak
        form = closed_form(peak, torch.stack(peaks).amax(0), config.migration, config.limit)
        scales |= {name: form if scaled else torch.ones_like(peak) for name in names}
    return scales


def _input_peak(prepared: GraphModule, node: Node) -> Tensor:
    weight = float_weight(prepared, node).float()
    return input_peak(weight, geometry(node, weight).groups)


@dataclass(frozen=True, eq=False)
class InputErrors:
    """What each width costs in error, of an input that is narrower than a byte.

    Attributes:
        curve: [1, candidates], squared error of the denoiser's output when this input alone is rounded.
        candidates: widths, ascending.
        nominal: the recipe's width.
        products: multiply-accumulates of each layer that reads it, by name.
    """

    curve: Tensor
    candidates: tuple[int, ...]
    nominal: int
    products: dict[str, int]


def input_errors(prepared: GraphModule, probe: Perturbed) -> list[InputErrors]:
    """The inputs that are narrower than a byte, each rounded alone, for all that read it, at every width."""
    nodes = graph.layer_nodes(prepared)
    errors = []
    for activation, names in readers(prepared):
        if activation is None or activation.config.bits >= MAX_BITS:
            continue
        nominal = activation.config.bits
        widths = tuple(range(max(2, nominal - 2), MAX_BITS + 1))
        squares = [probe.error_of({nodes[name]: (None, bits) for name in names}) ** 2 for bits in widths]
        # Errors of two layers may cancel by luck at a narrow width: a wider one is never counted as worse.
        curve = torch.tensor([squares], dtype=torch.float64).cummin(1).values
        products = {name: probe.products(nodes[name]) for name in names}
        errors.append(InputErrors(curve, widths, nominal, products))
    return errors


def probe_of(prepared: GraphModule, samples: CalibrationSet) -> Perturbed:
    """The float graph on a few samples, to round one layer at a time in."""
    return Perturbed(prepared, GraphSamples.of(prepared, samples).spread(PROBE_SAMPLES).whole().arguments)


def _share(probe: Perturbed, node: Node, weight: Tensor, squares: Tensor) -> float:
    """Squared error of the denoiser's output for each unit of a layer's weighted squared error."""
    config = TensorConfig(PROBE_BITS, Granularity.PER_CHANNEL)
    rounded = quantize_weight(weight, config, MinMax).dequantize()
    own = float(((rounded - weight).square() * _factors(squares, node, weight)).sum())
    return probe.error(node, rounded, None) ** 2 / own if own > 0 else 0.0
