"""Blocks of a prepared graph: what is reconstructed together, run apart from the rest.

A block is a stretch of the graph: from the first operator of a residual block, a transformer block or a lone layer to
its last one. What it reads from before is its input; what is read after it is its output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.config import LeftOut
from dmq_ao.graph import aten
from dmq_ao.graph.roles import blocks_of, whole_name
from dmq_ao.quantizer.prepared import attention_observers, observers, state_of

# Operators after which a layer's output is still the block's output, alone or added to what passes it by.
_PASSING = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.to.dtype,
}
LayerCall = Callable[[Node, list[Any], Mapping[Node, Any]], Any]


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of the graph.

    Attributes:
        index: of the block.
        name: path of the module that it is, or of its only layer.
        layers: quantized layers in it, in graph order.
        nodes: its operators, in graph order.
        inputs: nodes before it that it reads, weights apart.
        live: its nodes that are read after it.
        outputs: of these, what depends on a quantized layer, with the channel axis.
        inner: outputs of its layers that are not the block's own output, with the channel axis; the parts of a split
            layer have one, their sum.
    """

    index: int
    name: str
    layers: tuple[str, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    live: tuple[Node, ...]
    outputs: tuple[tuple[Node, int], ...]
    inner: tuple[tuple[Node, int], ...]

    @property
    def end(self) -> Node:
        """Its last operator."""
        return self.nodes[-1]


def find_blocks(prepared: GraphModule, left_out: LeftOut = LeftOut.DATAFLOW) -> list[Block]:
    """The blocks that hold quantized layers, in graph order; none overlaps another.

    Args:
        prepared: from ``dmq_ao.prepare``; where its module tree is unknown, every layer is a block.
        left_out: which layer's output is not an inner one.
    """
    nodes = graph.layer_nodes(prepared)
    names = [name for name in nodes if name in observers(prepared)]
    paths = _paths(prepared)
    order = list(prepared.graph.nodes)
    place = {node: index for index, node in enumerate(order)}
    runs = [(path, list(group)) for path, group in itertools.groupby(names, key=lambda name: paths[whole_name(name)])]
    firsts = [place[nodes[run[0]]] for _, run in runs] + [len(order)]
    blocks: list[Block] = []
    begin = 0
    for index, (path, run) in enumerate(runs):
        whole = [nodes[name] for name in run if whole_name(name) == whole_name(run[-1])]
        first, last = firsts[index], place[_sum_of(whole)]
        start = next((i for i in range(begin, first) if belongs(order[i], path)), first)
        end = next((i for i in reversed(range(last, firsts[index + 1])) if belongs(order[i], path)), last)
        stretch = [node for node in order[start : end + 1] if node.op not in ("get_attr", "placeholder")]
        blocks.append(_block(prepared, index, path, run, stretch, left_out))
        begin = end + 1
    return blocks


def _paths(prepared: GraphModule) -> dict[str, str]:
    """Block path of every whole layer."""
    nodes = graph.layer_nodes(prepared)
    layers = [name for name in state_of(prepared).plan if name in nodes]  # the plan has rows that are no layers
    names = list(dict.fromkeys(whole_name(name) for name in layers))
    tree = state_of(prepared).skeleton
    if tree is None:
        return {name: name for name in names}
    return {name: path for path, members in blocks_of(tree, names).items() for name in members}


def belongs(node: Node, path: str) -> bool:
    """Whether an operator is of the module at ``path``, or of one inside it."""
    stack = node.meta.get("nn_module_stack") or {}
    inside = (entry[0].removeprefix(graph.PREFIX) for entry in stack.values())
    return any(module == path or module.startswith(f"{path}.") for module in inside)


def _block(
    prepared: GraphModule, index: int, path: str, layers: list[str], stretch: list[Node], left_out: LeftOut
) -> Block:
    own = set(stretch)
    nodes = graph.layer_nodes(prepared)
    read = dict.fromkeys(source for node in stretch for source in node.all_input_nodes)
    for name in layers:  # an observer that stands before the block may look up its range by the timestep
        source = nodes[name].args[0]
        assert isinstance(source, Node)
        read |= dict.fromkeys(source.all_input_nodes[1:] if source.op == "call_module" else ())
    live = [node for node in stretch if any(user not in own for user in node.users)]
    reached = graph.reach(prepared, {nodes[name] for name in layers})
    kinds = {name: state_of(prepared).plan[name].kind for name in layers}
    # An observer lets its source through: only the source is an output.
    outputs = [node for node in live if node.op == "call_function" and node in reached and _floating(node)]
    return Block(
        index=index,
        name=path,
        layers=tuple(layers),
        nodes=tuple(stretch),
        inputs=tuple(node for node in read if node not in own and not is_static(node)),
        live=tuple(live),
        outputs=tuple((node, _output_ch_axis(node, kinds[layers[-1]])) for node in outputs),
        inner=tuple(_inner(prepared, layers, own, left_out)),
    )


def is_static(node: Node) -> bool:
    """Whether a node reads a tensor of the graph: a parameter, or the observer of one."""
    return node.op == "get_attr" or (node.op == "call_module" and all(is_static(n) for n in node.all_input_nodes))


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _output_ch_axis(node: Node, kind: str) -> int:
    """Channels of maps come first; of three axes, by what kind of layer ends the block."""
    dims = node.meta["val"].dim()
    return 1 if dims > 3 or kind.startswith("conv") else dims - 1


def _inner(prepared: GraphModule, layers: list[str], own: set[Node], left_out: LeftOut) -> list[tuple[Node, int]]:
    nodes = graph.layer_nodes(prepared)
    wholes = {whole: list(parts) for whole, parts in itertools.groupby(layers, key=whole_name)}
    results = {whole: _sum_of([nodes[part] for part in parts]) for whole, parts in wholes.items()}
    tree = state_of(prepared).skeleton
    if left_out is LeftOut.REGISTRATION and tree is not None:
        registered = [name for name, _ in tree.named_modules() if name in results]
        dropped = set(registered[-1:])
    else:
        dropped = {whole for whole, node in results.items() if _is_output(node, own)}
    kinds = {whole: state_of(prepared).plan[parts[0]].kind for whole, parts in wholes.items()}
    return [(node, _output_ch_axis(node, kinds[whole])) for whole, node in results.items() if whole not in dropped]


def _sum_of(parts: Sequence[Node]) -> Node:
    """The node that adds the parts of a split layer; of a whole layer, itself."""
    total = parts[0]
    for part in parts[1:]:
        total = next(user for user in total.users if user in part.users)
    return total


def _is_output(node: Node, own: set[Node]) -> bool:
    """Whether a tensor goes nowhere but to the end of its block, through sums and changes of shape."""
    # Sizes carry no data, and checks of a tensor's type give nothing.
    data = [u for u in node.users if u.op == "call_module" or isinstance(u.meta.get("val"), (Tensor, list, tuple))]
    return all(user not in own or (user.target in _PASSING and _is_output(user, own)) for user in data)


def run_block(
    prepared: GraphModule, block: Block, inputs: Mapping[Node, Any], layer: LayerCall, keep: Sequence[Node]
) -> dict[Node, Any]:
    """Compute a block.

    Args:
        prepared: the graph.
        block: of it.
        inputs: values of ``block.inputs``.
        layer: computes a quantized layer, or lets a factor of attention through, from its node, its arguments and
            ``inputs``.
        keep: nodes of the block whose values are wanted.

    Returns:
        Those values.
    """
    env = dict(inputs)
    layers = graph.layer_nodes(prepared)
    quantized = {layers[name] for name in block.layers} | attention_observers(prepared).keys()
    last = {source: node for node in block.nodes for source in node.all_input_nodes}
    results = set(keep)
    for node in block.nodes:
        env[node] = _evaluate(prepared, node, env, quantized, layer, inputs)
        for source in node.all_input_nodes:
            if last[source] is node and source not in results:
                env.pop(source, None)
    return {node: env[node] for node in keep}


def _evaluate(
    prepared: GraphModule,
    node: Node,
    env: Mapping[Node, Any],
    quantized: set[Node],
    layer: LayerCall,
    inputs: Mapping[Node, Any],
) -> Any:
    def value(source: Node) -> Any:
        return _parameter(prepared, source) if is_static(source) else env[source]

    if node.op == "call_module" and node not in quantized:  # an observer
        assert isinstance(node.args[0], Node)
        return value(node.args[0])
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    if node in quantized:
        return layer(node, list(args), inputs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _parameter(prepared: GraphModule, node: Node) -> Tensor:
    while node.op == "call_module":
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return graph.attribute(prepared, node).detach()
