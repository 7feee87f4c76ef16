"""Search a width for every output channel: what a bit saves, against what it costs (MPQ-DM, arXiv 2412.11549, OMQ).

What widths cost is measured in ``bit_errors``; here it is shared out under a budget, and put into a prepared denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.config import BitAllocation, Scope, Scorer
from dmq_ao.mixed_precision.allocation import exchange, swap
from dmq_ao.mixed_precision.bit_errors import (
    WeightErrors,
    error_of_rounded_inputs,
    error_of_rounded_weights,
    input_errors,
    probe_of,
    weight_errors,
)
from dmq_ao.mixed_precision.bit_plan import BitPlan, InputBits, LayerBits
from dmq_ao.mixed_precision.probe import Perturbed
from dmq_ao.observers import ActivationObserver, WeightObserver
from dmq_ao.quantizer.prepared import (
    change_plan,
    float_weight,
    observers,
    readers,
    state_of,
)
from dmq_ao.records import widest_that_fits
from dmq_ao.samples import CalibrationSet
from dmq_ao.serialization.checkpoint import Checkpoint

Watchers = Mapping[str, tuple[WeightObserver, ActivationObserver | None]]
Budget = Callable[[Mapping[str, Tensor]], int]
"""Bits for the codes of all layers, in a file where output channels have these widths [out] by layer."""

# Widths change what a file takes beside the codes, by little: so often a budget is asked again.
BUDGET_ROUNDS = 8


def apply_bits(prepared: GraphModule, plan: BitPlan) -> None:
    """Give the layers of a prepared denoiser the widths of a plan: output channels of weights, and inputs.

    Raises:
        ValueError: for a layer that is not quantized, of another size, or whose codes do not fit its kernel then.
    """
    watchers = observers(prepared)
    _check_weights(prepared, plan, watchers)
    _check_inputs(plan, watchers)
    for name, one in plan.layers.items():
        watchers[name][0].channel_bits = one.tensor()
    layers = dict(state_of(prepared).plan)
    for _, names in readers(prepared):
        widths = [plan.inputs[name].bits for name in names if name in plan.inputs]
        for name in names if widths else ():
            activation = layers[name].activation
            assert activation is not None
            layers[name] = replace(layers[name], activation=replace(activation, bits=widths[0]))
    change_plan(prepared, layers)


def _check_weights(prepared: GraphModule, plan: BitPlan, watchers: Watchers) -> None:
    nodes, layers = graph.layer_nodes(prepared), state_of(prepared).plan
    for name, one in plan.layers.items():
        if name not in watchers:
            raise ValueError(f"the plan has bits for {name!r}, which is no quantized layer; they are {list(watchers)}")
        weight = float_weight(prepared, nodes[name])
        if (len(weight), weight[0].numel()) != (len(one.bits), one.weights):
            raise ValueError(
                f"{name} has {len(weight)} output channels of {weight[0].numel()} weights, the plan gives bits for"
                f" {len(one.bits)} of {one.weights}; search again on this model"
            )
        most = widest_that_fits(layers[name], watchers[name][0].config)
        if max(one.bits) > most:
            raise ValueError(
                f"{name}: the plan gives a channel {max(one.bits)} bits, and its codes, centred and shifted by the"
                f" power-of-two factors, fit int8 with {most}; lower them, or take the layer out of power_of_two"
            )


def _check_inputs(plan: BitPlan, watchers: Watchers) -> None:
    first_bits: dict[int, tuple[str, int]] = {}
    for name, own in plan.inputs.items():
        activation = watchers[name][1] if name in watchers else None
        if activation is None:
            raise ValueError(f"the plan has bits for the input of {name!r}, which is not quantized")
        other, bits = first_bits.setdefault(id(activation), (name, own.bits))
        if bits != own.bits:
            raise ValueError(
                f"{other} and {name} read the same input, and the plan gives it {bits} and {own.bits} bits; make"
                " them one"
            )


def find_bits(
    prepared: GraphModule,
    samples: CalibrationSet,
    allocation: BitAllocation,
    *,
    batch_size: int,
    bar: tqdm[Any],
    budget: Budget | None = None,
    checkpoint: Checkpoint | None = None,
) -> BitPlan:
    """As ``dmq_ao.search_bits`` without its checks of arguments.

    Args:
        prepared: the graph.
        samples: to measure inputs on.
        allocation: how, and the mean bits.
        batch_size: rows per forward pass.
        bar: one tick a layer.
        budget: bits for all codes by the widths of the channels, instead of the mean.
        checkpoint: where the plan is saved; None for nowhere.

    Raises:
        ValueError: for a budget that cannot be met, or non-finite weights or inputs, naming the layer; for the
            checkpoint of another run.
        InvalidFile: for a damaged checkpoint.
    """
    saved = None if checkpoint is None else checkpoint.load("bits", "the bits of a calibration")
    if saved is not None:
        return BitPlan.from_dict(saved[0])
    probe = probe_of(prepared, samples) if allocation.scope is Scope.MODEL else None
    layers, fixed = weight_errors(prepared, samples, allocation, probe, batch_size, bar)
    widths, inputs = dict[str, Tensor](), dict[str, InputBits]()
    if budget is None:
        widths = _share_out(layers, fixed, allocation, None)
    else:
        widths = _share_out_within(layers, fixed, allocation, budget)
    if probe is not None:
        own_mean = budget is None and allocation.mean_bits is None
        if own_mean and not _weights_gain(prepared, probe, layers, widths, allocation.least_gain):
            widths = {}
        if allocation.inputs:
            inputs = _inputs_that_gain(prepared, probe, allocation.least_gain)
    plan = BitPlan(
        {name: LayerBits(layers[name].cost, tuple(bits.tolist())) for name, bits in widths.items()},
        allocation.scorer.value,
        inputs,
    )
    if checkpoint is not None:
        checkpoint.save("bits", plan.to_dict(), {})
    return plan


def _share_out_within(
    layers: dict[str, WeightErrors], fixed: dict[str, tuple[int, int]], allocation: BitAllocation, budget: Budget
) -> dict[str, Tensor]:
    """Widths [out] of each layer whose codes, and all that a file of theirs needs beside them, keep to a budget."""
    if allocation.scorer is Scorer.KURTOSIS:
        raise ValueError("kurtosis moves bits inside each layer and keeps to no budget of bytes; use another scorer")
    nominal = {name: torch.full((len(one.curves),), one.candidates[0]) for name, one in layers.items()}
    limit = budget(nominal)
    for _ in range(BUDGET_ROUNDS):
        widths = _share_out(layers, fixed, allocation, limit)
        spare = budget(widths) - _code_bits(layers, fixed, widths)
        if spare >= 0:
            return widths
        limit += spare
    raise ValueError(
        f"no widths keep to the budget after {BUDGET_ROUNDS} rounds, {-spare} bits are missing; ask for more"
    )


def _code_bits(
    layers: dict[str, WeightErrors], fixed: dict[str, tuple[int, int]], widths: Mapping[str, Tensor]
) -> int:
    shared = sum(one.cost * int(widths[name].sum()) for name, one in layers.items())
    return shared + sum(count * bits for count, bits in fixed.values())


def _share_out(
    layers: dict[str, WeightErrors], fixed: dict[str, tuple[int, int]], allocation: BitAllocation, budget: int | None
) -> dict[str, Tensor]:
    """Widths [out] of each layer; ``fixed`` holds weights and width of the layers that keep theirs."""
    if allocation.scorer is Scorer.KURTOSIS:
        return {name: _swapped(one, allocation.groups) for name, one in layers.items()}
    if allocation.scope is Scope.LAYER and budget is None:
        alone = {name: _budget({name: one}, allocation) for name, one in layers.items()}
        return {
            name: exchange([one.curves], [one.cost], [one.candidates], alone[name])[0] for name, one in layers.items()
        }
    spent = sum(count * bits for count, bits in fixed.values())
    left = _budget(layers, allocation) if budget is None else budget - spent
    least = sum(one.cost * len(one.curves) * one.candidates[0] for one in layers.values())
    if least > left:
        fewer = f", or give fewer than {spent} bits to the layers that keep their own: {list(fixed)}" if fixed else ""
        raise ValueError(
            f"the smallest widths of the layers that share bits take {least}, and the budget leaves them {left}; ask"
            f" for more{fewer}"
        )
    if not layers:
        return {}
    searched = list(layers.values())
    curves, options = [one.curves * one.share for one in searched], [one.candidates for one in searched]
    widths = exchange(curves, [one.cost for one in searched], options, left)
    return dict(zip(layers, widths, strict=True))


def _weights_gain(
    prepared: GraphModule,
    probe: Perturbed,
    layers: Mapping[str, WeightErrors],
    widths: Mapping[str, Tensor],
    least_gain: float,
) -> bool:
    """Whether the ``widths`` divide the squared error of the output, all rounded at once, by ``least_gain``.

    Asked of the output, since errors that the curves count one by one may cancel. Widths that the recipe could not
    have are always worth it: there is nothing to compare with.
    """
    if not widths or any(one.nominal not in one.candidates for one in layers.values()):
        return True
    even, shared = (error_of_rounded_weights(prepared, probe, layers, bits) for bits in (None, widths))
    return least_gain * shared**2 <= even**2


def _budget(layers: dict[str, WeightErrors], allocation: BitAllocation) -> int:
    """Bits for the codes of layers that share them."""
    counts = {name: one.cost * len(one.curves) for name, one in layers.items()}
    if allocation.mean_bits is None:
        return sum(count * layers[name].nominal for name, count in counts.items())
    return int(allocation.mean_bits * sum(counts.values()))


def _swapped(one: WeightErrors, groups: int) -> Tensor:
    """Bits moved from light tails to heavy ones; none where a neighbouring width is no candidate."""
    nominal, size = one.nominal, len(one.curves) // 10
    may = {nominal - 1, nominal, nominal + 1} <= set(one.candidates)
    sizes = [size * count for count in range(groups + 1)] if may else [0]
    return swap(one.scores, one.curves, nominal, one.candidates, sizes)


def _inputs_that_gain(prepared: GraphModule, probe: Perturbed, least_gain: float) -> dict[str, InputBits]:
    """Bits of every input narrower than a byte, if sharing them out divides the output's squared error so much.

    They go where they save most of what rounding an input alone does to the output. A bit costs one bit-operation for
    each multiply-accumulate and bit of weight; weights aside, the multiply-accumulates are the cost.
    """
    inputs = input_errors(prepared, probe)
    if not inputs:
        return {}
    costs = [sum(one.products.values()) for one in inputs]
    budget = sum(one.nominal * cost for one, cost in zip(inputs, costs, strict=True))
    widths = exchange([one.curve for one in inputs], costs, [one.candidates for one in inputs], budget)
    shared = {name: int(bits) for one, bits in zip(inputs, widths, strict=True) for name in one.products}
    even = {name: one.nominal for one in inputs for name in one.products}
    before, after = (error_of_rounded_inputs(prepared, probe, widths) for widths in (even, shared))
    if least_gain * after**2 > before**2:
        return {}
    return {name: InputBits(count, shared[name]) for one in inputs for name, count in one.products.items()}
