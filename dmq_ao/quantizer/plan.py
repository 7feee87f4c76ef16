"""Which layer gets which integers: a recipe decided for every layer of a captured graph."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.config import FLOAT_BITS, Granularity, QuantConfig, Ranges, Recipe, TensorConfig
from dmq_ao.graph.roles import ROLES, callers_roles, roles_of, whole_name
from dmq_ao.graph.values import VAL
from dmq_ao.observers import ALL_OBSERVERS, RangeEstimator
from dmq_ao.quantizer.patterns import no_match, patterns
from dmq_ao.records import LayerPlan

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
    plan = {
        layer.name: replace(_plan_layer(layer, roles[layer.name], config), roles=callers_roles(layer.node))
        for layer in layers
    }
    inputs, signature = graph.placeholders(gm), graph.signature_of(gm)
    moving = graph.reach(gm, {inputs[name] for name in (signature.batch, signature.timestep) if name in inputs})
    rows = {"1", _rows(inputs[signature.batch])}
    for layer in layers:
        source = layer.node.args[0]
        assert isinstance(source, Node)
        if layer.kind != graph.TABLE and (source not in moving or _rows(source) not in rows):
            plan[layer.name] = _at_rest(plan[layer.name])
    return plan | {one.name: _float_row(one) for one in graph.other_weights(gm)}


def _float_row(one: graph.OtherWeight) -> LayerPlan:
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
    codes = None if activation.bits == FLOAT_BITS else activation
    votes = config.power_of_two
    if votes is not None and (codes is None or not any(matches(p, layer.name, roles) for p in votes.layers)):
        votes = None
    return LayerPlan(layer.name, layer.kind, layer.numel, weight, codes, votes, "")


def _integers(config: TensorConfig, symmetric: bool) -> TensorConfig:
    """Integers as wide as float8, where it is asked for."""
    return replace(config, float8=False, symmetric=symmetric) if config.float8 else config


def scaled_layers(gm: GraphModule, recipe: Recipe) -> frozenset[str]:
    """Names of the layers whose input gets learned channel scales.

    Raises:
        ValueError: for a pattern that matches no layer, or an unknown role.
    """
    if recipe.scaling is None:
        return frozenset()
    layers = graph.find_layers(gm)
    roles = roles_of(gm, layers)
    for pattern in recipe.scaling.layers:
        _check_pattern("scaling", pattern, roles)
    patterns = recipe.scaling.layers
    return frozenset(name for name in roles if any(matches(p, name, roles[name]) for p in patterns))


def _reason(pattern: str) -> str:
    return _WHY.get(pattern, f"keep_float {pattern!r}")


def matches(pattern: str, name: str, roles: set[str]) -> bool:
    """Whether a role or an ``fnmatch`` pattern names a layer; a part of a split layer answers to the whole's too."""
    if pattern.startswith("@"):
        return pattern in roles
    return fnmatchcase(name, pattern) or fnmatchcase(whole_name(name), pattern)


def _check_patterns(config: QuantConfig, roles: dict[str, set[str]]) -> None:
    for field, pattern in patterns(config):
        _check_pattern(field, pattern, roles)
    for tensor in (*config.weights, *config.activations):
        estimator(tensor.observer)


def _check_pattern(field: str, pattern: str, roles: dict[str, set[str]]) -> None:
    if pattern.startswith("@"):
        if pattern not in ROLES:
            raise ValueError(f"{field}: unknown role {pattern!r}; the roles are {list(ROLES)}")
    elif not any(matches(pattern, name, own) or _awaits(pattern, name, own) for name, own in roles.items()):
        raise no_match(field, pattern, roles)


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
