"""Search a width for every output channel: what a bit saves, against what it costs (MPQ-DM, arXiv 2412.11549, OMQ).

Inputs are measured on some samples of the float network, scaled in closed form as learned scaling starts; then every
output channel's error is known at each width, on the final grid. Over the whole model a layer's errors count by what
rounding that layer alone does to the denoiser's output.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.allocation import error_curves, exchange, kurtosis, swap
from dmq_ao.annotate import PLAN, RECIPE, SCALED, float_weight, observers
from dmq_ao.bit_plan import BitPlan, InputBits, LayerBits
from dmq_ao.calibration import CalibrationSet
from dmq_ao.calibration.samples import spread_over_steps
from dmq_ao.config import MAX_BITS, BitAllocation, ChannelScaling, Granularity, Recipe, Scope, Scorer, TensorConfig
from dmq_ao.layer import LayerPlan, overhead_bits, shift_fits_int8
from dmq_ao.learn import input_peak
from dmq_ao.moments import geometry
from dmq_ao.observers import ActivationObserver, MinMax, WeightObserver, quantize_weight
from dmq_ao.observers.channel_scale import closed_form, spread
from dmq_ao.sensitivity import Perturbed
from dmq_ao.state import load_state, save_state

# What a layer does to the output is asked at a width whose error is small enough to add up with others'.
PROBE_BITS = 4
PROBE_SAMPLES = 4
# A channel's error is summed over so many of its weights, drawn at random, and extrapolated.
SEEN_WEIGHTS = 1024
FLOAT_SHARE = 0.05


def search_bits(
    prepared: GraphModule,
    samples: CalibrationSet,
    *,
    mean_bits: float | None = None,
    max_bytes: int | None = None,
    allocation: BitAllocation | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> BitPlan:
    """A width for each output channel of every quantized layer, to look at, edit, save and pass to ``calibrate``.

    Args:
        prepared: from ``dmq_ao.prepare``.
        samples: from ``dmq_ao.record``.
        mean_bits: budget: mean width of the codes of all quantized weights; the recipe's own width by default.
        max_bytes: budget instead: codes, scales and all that stays in float, as a file of this model will hold them.
        allocation: how; ``BitAllocation()``, or that of the recipe, by default.
        batch_size: rows per forward pass.
        progress: show a progress bar.

    Raises:
        TypeError: when ``prepared`` is not prepared.
        ValueError: for two budgets, one that cannot be met, or non-finite weights or inputs, naming the layer.

    Warns:
        UserWarning: naming the layers, when more than 5 % of the weights stay in float.
    """
    if not isinstance(prepared, GraphModule) or PLAN not in prepared.meta:
        raise TypeError(f"search_bits takes what dmq_ao.prepare returned, got {type(prepared).__name__}")
    if mean_bits is not None and max_bytes is not None:
        raise ValueError(f"give mean_bits or max_bytes, not both; got {mean_bits} and {max_bytes}")
    recipe: Recipe = prepared.meta[RECIPE]
    chosen = allocation or recipe.allocation or BitAllocation()
    if mean_bits is not None or max_bytes is not None:
        chosen = replace(chosen, mean_bits=mean_bits)
    budget = None if max_bytes is None else 8 * max_bytes - other_bits(prepared, len(samples.timesteps))
    with tqdm(total=len(observers(prepared)), disable=not progress, unit="layer", desc="bits") as bar:
        plan = find_bits(prepared, samples, chosen, batch_size=batch_size, bar=bar, budget=budget)
    _warn_of_float(prepared)
    return plan


def apply_bits(prepared: GraphModule, plan: BitPlan) -> None:
    """Give the weights of a prepared denoiser the widths of a plan.

    Raises:
        ValueError: for a layer that is not quantized, of another size, or whose codes do not fit its kernel then.
    """
    watchers, layers = observers(prepared), prepared.meta[PLAN]
    for name, one in plan.layers.items():
        if name not in watchers:
            raise ValueError(f"the plan has bits for {name!r}, which is no quantized layer; they are {list(watchers)}")
        observer = watchers[name][0]
        weight = float_weight(prepared, graph.layer_nodes(prepared)[name])
        if (len(weight), weight[0].numel()) != (len(one.bits), one.weights):
            raise ValueError(
                f"{name} has {len(weight)} output channels of {weight[0].numel()} weights, the plan gives bits for"
                f" {len(one.bits)} of {one.weights}; search again on this model"
            )
        most = widest(layers[name], observer.config)
        if max(one.bits) > most:
            raise ValueError(
                f"{name}: the plan gives a channel {max(one.bits)} bits, and its codes, centred and shifted by the"
                f" power-of-two factors, fit int8 with {most}; lower them, or take the layer out of power_of_two"
            )
        observer.channel_bits = one.tensor()
    given: dict[int, tuple[str, int]] = {}
    for name, wanted in plan.inputs.items():
        activation = watchers[name][1] if name in watchers else None
        if activation is None:
            raise ValueError(f"the plan has bits for the input of {name!r}, which is not quantized")
        other, bits = given.setdefault(id(activation), (name, wanted.bits))
        if bits != wanted.bits:
            raise ValueError(
                f"{other} and {name} read the same input, and the plan gives it {bits} and {wanted.bits} bits; make"
                " them one"
            )
        activation.config = replace(activation.config, bits=bits)


def widest(item: LayerPlan, config: TensorConfig) -> int:
    """Most bits of a layer's codes that still fit int8 after centring and the largest shift that may be voted."""
    shift = 0 if item.power_of_two is None else item.power_of_two.max_exponent
    return max(bits for bits in range(1, 9) if bits == 1 or shift_fits_int8(bits, config.symmetric, shift))


@dataclass(frozen=True, eq=False)
class _Weights:
    """What the search looks at of one layer.

    Attributes:
        curves: [out, candidates] of ``error_curves``.
        scores: [out] kurtosis.
        candidates: widths, ascending.
        cost: weights of an output channel.
        nominal: the recipe's width.
        share: by which its errors count in the whole.
    """

    curves: Tensor
    scores: Tensor
    candidates: tuple[int, ...]
    cost: int
    nominal: int
    share: float


def find_bits(
    prepared: GraphModule,
    samples: CalibrationSet,
    allocation: BitAllocation,
    *,
    batch_size: int,
    bar: tqdm[Any],
    budget: int | None = None,
    state_dir: Path | None = None,
    digest: str = "",
) -> BitPlan:
    """As ``search_bits`` without its checks of arguments.

    Args:
        prepared: the graph.
        samples: to measure inputs on.
        allocation: how, and the mean bits.
        batch_size: rows per forward pass.
        bar: one tick a layer.
        budget: bits for all codes, instead of the mean.
        state_dir: where the plan is saved; None for nowhere.
        digest: of everything it depends on.
    """
    file = None if state_dir is None else state_dir / "bits.safetensors"
    saved = load_state(file, digest, "the bits of a calibration")
    if saved is not None:
        return BitPlan.from_dict(saved[0])
    probe = _probe(prepared, samples) if allocation.scope is Scope.MODEL else None
    layers, fixed = _measure(prepared, samples, allocation, probe, batch_size, bar)
    found = _share_out(layers, fixed, allocation, budget)
    plan = BitPlan(
        {name: LayerBits(layers[name].cost, tuple(widths.tolist())) for name, widths in found.items()},
        allocation.scorer.value,
        {} if probe is None or not allocation.inputs else _input_bits(prepared, probe),
    )
    if file is not None:
        save_state(file, digest, plan.to_dict(), {})
    return plan


def _share_out(
    layers: dict[str, _Weights], fixed: dict[str, tuple[int, int]], allocation: BitAllocation, budget: int | None
) -> dict[str, Tensor]:
    """Widths [out] of each layer; ``fixed`` holds weights and width of the layers that keep theirs."""
    if allocation.scorer is Scorer.KURTOSIS:
        return {name: _swapped(one, allocation.groups) for name, one in layers.items()}
    if allocation.scope is Scope.LAYER and budget is None:
        alone = {name: _budget({name: one}, {}, allocation) for name, one in layers.items()}
        return {
            name: exchange([one.curves], [one.cost], [one.candidates], alone[name])[0] for name, one in layers.items()
        }
    spent = sum(count * bits for count, bits in fixed.values())
    total = _budget(layers, fixed, allocation) if budget is None else budget
    least = sum(one.cost * len(one.curves) * one.candidates[0] for one in layers.values())
    if spent + least > total:
        raise ValueError(
            f"layers that keep their own width take {spent} of the budget's {total} bits, and the smallest widths of"
            f" the others {least}; ask for more, or override the widths of {list(fixed)}"
        )
    if not layers:
        return {}
    given = list(layers.values())
    found = exchange(
        [one.curves * one.share for one in given],
        [one.cost for one in given],
        [one.candidates for one in given],
        total - spent,
    )
    return dict(zip(layers, found, strict=True))


def _budget(layers: dict[str, _Weights], fixed: dict[str, tuple[int, int]], allocation: BitAllocation) -> int:
    """Bits for the codes of all layers."""
    kept = {name: (one.cost * len(one.curves), one.nominal) for name, one in layers.items()} | fixed
    if allocation.mean_bits is None:
        return sum(count * bits for count, bits in kept.values())
    return int(allocation.mean_bits * sum(count for count, _ in kept.values()))


def _swapped(one: _Weights, groups: int) -> Tensor:
    """Bits moved from light tails to heavy ones; none where a neighbouring width is no candidate."""
    nominal, size = one.nominal, len(one.curves) // 10
    may = {nominal - 1, nominal, nominal + 1} <= set(one.candidates)
    sizes = [size * count for count in range(groups + 1)] if may else [0]
    return swap(one.scores, one.curves, nominal, one.candidates, sizes)


def _measure(
    prepared: GraphModule,
    samples: CalibrationSet,
    allocation: BitAllocation,
    probe: Perturbed | None,
    batch_size: int,
    bar: tqdm[Any],
) -> tuple[dict[str, _Weights], dict[str, tuple[int, int]]]:
    """Curves and scores of the layers that are searched, weights and width of the others."""
    watchers, nodes, plan = observers(prepared), graph.layer_nodes(prepared), prepared.meta[PLAN]
    inputs = _inputs(prepared, samples.select(spread_over_steps(samples, allocation.samples)), batch_size)
    scales = _closed_forms(prepared, inputs)
    layers: dict[str, _Weights] = {}
    fixed: dict[str, tuple[int, int]] = {}
    for place, (name, (observer, _)) in enumerate(watchers.items()):
        bar.set_postfix(layer=name)
        bar.update(1)
        weight, node = float_weight(prepared, nodes[name]).float(), nodes[name]
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}: its weight holds NaN or infinity; check the float checkpoint")
        candidates = _candidates(allocation, plan[name], observer.config)
        if not candidates:
            fixed[name] = (weight.numel(), observer.config.bits)
            continue
        groups, taps = geometry(node, weight).groups, weight[0, 0].numel()
        scaled = (weight.flatten(1) * spread(scales[name], len(weight), taps, groups)).reshape(weight.shape)
        importance = spread(inputs[name].squares / scales[name].square(), len(weight), taps, groups)
        curves = _curves(scaled, importance, observer, candidates, place)
        share = 1.0 if probe is None else _share(probe, node, weight, inputs[name].squares, groups)
        layers[name] = _Weights(
            curves, kurtosis(scaled.flatten(1)), candidates, weight[0].numel(), observer.config.bits, share
        )
    return layers, fixed


def _candidates(allocation: BitAllocation, item: LayerPlan, config: TensorConfig) -> tuple[int, ...]:
    """Widths that a layer may have; none for a layer that keeps its own, wider than all or one scale for all."""
    if config.granularity is Granularity.PER_TENSOR:
        return ()
    if allocation.scorer is Scorer.KURTOSIS:
        wanted: Sequence[int] = range(max(1, config.bits - 1), config.bits + 2)
    else:
        wanted = allocation.candidates if config.bits <= allocation.candidates[-1] else ()
    return tuple(bits for bits in wanted if bits <= widest(item, config))


def _curves(
    weight: Tensor, importance: Tensor, observer: WeightObserver, candidates: Sequence[int], seed: int
) -> Tensor:
    """``error_curves`` on some weights of each channel, as if on all."""
    count = weight[0].numel()
    if count <= SEEN_WEIGHTS or observer.config.group_size is not None:
        return error_curves(weight, importance, observer.config, observer.estimator, candidates)
    seen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SEEN_WEIGHTS].sort().values
    some = (weight.flatten(1)[:, seen], importance[:, seen])
    return error_curves(*some, observer.config, observer.estimator, candidates) * (count / SEEN_WEIGHTS)


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
        self.rows = 0

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        if n in self.names:
            args, _ = self.fetch_args_kwargs_from_env(n)
            name, x = self.names[n], args[0].float()
            flat = x.movedim(-1 if n.target == graph.LINEAR else 1, 0).flatten(1)
            peak, squares = flat.abs().amax(1), flat.square().mean(1) * len(x)
            if name in self.found:
                before = self.found[name]
                peak, squares = torch.maximum(peak, before.peak), squares + before.squares
            self.found[name] = _Input(peak, squares)
        return super().run_node(n)


def _inputs(prepared: GraphModule, samples: CalibrationSet, batch_size: int) -> dict[str, _Input]:
    run = _InputStatistics(prepared)
    with torch.no_grad():
        for inputs in samples.batches(batch_size):
            run.run(*graph.graph_arguments(prepared, inputs))
    for name, one in run.found.items():
        if not bool(torch.isfinite(one.squares).all()):
            raise ValueError(f"{name}: its input holds NaN or infinity on these samples; check the float denoiser")
    return {name: _Input(one.peak, one.squares / len(samples)) for name, one in run.found.items()}


def _closed_forms(prepared: GraphModule, inputs: Mapping[str, _Input]) -> dict[str, Tensor]:
    """The channel scales [C] that learning starts from; ones for layers without. Readers of one input share theirs."""
    recipe: Recipe = prepared.meta[RECIPE]
    config, nodes = recipe.scaling or ChannelScaling(), graph.layer_nodes(prepared)
    scales: dict[str, Tensor] = {}
    for activation, names in _readers(prepared):
        scaled = recipe.scaling is not None and activation is not None and names[0] in prepared.meta[SCALED]
        peaks = [_input_peak(float_weight(prepared, nodes[name]).float(), nodes[name]) for name in names]
        peak = inputs[names[0]].peak
        form = closed_form(peak, torch.stack(peaks).amax(0), config.migration, config.limit)
        scales |= {name: form if scaled else torch.ones_like(peak) for name in names}
    return scales


def _input_peak(weight: Tensor, node: Node) -> Tensor:
    return input_peak(weight, geometry(node, weight).groups)


def _readers(prepared: GraphModule) -> list[tuple[ActivationObserver | None, list[str]]]:
    """Each quantized input with the layers that read it; layers of float inputs one by one."""
    families: dict[int | str, tuple[ActivationObserver | None, list[str]]] = {}
    for name, (_, activation) in observers(prepared).items():
        key = name if activation is None else id(activation)
        families.setdefault(key, (activation, []))[1].append(name)
    return list(families.values())


def _input_bits(prepared: GraphModule, probe: Perturbed) -> dict[str, InputBits]:
    """Bits of every input narrower than a byte: where they save most of what rounding it alone does to the output.

    A bit more quarters an input's squared error. It costs one bit-operation for each multiply-accumulate and bit of
    weight; weights aside, the multiply-accumulates are the cost.
    """
    nodes = graph.layer_nodes(prepared)
    families: list[dict[str, int]] = []
    curves, costs, options, budget = [], [], [], 0
    for activation, names in _readers(prepared):
        if activation is None or activation.config.bits >= MAX_BITS:
            continue
        nominal = activation.config.bits
        error = sum(probe.error(nodes[name], None, nominal) ** 2 for name in names)
        widths = range(max(2, nominal - 2), MAX_BITS + 1)
        rows = {name: probe.values[nodes[name]][0].numel() for name in names}
        families.append({n: count * float_weight(prepared, nodes[n])[0].numel() for n, count in rows.items()})
        curves.append(torch.tensor([[error * 4.0 ** (nominal - bits) for bits in widths]], dtype=torch.float64))
        costs.append(sum(families[-1].values()))
        options.append(tuple(widths))
        budget += nominal * costs[-1]
    if not families:
        return {}
    found = exchange(curves, costs, options, budget)
    return {
        name: InputBits(products, int(bits))
        for readers, bits in zip(families, found, strict=True)
        for name, products in readers.items()
    }


def _probe(prepared: GraphModule, samples: CalibrationSet) -> Perturbed:
    some = samples.select(spread_over_steps(samples, PROBE_SAMPLES))
    return Perturbed(prepared, graph.graph_arguments(prepared, next(iter(some.batches(PROBE_SAMPLES)))))


def _share(probe: Perturbed, node: Node, weight: Tensor, squares: Tensor, groups: int) -> float:
    """Squared error of the denoiser's output for each unit of a layer's weighted squared error."""
    config = TensorConfig(PROBE_BITS, Granularity.PER_CHANNEL)
    rounded = quantize_weight(weight, config, MinMax).dequantize()
    importance = spread(squares, len(weight), weight[0, 0].numel(), groups)
    own = float(((rounded - weight).flatten(1).square() * importance).sum())
    return probe.error(node, rounded, None) ** 2 / own if own > 0 else 0.0


def other_bits(prepared: GraphModule, steps: int) -> int:
    """Bits of a file that are not codes: floats, scales, zero points, widths and what inputs need, at most.

    Args:
        prepared: from ``dmq_ao.prepare``.
        steps: rows of ranges per timestep.
    """
    recipe: Recipe = prepared.meta[RECIPE]
    nodes, plan = graph.layer_nodes(prepared), prepared.meta[PLAN]
    weights = {name: float_weight(prepared, nodes[name]) for name in observers(prepared)}
    stored = 8 * sum(int(tensor.nbytes) for tensor in prepared.state_dict().values())
    stored -= 8 * sum(weight.nbytes for weight in weights.values())
    for name, weight in weights.items():
        stored += overhead_bits(plan[name], tuple(weight.shape), steps, recipe) + 8 * len(weight)
    return stored


def _warn_of_float(prepared: GraphModule) -> None:
    plan: dict[str, LayerPlan] = prepared.meta[PLAN]
    kept = {item.name: item.numel for item in plan.values() if item.weight is None and item.numel}
    share = sum(kept.values()) / max(1, sum(item.numel for item in plan.values()))
    if share > FLOAT_SHARE:
        names = sorted(kept, key=kept.__getitem__, reverse=True)
        warnings.warn(
            f"{share:.0%} of the weights stay in float, so the mean of all is far above that of the codes: "
            + ", ".join(names),
            UserWarning,
            stacklevel=3,
        )
