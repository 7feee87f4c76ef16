"""Give each part of a concatenated input its own layer, and so its own range (Q-Diffusion's split shortcut)."""

from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph import roles


def split_concat(gm: GraphModule, names: list[str]) -> GraphModule:
    """Split the layers ``names``, which read a concatenation along channels, at its seams.

    Before:  cat(h, skip) -> conv(w, b)        After:  conv(h, w[:, :c], b) ---+
                                                       conv(skip, w[:, c:]) ---+ add

    The parts are called ``<layer>.part0``, ``<layer>.part1``; the first one keeps the bias. Grouped convolutions and
    parts of unknown size stay whole. Works on a captured float graph, in place.
    """
    layers = {layer.name: layer for layer in graph.find_layers(gm)}
    for name in names:
        layer = layers[name]
        source = roles.concat_source(layer.node, layer.ch_axis)
        if source is not None:
            _split_layer(gm, layer, source)
    for layer in graph.find_layers(gm):
        layer.node.meta[graph.LAYER] = layer.name
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _split_layer(gm: GraphModule, layer: graph.Layer, source: Node) -> None:
    parts = source.args[0]
    assert isinstance(parts, (list, tuple))
    sizes = [part.meta["val"].shape[layer.ch_axis] for part in parts]  # type: ignore[union-attr]
    weight_node = layer.node.args[1]
    assert isinstance(weight_node, Node)
    weight = graph.attribute(gm, weight_node)
    if not all(isinstance(size, int) for size in sizes) or sum(sizes) != weight.shape[1]:
        return
    target = str(weight_node.target).removesuffix(".weight")
    total: Node | None = None
    with gm.graph.inserting_before(layer.node):
        for index, (part, piece) in enumerate(zip(parts, weight.split(sizes, dim=1), strict=True)):
            graph.set_tensor(gm, f"{target}.part{index}.weight", piece.contiguous())
            piece_node = gm.graph.get_attr(f"{target}.part{index}.weight")
            piece_node.meta["val"] = weight_node.meta["val"].narrow(1, 0, piece.shape[1])
            bias = layer.node.args[2] if index == 0 and len(layer.node.args) > 2 else None
            args = (part, piece_node, bias, *layer.node.args[3:])
            output = gm.graph.call_function(layer.node.target, args)  # type: ignore[arg-type]
            output.meta = {**layer.node.meta, roles.ROLES_KEY: ("@concat",)}
            if total is not None:
                val = output.meta["val"]
                output = gm.graph.call_function(graph.aten.add.Tensor, (total, output))
                output.meta["val"] = val
            total = output
    assert total is not None
    layer.node.replace_all_uses_with(total)
    gm.graph.erase_node(layer.node)
    if not weight_node.users:
        gm.graph.erase_node(weight_node)
        graph.delete_parameter(gm, str(weight_node.target))
