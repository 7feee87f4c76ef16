"""The typed state of a prepared graph, and its observers by the layers that they watch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.config import Recipe
from dmq_ao.graph.geometry import geometry
from dmq_ao.observers import ActivationObserver, AttentionObserver, WeightObserver
from dmq_ao.observers.channel_scale import spread
from dmq_ao.records import LayerPlan

_KEY = "dmq_ao.prepared"


@dataclass(eq=False)
class Prepared:
    """What is known of a prepared graph beside its nodes; ``state_of`` finds it.

    Attributes:
        recipe: as calibration decided it: what it protected is written into it as overrides.
        plan: of every layer, by name, as the observers have it.
        merged: layers that were copies of others, each with the layer that stands for it.
        scaled: layers whose input gets learned channel scales.
        skeleton: the denoiser's module tree on the meta device; None where torchao prepared the graph alone.
        tuned: float tensors [...] of the graph that calibration changed, by their place in it.
        sqnr_db: of every layer's output, integers against float; filled by calibration.
        incomplete: a calibration began and has not ended.
    """

    recipe: Recipe
    plan: Mapping[str, LayerPlan] = field(default_factory=dict)
    merged: Mapping[str, str] = field(default_factory=dict)
    scaled: frozenset[str] = frozenset()
    skeleton: nn.Module | None = None
    tuned: Mapping[str, Tensor] = field(default_factory=dict)
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    incomplete: bool = False
    _as_prepared: tuple[Recipe, Mapping[str, LayerPlan]] | None = field(default=None, init=False, repr=False)

    def attach(self, gm: GraphModule) -> None:
        """Make it the state of a graph."""
        gm.meta[_KEY] = self


def is_prepared(gm: object) -> bool:
    """Whether something is a graph that ``dmq_ao.prepare`` returned, or that ``DiffusionQuantizer`` annotated."""
    return isinstance(gm, GraphModule) and _KEY in gm.meta


def state_of(prepared: GraphModule) -> Prepared:
    """The state of a prepared graph."""
    state: Prepared = prepared.meta[_KEY]
    return state


def require_prepared(prepared: object, verb: str) -> Prepared:
    """The state of what a user handed to a verb.

    Raises:
        TypeError: when it is no graph from ``dmq_ao.prepare``, nor one that ``DiffusionQuantizer`` annotated.
    """
    if not isinstance(prepared, GraphModule) or not is_prepared(prepared):
        raise TypeError(f"{verb} takes what dmq_ao.prepare returned, got {type(prepared).__name__}")
    return state_of(prepared)


def change_plan(prepared: GraphModule, plan: Mapping[str, LayerPlan], recipe: Recipe | None = None) -> None:
    """Give the state another plan, and its recipe where that changes too; observers follow. ``reset`` undoes it."""
    state = state_of(prepared)
    if state._as_prepared is None:
        state._as_prepared = (state.recipe, state.plan)
    state.plan, state.recipe = plan, recipe or state.recipe
    for name, (weight, activation) in observers(prepared).items():
        config = plan[name].weight
        assert config is not None
        weight.config = config
        if activation is not None:
            input_config = plan[name].activation
            assert input_config is not None
            activation.config = input_config


def reset(prepared: GraphModule) -> None:
    """Forget all that a calibration decided: state and observers as they were prepared."""
    state = state_of(prepared)
    state.tuned, state.sqnr_db = {}, {}
    if state._as_prepared is not None:
        recipe, plan = state._as_prepared
        change_plan(prepared, plan, recipe)
        state._as_prepared = None
    for weight, activation in observers(prepared).values():
        weight.start()
        if activation is not None:
            activation.channel_scale = None
            activation.start_ranges()


def attention_observers(prepared: GraphModule) -> dict[Node, AttentionObserver]:
    """The observers that stand inside attention, by node."""
    modules = {n: prepared.get_submodule(str(n.target)) for n in prepared.graph.nodes if n.op == "call_module"}
    return {node: module for node, module in modules.items() if isinstance(module, AttentionObserver)}


def observers(prepared: GraphModule) -> dict[str, tuple[WeightObserver, ActivationObserver | None]]:
    """The observers of every layer of a prepared graph that multiplies codes, by name; siblings share an input's."""
    watchers: dict[str, tuple[WeightObserver, ActivationObserver | None]] = {}
    for name, node in graph.layer_nodes(prepared).items():
        source, weight = (_observer(prepared, arg) for arg in node.args[:2])
        if isinstance(weight, WeightObserver):
            watchers[name] = (weight, source if isinstance(source, ActivationObserver) else None)
    return watchers


def tables(prepared: GraphModule) -> dict[str, WeightObserver]:
    """The observers of the embedding tables that become codes, by layer name: nothing is learned of them."""
    watchers = {name: _observer(prepared, node.args[0]) for name, node in graph.layer_nodes(prepared).items()}
    return {name: weight for name, weight in watchers.items() if isinstance(weight, WeightObserver)}


def weight_observers(prepared: GraphModule) -> dict[str, WeightObserver]:
    """Those of all weights that become codes, tables included, by layer name."""
    return {name: weight for name, (weight, _) in observers(prepared).items()} | tables(prepared)


def readers(prepared: GraphModule) -> list[tuple[ActivationObserver | None, list[str]]]:
    """Each quantized input with the layers that read it, in graph order; layers of float inputs one by one."""
    inputs: dict[int | str, tuple[ActivationObserver | None, list[str]]] = {}
    for name, (_, activation) in observers(prepared).items():
        key = name if activation is None else id(activation)
        inputs.setdefault(key, (activation, []))[1].append(name)
    return list(inputs.values())


def float_weight(prepared: GraphModule, node: Node) -> Tensor:
    """The float weight [out, ...] that a quantized layer's observer watches."""
    observer = graph.weight_of(node)
    assert isinstance(observer.args[0], Node)
    return graph.attribute(prepared, observer.args[0]).detach()


def scaled_weight(prepared: GraphModule, node: Node, activation: ActivationObserver | None) -> Tensor:
    """A layer's float weight [out, ...] in float32, its input's learned channel scale multiplied in."""
    weight = float_weight(prepared, node).float()
    scale = None if activation is None else activation.record().channel_scale
    if scale is None:
        return weight
    factors = spread(scale.to(weight.device), len(weight), weight[0, 0].numel(), geometry(node, weight).groups)
    return weight * factors.reshape(weight.shape)


def float_bias(gm: GraphModule, node: Node) -> Tensor | None:
    """A layer's own bias [out]; None where it has none."""
    bias = node.args[2] if len(node.args) > 2 else None
    return graph.attribute(gm, bias).detach() if isinstance(bias, Node) else None


def _observer(prepared: GraphModule, arg: object) -> object:
    if isinstance(arg, Node) and arg.op == "call_module":
        return prepared.get_submodule(str(arg.target))
    return None
