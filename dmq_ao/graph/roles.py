"""What each layer of a captured graph is for, and which block of the denoiser it stands in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule, Node

from dmq_ao.graph import LINEAR, TABLE, Layer, aten, layer_nodes, placeholders, reach, reach_back, signature_of

ROLES = ("@input", "@output", "@embedding", "@table", "@concat")
ROLES_KEY = "dmq_ao.roles"  # in a node's meta: roles that dataflow no longer shows
_CALLERS_KEY = "dmq_ao.callers_roles"  # likewise: those that a caller gives, in the place of the dataflow's
# What a caller may say of a layer; the other roles are facts of the graph.
SAYABLE = ("@input", "@output", "@embedding", "@none")
_IDENTITY = (
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)


def whole_name(name: str) -> str:
    """Name of the layer that a part of a split layer belongs to; any other layer's own.

    >>> whole_name("up.skip.part1"), whole_name("net.partial.conv")
    ('up.skip', 'net.partial.conv')
    """
    whole, _, part = name.rpartition(".part")
    return whole if part.isdigit() else name


def concat_source(node: Node, ch_axis: int) -> Node | None:
    """The concatenation along channels that ``node`` (a layer) reads, past operators that change nothing."""
    source = node.args[0]
    while isinstance(source, Node) and source.target in _IDENTITY:
        source = source.args[0]
    if not isinstance(source, Node) or source.target != aten.cat.default:
        return None
    axis = source.args[1] if len(source.args) > 1 else 0
    ndim = source.meta["val"].dim()
    return source if isinstance(axis, int) and axis % ndim == ch_axis % ndim else None


def roles_of(gm: GraphModule, layers: list[Layer]) -> dict[str, set[str]]:
    """What each layer is for, by dataflow and not by name.

    ``@input``: reads the sample with no other layer before it. ``@output``: nothing after it but the output.
    ``@embedding``: never sees the sample, and either reads vectors [B, C] or sees the timestep and no tokens: time,
    label and size embeddings and the modulations made from them. ``@table``: rows looked up by labels, an embedding
    too where the sample is not what is looked up. ``@concat``: reads a concatenation along channels.
    """
    inputs = placeholders(gm)
    signature = signature_of(gm)
    sample, timestep = inputs[signature.batch], inputs.get(signature.timestep or "")
    targets = {layer.node for layer in layers if layer.kind != TABLE}
    from_sample = reach(gm, {sample})
    before_layers = reach(gm, {sample}, stop=targets)
    from_time = reach(gm, {timestep} if timestep else set())
    tokens = {node for node in inputs.values() if node not in (sample, timestep) and node.meta["val"].dim() > 2}
    from_tokens = reach(gm, tokens)
    before_targets = reach_back(gm, targets)
    roles_by_layer: dict[str, set[str]] = {}
    for layer in layers:
        node = layer.node
        roles_here: set[str] = set(node.meta.get(ROLES_KEY, ()))
        source = node.args[0]
        if node in from_sample:
            if source in before_layers:
                roles_here.add("@input")
            if node not in before_targets:
                roles_here.add("@output")
        elif layer.kind == TABLE or (node in from_time and node not in from_tokens) or _reads_vectors(layer):
            roles_here.add("@embedding")
        if layer.kind == TABLE:
            roles_here.add("@table")
        if layer.quantizable and node in from_sample and concat_source(node, layer.ch_axis) is not None:
            roles_here.add("@concat")
        callers = callers_roles(node)
        if callers:
            roles_here = (roles_here & {"@table", "@concat"}) | (set(callers) - {"@none"})
        roles_by_layer[layer.name] = roles_here
    return roles_by_layer


def callers_roles(node: Node) -> tuple[str, ...]:
    """What ``say_roles`` said of a layer's operator."""
    roles: tuple[str, ...] = node.meta.get(_CALLERS_KEY, ())
    return roles


def say_roles(layers: list[Layer], roles: Mapping[str, tuple[str, ...]]) -> None:
    """Give layers roles in the place of those that dataflow shows; all of ``roles`` are layers."""
    for layer in layers:
        if layer.name in roles:
            layer.node.meta[_CALLERS_KEY] = roles[layer.name]


def roles_by_plan(gm: GraphModule, kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Roles of the layers of a quantize/dequantize graph, sorted, those of concatenations aside, which it hides.

    Args:
        gm: the graph.
        kinds: of its layers, by name.
    """
    layers = []
    for name, node in layer_nodes(gm).items():
        if name in kinds:
            ch_axis = node.meta["val"].dim() - 1 if node.target == LINEAR else 1
            layers.append(Layer(name, node, kinds[name], ch_axis, quantizable=False, numel=0))
    return {name: tuple(sorted(roles)) for name, roles in roles_of(gm, layers).items()}


def _reads_vectors(layer: Layer) -> bool:
    return layer.kind == "linear" and layer.ch_axis == 1


def blocks_of(denoiser: nn.Module, layer_names: list[str]) -> dict[str, list[str]]:
    """Layers by reconstruction block, as the module tree groups them: residual and transformer blocks, samplers.

    A list of modules is a container when one of its items holds two layers or more. A block is the outermost module
    that neither is nor holds a container.

    Returns:
        Block path to the layer names inside it, in the order of ``layer_names``.
    """
    modules = dict(denoiser.named_modules())
    containers = {
        name
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        and any(_count_below(f"{name}.{child}", layer_names) > 1 for child, _ in module.named_children())
    }
    blocks: dict[str, list[str]] = {}
    for layer in layer_names:
        path = layer.split(".")
        prefixes = [".".join(path[:length]) for length in range(1, len(path) + 1)]
        block = next(p for p in prefixes if not any(c == p or c.startswith(p + ".") for c in containers))
        blocks.setdefault(block, []).append(layer)
    return blocks


def _count_below(prefix: str, names: list[str]) -> int:
    return sum(name == prefix or name.startswith(prefix + ".") for name in names)
