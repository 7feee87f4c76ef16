"""Which layers the denoiser's output is most sensitive to, and more bits for those that hold few weights.

The first and last blocks at full resolution often make most of the error at late timesteps and hold one weight in a
hundred: eight bits for them cost next to nothing. What was decided is written into the recipe as overrides.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph, numerics, ops
from dmq_ao.annotate import PLAN, RECIPE, float_weight, observers
from dmq_ao.config import Override, Protection, Recipe
from dmq_ao.layer import LayerPlan
from dmq_ao.objectives import relative_error
from dmq_ao.observers import ActivationObserver, WeightObserver
from dmq_ao.state import load_state, save_state

ASKED = "dmq_ao.asked"
Watchers = tuple[WeightObserver, ActivationObserver | None]


class _Perturbed(Interpreter):
    """The float graph with one layer rounded to nearest, from that layer on."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared, garbage_collect_values=False)
        self.changed: Node | None = None
        self.weight = torch.zeros(0)
        self.bits: int | None = None

    def run_node(self, n: Node) -> Any:
        """Observers let through; the changed layer has its rounded weight, and its input by each sample's range."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return args[0]
        if n is not self.changed:
            return super().run_node(n)
        x: Tensor = args[0]
        if self.bits is not None:
            scale, zero_point = (numerics.along(t, 0, x.dim()) for t in ops.dynamic_qparams(x, self.bits))
            x = numerics.fake_quantize(x, scale, zero_point, *numerics.code_range(self.bits, False)).to(x.dtype)
        return n.target(x, self.weight.to(args[1].dtype), *args[2:])  # type: ignore[operator]


def sensitivities(prepared: GraphModule, arguments: list[Tensor], bar: tqdm[Any]) -> dict[str, float]:
    """Mean relative error of the denoiser's output when one layer alone is rounded to nearest, weight and input.

    Args:
        prepared: from ``dmq_ao.prepare``.
        arguments: of the graph, a few samples.
        bar: one tick a layer.
    """
    watchers = observers(prepared)
    run = _Perturbed(prepared)
    found = {}
    with torch.no_grad():
        expected = graph.first_tensor(run.run(*arguments))
        values = dict(run.env)
        for name, node in graph.layer_nodes(prepared).items():
            if name not in watchers:
                continue
            run.changed = node
            run.weight = watchers[name][0].record(float_weight(prepared, node)).dequantize()
            activation = watchers[name][1]
            run.bits = None if activation is None else activation.config.bits
            reached = graph.reach(prepared, {node})
            kept = {other: value for other, value in values.items() if other not in reached}
            found[name] = float(
                relative_error(graph.first_tensor(run.run(*arguments, initial_env=kept)), expected).mean()
            )
            bar.set_postfix(layer=name)
            bar.update(1)
    return found


def choose(found: dict[str, float], plan: dict[str, LayerPlan], protection: Protection) -> list[str]:
    """Layers to protect: most squared error per weight first, as long as their weights fit the share of all.

    Layers that vote on exponents are left out: wide codes do not shift into int8.
    """
    left = protection.share * sum(item.numel for item in plan.values())
    gains = {name: found[name] ** 2 / plan[name].numel for name in found if plan[name].power_of_two is None}
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
    found: dict[str, float] = sensitivities(prepared, arguments, bar) if saved is None else saved[0]
    if saved is None and file is not None:
        save_state(file, digest, found, {})
    plan: dict[str, LayerPlan] = dict(prepared.meta[PLAN])
    prepared.meta[ASKED] = (recipe, prepared.meta[PLAN])
    watchers = observers(prepared)
    for name in choose(found, plan, recipe.protection):
        _widen(watchers, plan, name, recipe.protection.bits)
    changed = [name for name, item in plan.items() if item != prepared.meta[PLAN][name]]
    overrides = [Override(graph.literal(n), weight=plan[n].weight, activation=plan[n].activation) for n in changed]
    config = replace(recipe.config, overrides=(*recipe.config.overrides, *overrides))
    prepared.meta[PLAN], prepared.meta[RECIPE] = plan, replace(recipe, config=config, protection=None)


def _widen(watchers: dict[str, Watchers], plan: dict[str, LayerPlan], name: str, bits: int) -> None:
    """More bits for a layer's weight, and for its input, which siblings share."""
    weight, activation = watchers[name]
    if weight.config.bits < bits:
        weight.config = replace(weight.config, bits=bits, symmetric=True)
        plan[name] = replace(plan[name], weight=weight.config)
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
