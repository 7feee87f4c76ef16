"""Changes of a graph: tensors put in and taken out, nodes that take the place of others."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dmq_ao.graph import private
from dmq_ao.graph.layers import SOURCE


def add_tensor(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """Register ``tensor`` [...] as a buffer, under a free name like ``name``, and read it at the insertion point."""
    stem = re.sub(r"\W", "_", name, flags=re.ASCII)  # it will stand in the source that torch.fx writes
    free, count = stem, 0
    while hasattr(gm, free):
        count += 1
        free = f"{stem}_{count}"
    device = next((p.device for p in gm.parameters()), tensor.device)
    gm.register_buffer(free, tensor if tensor.is_mkldnn else tensor.to(device), persistent=False)
    return gm.graph.get_attr(free)


def replace_node(node: Node, result: Node) -> None:
    """Give a node's place, readers and notes to ``result``."""
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def add_record_tensor(gm: GraphModule, layer: str, field: str, tensor: Tensor) -> Node:
    """``add_tensor`` of [...], what ``record_tensor`` gives for a field of a layer's record, noted on the node."""
    read = add_tensor(gm, f"{layer}.{field}", tensor)
    read.meta[SOURCE] = (layer, field)
    return read


def place(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that a dotted path ends in, created on the way, and the name there."""
    *path, last = target.split(".")
    module = root
    for part in path:
        if part not in private.children(module):  # not hasattr: a name must not lead out of the tree of modules
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, last


def set_tensor(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Put a tensor [...] at a dotted path, creating modules on the way: floats as parameters, the rest as buffers."""
    module, last = place(root, target)
    if module is not root and tensor.is_floating_point():
        setattr(module, last, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(last, tensor, persistent=False)


def delete_parameter(gm: GraphModule, target: str) -> None:
    """Remove the tensor at a dotted path."""
    path, _, last = target.rpartition(".")
    delattr(gm.get_submodule(path), last)


def drop_unused(gm: GraphModule) -> None:
    """Let go of operators, and then tensors, that nothing reads."""
    gm.graph.eliminate_dead_code()
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name not in read:
            delete_parameter(gm, name)
    gm.delete_all_unused_submodules()
    gm.recompile()


def allow_train_eval(gm: GraphModule) -> GraphModule:
    """Undo torchao's ban on ``train()``/``eval()``: our graphs have no mode, and pipelines call ``eval()``."""
    for module in gm.modules():  # the bodies of regions too
        for name in ("train", "eval"):
            module.__dict__.pop(name, None)
    return gm
