"""Which layers the denoiser's output is most sensitive to, and more bits for those that cost little.

The first and last blocks at full resolution often make most of the error at late timesteps and hold one weight in a
hundred: eight bits for them cost next to nothing. The inputs of one or two of them may still make most of what is
left: those get more bits than a byte. What was decided is written into the recipe as overrides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph, numerics
from dmq_ao.config import Override, Protection, Recipe, TensorConfig
from dmq_ao.numerics import ops
from dmq_ao.objectives import relative_error
from dmq_ao.observers import ActivationObserver, WeightObserver
from dmq_ao.quantizer.quantizer import PLAN, RECIPE, float_weight, observers, readers
from dmq_ao.records import LayerPlan
from dmq_ao.serialization.checkpoint import load_state, save_state

ASKED = "dmq_ao.asked"
Watchers = tuple[WeightObserver, ActivationObserver | None]
Change = tuple[Tensor | None, int | None]  # the weight of a layer, and bits of its input; None for float


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


class Perturbed(Interpreter):
    """The float graph with some layers rounded to nearest, from the first of them on."""

    def __init__(self, prepared: GraphModule, arguments: list[Tensor]) -> None:
        """Run the float graph once on ``arguments``; its values stay."""
        super().__init__(prepared, garbage_collect_values=False)
        self.arguments = arguments
        self.changed: Mapping[Node, Change] = {}
        with torch.no_grad():
            self.expected = graph.first_tensor(self.run(*arguments))
        self.values = dict(self.env)

    def error(self, node: Node, weight: Tensor | None, bits: int | None) -> float:
        """Mean relative error of the output when a layer has this ``weight``, and an input of ``bits`` bits."""
        return self.error_of({node: (weight, bits)})

    def error_of(self, changed: Mapping[Node, Change]) -> float:
        """Mean relative error of the output when layers have these weights, and inputs of so many bits, at once."""
        self.changed = changed
        reached = graph.reach(self.module, set(changed))  # type: ignore[arg-type]
        kept = {other: value for other, value in self.values.items() if other not in reached}
        with torch.no_grad():
            result = self.run(*self.arguments, initial_env=kept)
        return float(relative_error(graph.first_tensor(result), self.expected).mean())

    def products(self, node: Node) -> int:
        """Multiply-accumulates of a layer, a sample."""
        weight = node.args[1]
        assert isinstance(weight, Node)
        return int(self.values[node][0].numel() * self.values[weight][0].numel())

    def run_node(self, n: Node) -> Any:
        """Observers let through; changed layers have the weights set, their inputs rounded by each sample's range."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return args[0]
        if n not in self.changed:
            return super().run_node(n)
        x: Tensor = args[0]
        weight, bits = self.changed[n]
        if bits is not None:
            scale, zero_point = (numerics.along(t, 0, x.dim()) for t in ops.dynamic_qparams(x, bits))
            x = numerics.fake_quantize(x, scale, zero_point, *numerics.code_range(bits, False)).to(x.dtype)
        weight = args[1] if weight is None else weight.to(args[1].dtype)
        return n.target(x, weight, *args[2:])  # type: ignore[operator]


def sensitivities(
    prepared: GraphModule, arguments: list[Tensor], bar: tqdm[Any], most: Protection | None = None
) -> dict[str, Sensitivity]:
    """What each quantized layer does to the denoiser's output when it alone is rounded.

    Args:
        prepared: from ``dmq_ao.prepare``.
        arguments: of the graph, a few samples.
        bar: one tick a layer.
        most: layers that have as many bits already are left out; None leaves out none.
    """
    run = Perturbed(prepared, arguments)
    found, nodes = {}, graph.layer_nodes(prepared)
    widths: dict[str, int] = {}
    for name, (weight, activation) in observers(prepared).items():
        if most is not None and _has_most(weight.config, None if activation is None else activation.config, most):
            bar.update(1)
            continue
        node = nodes[name]
        rounded = weight.record(float_weight(prepared, node)).dequantize()
        both = run.error(node, rounded, None if activation is None else activation.config.bits)
        found[name] = Sensitivity(both, 0.0, run.products(node))
        if activation is not None:
            widths[name] = activation.config.bits
        bar.set_postfix(layer=name)
        bar.update(1)
    squares = 0.0
    for name in sorted(widths, key=lambda name: -found[name].error):
        if found[name].error ** 2 < WORTH * squares:
            break  # nor does the input alone, here or in any layer after this one, make the share
        found[name] = replace(found[name], input_error=run.error(nodes[name], None, widths[name]))
        squares += found[name].input_error ** 2
    return found


def _has_most(weight: TensorConfig, activation: TensorConfig | None, most: Protection) -> bool:
    return weight.bits >= most.bits and (activation is None or activation.bits >= most.input_bits)


def choose(found: dict[str, Sensitivity], plan: dict[str, LayerPlan], protection: Protection) -> list[str]:
    """Layers to protect: most squared error per weight first, as long as their weights fit the share of all.

    Layers that vote on exponents are left out: wide codes do not shift into int8.
    """
    left = protection.share * sum(item.numel for item in plan.values())
    gains = {name: one.error**2 / plan[name].numel for name, one in found.items() if plan[name].power_of_two is None}
    chosen = []
    for name in sorted(gains, key=lambda name: -gains[name]):
        weight = plan[name].weight
        assert weight is not None
        activation = plan[name].activation
        narrow = min(weight.bits, protection.bits if activation is None else activation.bits) < protection.bits
        if plan[name].numel <= left and narrow and gains[name] > 0:
            left -= plan[name].numel
            chosen.append(name)
    return chosen


def choose_inputs(found: dict[str, Sensitivity], inputs: list[list[str]], protection: Protection) -> list[str]:
    """First layers of the inputs to widen: most squared error per multiply-accumulate first, within the share of all.

    Args:
        found: sensitivities by layer.
        inputs: layers that read each quantized input, narrower than ``input_bits``.
        protection: shares.
    """
    left = protection.input_share * sum(one.products for one in found.values())
    least = WORTH * sum(one.input_error**2 for one in found.values())
    squares = {names[0]: sum(found[name].input_error ** 2 for name in names) for names in inputs}
    products = {names[0]: sum(found[name].products for name in names) for names in inputs}
    chosen = []
    for name in sorted(squares, key=lambda name: -squares[name] / products[name]):
        if squares[name] > least and products[name] <= left:
            left -= products[name]
            chosen.append(name)
    return chosen


def protect(
    prepared: GraphModule, arguments: list[Tensor], state_dir: Path | None, digest: str, bar: tqdm[Any]
) -> None:
    """Give the most sensitive layers more bits, in the observers, the plan and the recipe.

    Args:
        prepared: its recipe has a ``protection``.
        arguments: of the graph, a few samples.
        state_dir: where the sensitivities are saved; None for nowhere.
        digest: of everything they depend on.
        bar: one tick a layer.

    Raises:
        InvalidFile: for a damaged file in ``state_dir``.
        ValueError: for a file of another run.
    """
    recipe: Recipe = prepared.meta[RECIPE]
    assert recipe.protection is not None
    file = None if state_dir is None else state_dir / "sensitivity.safetensors"
    saved = load_state(file, digest, "the sensitivities of a calibration")
    if saved is None:
        found = sensitivities(prepared, arguments, bar, recipe.protection)
        if file is not None:
            save_state(file, digest, {name: asdict(one) for name, one in found.items()}, {})
    else:
        found = {name: Sensitivity(**one) for name, one in saved[0].items()}
    protection, watchers = recipe.protection, observers(prepared)
    plan: dict[str, LayerPlan] = dict(prepared.meta[PLAN])
    prepared.meta[ASKED] = (recipe, prepared.meta[PLAN])
    for name in choose(found, plan, protection):
        _widen_weight(watchers, plan, name, protection.bits)
        _widen_input(watchers, plan, name, protection.bits)
    inputs = [names for one, names in readers(prepared) if one and one.config.bits < protection.input_bits]
    for name in choose_inputs(found, inputs, protection):
        _widen_input(watchers, plan, name, protection.input_bits)
    changed = [name for name, item in plan.items() if item != prepared.meta[PLAN][name]]
    overrides = [Override(graph.literal(n), weight=plan[n].weight, activation=plan[n].activation) for n in changed]
    config = replace(recipe.config, overrides=(*recipe.config.overrides, *overrides))
    prepared.meta[PLAN], prepared.meta[RECIPE] = plan, replace(recipe, config=config, protection=None)


def _widen_weight(watchers: dict[str, Watchers], plan: dict[str, LayerPlan], name: str, bits: int) -> None:
    weight, _ = watchers[name]
    if weight.config.bits < bits:
        weight.config = replace(weight.config, bits=bits, symmetric=True)
        plan[name] = replace(plan[name], weight=weight.config)


def _widen_input(watchers: dict[str, Watchers], plan: dict[str, LayerPlan], name: str, bits: int) -> None:
    """More bits for a layer's input, which siblings share."""
    activation = watchers[name][1]
    if activation is None or activation.config.bits >= bits:
        return
    activation.config = replace(activation.config, bits=bits)
    for other, (_, watcher) in watchers.items():
        if watcher is activation:
            plan[other] = replace(plan[other], activation=activation.config)


def forget(prepared: GraphModule) -> None:
    """Undo ``protect``: observers, plan and recipe as they were prepared."""
    if ASKED not in prepared.meta:
        return
    prepared.meta[RECIPE], prepared.meta[PLAN] = prepared.meta.pop(ASKED)
    for name, (weight, activation) in observers(prepared).items():
        weight.config = prepared.meta[PLAN][name].weight
        if activation is not None:
            activation.config = prepared.meta[PLAN][name].activation
