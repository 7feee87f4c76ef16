"""Which layers the denoiser's output is most sensitive to, and more bits for those that cost little.

The first and last blocks at full resolution often make most of the error at late timesteps and hold one weight in a
hundred: eight bits for them cost next to nothing. The inputs of one or two of them may still make most of what is
left: those get more bits than a byte. What was decided is written into the recipe as overrides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.config import Override, Protection, TensorConfig
from dmq_ao.mixed_precision.probe import Perturbed
from dmq_ao.quantizer.prepared import change_plan, float_weight, observers, readers, state_of
from dmq_ao.records import LayerPlan
from dmq_ao.serialization.checkpoint import Checkpoint

# Share of the squared error of all inputs that one must make to be worth more bits.
WORTH = 0.1


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one layer alone, to nearest, does to the denoiser's output.

    Attributes:
        error: mean relative error of the output, weight and input rounded.
        input_error: with the input alone rounded; 0 where ``error`` is too small for that to matter.
        products: multiply-accumulates of the layer, a sample.
    """

    error: float
    input_error: float
    products: int


def sensitivities(
    prepared: GraphModule, arguments: list[Tensor], bar: tqdm[Any], most: Protection | None = None
) -> dict[str, Sensitivity]:
    """What each quantized layer does to the denoiser's output when it alone is rounded.

    Args:
        prepared: from ``dmq_ao.prepare``.
        arguments: [B, ...] of the graph, a few samples.
        bar: one tick a layer.
        most: layers that have as many bits already are left out; None leaves out none.
    """
    run = Perturbed(prepared, arguments)
    errors, nodes = {}, graph.layer_nodes(prepared)
    widths: dict[str, int] = {}
    for name, (weight, activation) in observers(prepared).items():
        if most is not None and _has_most(weight.config, None if activation is None else activation.config, most):
            bar.update(1)
            continue
        node = nodes[name]
        rounded = weight.record(float_weight(prepared, node)).dequantize()
        both = run.error(node, rounded, None if activation is None else activation.config.bits)
        errors[name] = Sensitivity(both, 0.0, run.products(node))
        if activation is not None:
            widths[name] = activation.config.bits
        bar.set_postfix(layer=name)
        bar.update(1)
    squares = 0.0
    for name in sorted(widths, key=lambda name: -errors[name].error):
        if errors[name].error ** 2 < WORTH * squares:
            break  # nor does the input alone, here or in any layer after this one, make the share
        errors[name] = replace(errors[name], input_error=run.error(nodes[name], None, widths[name]))
        squares += errors[name].input_error ** 2
    return errors


def _has_most(weight: TensorConfig, activation: TensorConfig | None, most: Protection) -> bool:
    return weight.bits >= most.bits and (activation is None or activation.bits >= most.input_bits)


def choose(errors: Mapping[str, Sensitivity], plan: Mapping[str, LayerPlan], protection: Protection) -> list[str]:
    """Layers to protect: most squared error per weight first, as long as their weights fit the share of all.

    Layers that vote on exponents are left out: wide codes do not shift into int8.
    """
    left = protection.share * sum(item.numel for item in plan.values())
    gains = {name: one.error**2 / plan[name].numel for name, one in errors.items() if plan[name].power_of_two is None}
    layers = []
    for name in sorted(gains, key=lambda name: -gains[name]):
        weight = plan[name].weight
        assert weight is not None
        activation = plan[name].activation
        narrow = min(weight.bits, protection.bits if activation is None else activation.bits) < protection.bits
        if plan[name].numel <= left and narrow and gains[name] > 0:
            left -= plan[name].numel
            layers.append(name)
    return layers


def choose_inputs(errors: Mapping[str, Sensitivity], inputs: list[list[str]], protection: Protection) -> list[str]:
    """First layers of the inputs to widen: most squared error per multiply-accumulate first, within the share of all.

    Args:
        errors: sensitivities by layer.
        inputs: layers that read each quantized input, narrower than ``input_bits``.
        protection: shares.
    """
    left = protection.input_share * sum(one.products for one in errors.values())
    least = WORTH * sum(one.input_error**2 for one in errors.values())
    squares = {names[0]: sum(errors[name].input_error ** 2 for name in names) for names in inputs}
    products = {names[0]: sum(errors[name].products for name in names) for names in inputs}
    layers = []
    for name in sorted(squares, key=lambda name: -squares[name] / products[name]):
        if squares[name] > least and products[name] <= left:
            left -= products[name]
            layers.append(name)
    return layers


def protect(
    prepared: GraphModule, arguments: list[Tensor], protection: Protection, checkpoint: Checkpoint, bar: tqdm[Any]
) -> None:
    """Give the most sensitive layers more bits, in the plan and, as overrides, in the recipe.

    Args:
        prepared: from ``dmq_ao.prepare``.
        arguments: [B, ...] of the graph, a few samples.
        protection: shares and widths.
        checkpoint: where the sensitivities are saved.
        bar: one tick a layer.

    Raises:
        InvalidFile: for a damaged checkpoint.
        ValueError: for the checkpoint of another run.
    """
    saved = checkpoint.load("sensitivity", "the sensitivities of a calibration")
    if saved is None:
        errors = sensitivities(prepared, arguments, bar, protection)
        checkpoint.save("sensitivity", {name: asdict(one) for name, one in errors.items()}, {})
    else:
        errors = {name: Sensitivity(**one) for name, one in saved[0].items()}
    state, siblings = state_of(prepared), _siblings(prepared)
    plan = dict(state.plan)
    for name in choose(errors, state.plan, protection):
        _widen_weight(plan, name, protection.bits)
        _widen_input(plan, siblings[name], protection.bits)
    inputs = [names for one, names in readers(prepared) if one and _input_bits(plan[names[0]]) < protection.input_bits]
    for name in choose_inputs(errors, inputs, protection):
        _widen_input(plan, siblings[name], protection.input_bits)
    changed = [name for name, item in plan.items() if item != state.plan[name]]
    overrides = [Override(graph.literal(n), weight=plan[n].weight, activation=plan[n].activation) for n in changed]
    config = replace(state.recipe.config, overrides=(*state.recipe.config.overrides, *overrides))
    change_plan(prepared, plan, replace(state.recipe, config=config, protection=None))


def _siblings(prepared: GraphModule) -> dict[str, list[str]]:
    """Of each layer, those that read the same quantized input, itself among them."""
    return {name: names for _, names in readers(prepared) for name in names}


def _input_bits(item: LayerPlan) -> int:
    assert item.activation is not None
    return item.activation.bits


def _widen_weight(plan: dict[str, LayerPlan], name: str, bits: int) -> None:
    weight = plan[name].weight
    assert weight is not None
    if weight.bits < bits:
        plan[name] = replace(plan[name], weight=replace(weight, bits=bits, symmetric=True))


def _widen_input(plan: dict[str, LayerPlan], siblings: list[str], bits: int) -> None:
    """More bits for an input, in the plan of every layer that reads it."""
    activation = plan[siblings[0]].activation
    if activation is None or activation.bits >= bits:
        return
    for name in siblings:
        plan[name] = replace(plan[name], activation=replace(activation, bits=bits))
