"""Which layer gets which integers: a recipe laid over a graph, as a torchao ``Quantizer``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import (
    Q_ANNOTATION_KEY,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)

from dmq_ao import graph
from dmq_ao.config import (
    FLOAT_BITS,
    AttentionConfig,
    Granularity,
    PowerOfTwo,
    QuantConfig,
    Ranges,
    Recipe,
    TensorConfig,
)
from dmq_ao.graph.roles import ROLES, roles_of, whole_name
from dmq_ao.graph.values import VAL
from dmq_ao.numerics import code_dtype, code_range
from dmq_ao.observers import ALL_OBSERVERS, ActivationObserver, AttentionObserver, RangeEstimator, WeightObserver
from dmq_ao.passes import decompose_attention, merge_layers, split_concat
from dmq_ao.passes.decompose_attention import PRODUCTS, whole_attention
from dmq_ao.records import LayerPlan

PLAN = "dmq_ao.plan"
RECIPE = "dmq_ao.recipe"
SCALED = "dmq_ao.scaled"
MERGED = "dmq_ao.merged"
TUNED = "dmq_ao.tuned"
SKELETON = "dmq_ao.skeleton"  # the denoiser's module tree, where prepare knows it
ATTENTION = "attention"  # kind of the rows that stand for products inside attention
_WHY = {
    "@input": "input projection (role @input)",
    "@output": "output projection (role @output)",
    "@embedding": "time, label or size embedding (role @embedding)",
    "@table": "embedding table (role @table)",
}


def make_plan(gm: GraphModule, config: QuantConfig) -> dict[str, LayerPlan]:
    """Decide for every layer of a captured graph.

    A range per timestep is one range for all where an input knows neither the sample nor the timestep (text, sizes),
    or where its rows are not those of the batch (frames, pixels), so that no timestep belongs to them.

    Raises:
        ValueError: for a pattern that matches no layer, listing close names; for an unknown role or observer.
    """
    layers = graph.find_layers(gm)
    roles = roles_of(gm, layers)
    _check_patterns(config, roles)
    plan = {layer.name: _plan_layer(layer, roles[layer.name], config) for layer in layers}
    inputs, signature = graph.placeholders(gm), graph.signature_of(gm)
    moving = graph.reach(gm, {inputs[name] for name in (signature.batch, signature.timestep) if name in inputs})
    rows = {"1", _rows(inputs[signature.batch])}
    for layer in layers:
        source = layer.node.args[0]
        assert isinstance(source, Node)
        if layer.kind != graph.TABLE and (source not in moving or _rows(source) not in rows):
            plan[layer.name] = _at_rest(plan[layer.name])
    return plan | {one.name: _kept(one) for one in graph.other_weights(gm)}


def _kept(one: graph.OtherWeight) -> LayerPlan:
    return LayerPlan(one.name, one.kind, one.numel, None, None, None, one.why)


def _rows(node: Node) -> str:
    """The expression of a value's number of rows: comparing sizes themselves would fix them."""
    return str(node.meta[VAL].shape[0])


def _at_rest(item: LayerPlan) -> LayerPlan:
    """The plan of a layer with one range where it was to have one per timestep."""
    activation, votes = item.activation, item.power_of_two
    if activation is None or activation.ranges is not Ranges.PER_STEP or (votes is not None and votes.per_step):
        return item
    return replace(item, activation=replace(activation, ranges=Ranges.STATIC))


def _plan_layer(layer: graph.Layer, roles: set[str], config: QuantConfig) -> LayerPlan:
    weight, activation = config.weight, config.activation
    why = next((_reason(p) for p in config.keep_float if matches(p, layer.name, roles)), "")
    for override in config.overrides:
        if matches(override.pattern, layer.name, roles):
            weight, activation = override.weight or weight, override.activation or activation
            why = f"override {override.pattern!r}" if override.keep_float else ""
    if not layer.quantizable:
        why = layer.kind
    if not why and weight.bits == FLOAT_BITS:
        why = f"the recipe asks for {FLOAT_BITS} bits"
    if why:
        return LayerPlan(layer.name, layer.kind, layer.numel, None, None, None, why)
    if layer.kind == graph.TABLE:  # what is looked up is whole rows
        weight = replace(_integers(weight, symmetric=True), granularity=Granularity.PER_CHANNEL, group_size=None)
        return LayerPlan(layer.name, layer.kind, layer.numel, weight, None, None, "")
    if layer.kind != "linear":
        weight, activation = _integers(weight, symmetric=True), _integers(activation, symmetric=False)
    given = None if activation.bits == FLOAT_BITS else activation
    votes = config.power_of_two
    if votes is not None and (given is None or not any(matches(p, layer.name, roles) for p in votes.layers)):
        votes = None
    return LayerPlan(layer.name, layer.kind, layer.numel, weight, given, votes, "")


def _integers(config: TensorConfig, symmetric: bool) -> TensorConfig:
    """Integers as wide as float8, where it is asked for."""
    return replace(config, float8=False, symmetric=symmetric) if config.float8 else config


def _scaled(gm: GraphModule, recipe: Recipe) -> set[str]:
    """Names of the layers whose input gets learned channel scales."""
    if recipe.scaling is None:
        return set()
    layers = graph.find_layers(gm)
    roles = roles_of(gm, layers)
    for pattern in recipe.scaling.layers:
        _check_pattern("scaling", pattern, roles)
    return {name for name, found in roles.items() if any(matches(p, name, found) for p in recipe.scaling.layers)}


def _reason(pattern: str) -> str:
    return _WHY.get(pattern, f"keep_float {pattern!r}")


def matches(pattern: str, name: str, roles: set[str]) -> bool:
    """Whether a role or an ``fnmatch`` pattern names a layer; a part of a split layer answers to the whole's too."""
    if pattern.startswith("@"):
        return pattern in roles
    return fnmatchcase(name, pattern) or fnmatchcase(whole_name(name), pattern)


def _patterns(config: QuantConfig) -> Iterator[tuple[str, str]]:
    for pattern in config.keep_float:
        yield "keep_float", pattern
    for override in config.overrides:
        yield "override", override.pattern
    for pattern in config.power_of_two.layers if config.power_of_two else ():
        yield "power_of_two", pattern


def _check_patterns(config: QuantConfig, roles: dict[str, set[str]]) -> None:
    for field, pattern in _patterns(config):
        _check_pattern(field, pattern, roles)
    for tensor in (*config.weights, *config.activations):
        estimator(tensor.observer)


def _check_pattern(field: str, pattern: str, roles: dict[str, set[str]]) -> None:
    if pattern.startswith("@"):
        if pattern not in ROLES:
            raise ValueError(f"{field}: unknown role {pattern!r}; the roles are {list(ROLES)}")
    elif not any(matches(pattern, name, found) or _awaits(pattern, name, found) for name, found in roles.items()):
        names = list(roles)
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        raise ValueError(f"{field}: pattern {pattern!r} matches no layer; the layers are {shown}")


def _awaits(pattern: str, name: str, roles: set[str]) -> bool:
    """Whether a pattern names a part of a layer that is going to be split."""
    whole = whole_name(pattern)
    return whole != pattern and "@concat" in roles and fnmatchcase(name, whole)


def estimator(name: str) -> type[RangeEstimator]:
    """The range estimator called ``name``.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in ALL_OBSERVERS:
        raise ValueError(f"observer {name!r} is not known; the observers are {sorted(ALL_OBSERVERS)}")
    return ALL_OBSERVERS[name]


class DiffusionQuantizer(Quantizer):
    """A recipe as a torchao pt2e quantizer.

    ``dmq_ao.prepare`` uses it on a graph from ``dmq_ao.graph.capture``; a pt2e user may pass it to ``prepare_pt2e``
    with a graph of their own, whose placeholders then go by their own names.
    """

    def __init__(self, recipe: Recipe) -> None:
        """A quantizer that annotates as ``recipe`` says."""
        super().__init__()
        self.recipe = recipe

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Merge copies of layers; split concatenations and write attention out where the recipe wants it."""
        graph.ensure_signature(model)
        model.meta[MERGED] = merge_layers(model)
        if self.recipe.config.attention is not None:
            decompose_attention(model)
        if not self.recipe.split_concat:
            return model
        plan = make_plan(model, self.recipe.config)
        layers = graph.find_layers(model)
        roles = roles_of(model, layers)
        return split_concat(
            model, [name for name, found in roles.items() if "@concat" in found and not plan[name].why]
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan and the torchao annotations."""
        plan = make_plan(model, self.recipe.config)
        model.meta[SCALED] = _scaled(model, self.recipe)
        nodes = graph.layer_nodes(model)
        first: dict[tuple[Node, TensorConfig, PowerOfTwo | None, int], Node] = {}
        axes = {layer.name: layer.ch_axis for layer in graph.find_layers(model)}
        for name, item in plan.items():
            if item.weight is None:
                continue
            node = nodes[name]
            source, weight = node.args[0], graph.weight_of(node)
            assert isinstance(source, Node)
            specs: dict[Node, QuantizationSpecBase | None] = {weight: _weight_spec(item)}
            if item.activation is not None:
                key = (source, item.activation, item.power_of_two, axes[name])
                if key in first:
                    specs[source] = SharedQuantizationSpec((source, first[key]))
                else:
                    first[key] = node
                    specs[source] = _activation_spec(item, axes[name])
            # torchao would share observers of one tensor whenever dtype and limits agree; siblings here share by key.
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=specs, allow_implicit_sharing=False, _annotated=True
            )
        if self.recipe.config.attention is not None:
            plan |= _annotate_attention(model, self.recipe.config.attention)
        model.meta.update({PLAN: plan, RECIPE: self.recipe})
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to add: ``make_plan`` refuses what does not fit."""


def _annotate_attention(model: GraphModule, config: AttentionConfig) -> dict[str, LayerPlan]:
    """Annotate the factors of attention's products; returns a row for each attention, for the reports."""
    rows: dict[str, LayerPlan] = {}
    why = (
        f"queries, keys and values of {config.bits} bits, softmax of {config.softmax_bits}, multiplied as dequantized"
        " values: there is no integer kernel for products of two activations"
    )
    for node in model.graph.nodes:
        if PRODUCTS not in node.meta:
            continue
        specs: dict[Node, QuantizationSpecBase | None] = {}
        for factor in node.args:
            softmax = factor.target == graph.aten.softmax.int
            bits = config.softmax_bits if softmax else config.bits
            observer = AttentionObserver.with_args(bits=bits, unit_range=softmax)
            specs[factor] = QuantizationSpec(torch.uint8, observer, 0, 2**bits - 1)
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=specs, allow_implicit_sharing=False, _annotated=True
        )
        name = f"{node.meta[PRODUCTS]}.{ATTENTION}"
        rows[name] = LayerPlan(name, ATTENTION, 0, None, None, None, why)
    kept = {f"{path}.{ATTENTION}": why for path, why in whole_attention(model).items()}
    return rows | {name: LayerPlan(name, ATTENTION, 0, None, None, None, why) for name, why in kept.items()}


def attention_observers(prepared: GraphModule) -> dict[Node, AttentionObserver]:
    """The observers that stand inside attention, by node."""
    modules = {n: prepared.get_submodule(str(n.target)) for n in prepared.graph.nodes if n.op == "call_module"}
    return {node: module for node, module in modules.items() if isinstance(module, AttentionObserver)}


def _weight_spec(item: LayerPlan) -> QuantizationSpec:
    assert item.weight is not None
    low, high = code_range(item.weight.bits, item.weight.symmetric)
    observer = WeightObserver.with_args(layer=item.name, config=item.weight, estimator=estimator(item.weight.observer))
    return QuantizationSpec(code_dtype(item.weight.symmetric, item.weight.float8), observer, low, high)


def _activation_spec(item: LayerPlan, ch_axis: int) -> QuantizationSpec:
    assert item.activation is not None
    observer = ActivationObserver.with_args(
        layer=item.name,
        config=item.activation,
        ch_axis=ch_axis,
        estimator=estimator(item.activation.observer),
        power_of_two=item.power_of_two,
    )
    return QuantizationSpec(
        code_dtype(item.activation.symmetric, item.activation.float8),
        observer,
        *code_range(item.activation.bits, False),
    )


def observers(prepared: GraphModule) -> dict[str, tuple[WeightObserver, ActivationObserver | None]]:
    """The observers of every layer of a prepared graph that multiplies codes, by name; siblings share an input's."""
    found: dict[str, tuple[WeightObserver, ActivationObserver | None]] = {}
    for name, node in graph.layer_nodes(prepared).items():
        source, weight = (_observer(prepared, arg) for arg in node.args[:2])
        if isinstance(weight, WeightObserver):
            found[name] = (weight, source if isinstance(source, ActivationObserver) else None)
    return found


def tables(prepared: GraphModule) -> dict[str, WeightObserver]:
    """The observers of the embedding tables that become codes, by layer name: nothing is learned of them."""
    found = {n: _observer(prepared, node.args[0]) for n, node in graph.layer_nodes(prepared).items()}
    return {name: weight for name, weight in found.items() if isinstance(weight, WeightObserver)}


def weight_observers(prepared: GraphModule) -> dict[str, WeightObserver]:
    """Those of all weights that become codes, tables included, by layer name."""
    return {name: weight for name, (weight, _) in observers(prepared).items()} | tables(prepared)


def readers(prepared: GraphModule) -> list[tuple[ActivationObserver | None, list[str]]]:
    """Each quantized input with the layers that read it, in graph order; layers of float inputs one by one."""
    found: dict[int | str, tuple[ActivationObserver | None, list[str]]] = {}
    for name, (_, activation) in observers(prepared).items():
        key = name if activation is None else id(activation)
        found.setdefault(key, (activation, []))[1].append(name)
    return list(found.values())


def float_weight(prepared: GraphModule, node: Node) -> Tensor:
    """The float weight [out, ...] that a quantized layer's observer watches."""
    observer = graph.weight_of(node)
    assert isinstance(observer.args[0], Node)
    return graph.attribute(prepared, observer.args[0]).detach()


def float_bias(gm: GraphModule, node: Node) -> Tensor | None:
    """A layer's own bias [out]; None where it has none."""
    bias = node.args[2] if len(node.args) > 2 else None
    return graph.attribute(gm, bias).detach() if isinstance(bias, Node) else None


def _observer(prepared: GraphModule, arg: object) -> object:
    if isinstance(arg, Node) and arg.op == "call_module":
        return prepared.get_submodule(str(arg.target))
    return None
