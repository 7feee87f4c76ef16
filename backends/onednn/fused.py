"""The plan of ``dmq_ao.compile(mode="max")`` on CPUs: bfloat16 between layers, and operators of our own.

``compiled`` has the operators; ``fused_quantize`` and ``fused_attention`` put those in that take the place of several.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.onednn import compiled, cpu
from dmq_ao.backends.onednn.fused_attention import fuse_attention, fuse_written_out_attention
from dmq_ao.backends.onednn.fused_quantize import fuse_gelu, fuse_norm, take_padding
from dmq_ao.backends.onednn.matching import rank_of
from dmq_ao.backends.onednn.operators import INTEGER_KERNELS, int_conv, int_linear
from dmq_ao.backends.onednn.packed import FLOAT_KERNELS, use_int4
from dmq_ao.graph import aten
from dmq_ao.graph.private import operator_arguments
from dmq_ao.graph.values import VAL
from dmq_ao.numerics import ops
from dmq_ao.passes import fast_gelu, join_projections, lower_precision


def fastest_on_cpu(gm: GraphModule) -> GraphModule:
    """Another graph of the same tensors, for a graph that this backend lowered.

    Raises:
        RuntimeError: when the operators cannot be compiled, with what to install.
    """
    plan = GraphModule(gm, copy.deepcopy(gm.graph))
    join_projections(plan)
    if cpu.multiplies_bfloat16():
        plan = lower_precision(use_int4(plan), (*INTEGER_KERNELS, *FLOAT_KERNELS))
    fast_gelu(plan)
    return fuse(plan)


def fuse(gm: GraphModule) -> GraphModule:
    """Put the compiled operators into a graph that the oneDNN backend lowered, in place.

    Before:  group_norm -> silu -> quantize -> int_conv      After:  group_norm_quantize -> conv
    """
    compiled.load_kernels()
    for node in list(gm.graph.nodes):
        if node.target is aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.all_input_nodes[0])  # torch.fx takes it for random and would keep it
            gm.graph.erase_node(node)
        elif node.target is ops.quantize:
            fuse_gelu(gm, node)
            fuse_norm(gm, node)
        elif node.target is int_conv:
            node.target = torch.ops.dmq_ao_cpu.conv.default
            take_padding(node)
        elif node.target is int_linear:
            node.target = torch.ops.dmq_ao_cpu.linear.default
        elif node.target is aten.add.Tensor:
            _fuse_bytes(gm, node)
        elif node.target is aten.linear.default and rank_of(node) == 2 and node.meta[VAL].dtype == torch.float32:
            node.target = torch.ops.dmq_ao_cpu.float_linear.default  # of the timestep: as many rows as samples
            node.args = (*node.args, *(None,) * (3 - len(node.args)))
        elif node.target is aten.scaled_dot_product_attention.default:
            fuse_attention(gm, node)
        elif node.target is aten.matmul.default:
            fuse_written_out_attention(gm, node)
        elif node.target is aten.conv2d.default:
            channels_last_input(gm, node)
        elif node.target is aten.conv_transpose2d.input:
            tiles_as_linear(gm, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _fuse_bytes(gm: GraphModule, node: Node) -> None:
    """The two products of vectors of more than 8 bits.

    Before:  linear(high, ..) + linear(low, ..)      After:  two_byte_linear(high, low, ..)
    """
    parts = [part for part in node.args if isinstance(part, Node)]
    if len(parts) != 2 or any(part.target is not torch.ops.dmq_ao_cpu.linear.default for part in parts):
        return
    high, low = parts
    of_one_weight = high.args[3] is low.args[3] and low.args[6] is None
    if not of_one_weight or rank_of(high) != 2 or high.args[-1] != torch.float32:
        return
    scales = [graph.attribute(gm, part.args[4]) for part in parts]  # type: ignore[arg-type]
    ratio = float(scales[0][0] / scales[1][0])
    zeros = (high.args[2], low.args[2])
    with gm.graph.inserting_before(node):
        args = (high.args[0], low.args[0], high.args[1], *zeros, *low.args[3:6], high.args[6], ratio)
        result = gm.graph.call_function(torch.ops.dmq_ao_cpu.two_byte_linear.default, args)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)


def tiles_as_linear(gm: GraphModule, node: Node) -> None:
    """A transposed convolution whose outputs do not overlap (patches back to pixels) as one product.

    Before:  conv_transpose2d(x, w, b, stride=kernel)
    After:   linear(x as [B, H, W, C], w as [O * k * l, C], b k * l times), its tiles laid side by side
    """
    arguments = _arguments(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    kernel = list(weight.meta[VAL].shape[2:])
    plain = set(arguments["padding"]) == set(arguments["output_padding"]) == {0} and arguments["groups"] == 1
    if weight.op != "get_attr" or arguments["stride"] != kernel or not plain or set(arguments["dilation"]) != {1}:
        return
    matrix = graph.attribute(gm, weight).detach().permute(1, 2, 3, 0).flatten(0, 2).contiguous()
    call = gm.graph.call_function
    with gm.graph.inserting_before(node):
        rows = graph.add_tensor(gm, f"{weight.target}.rows", matrix)
        spread = None
        if bias is not None:
            repeated = graph.attribute(gm, bias).detach().repeat_interleave(kernel[0] * kernel[1])
            spread = graph.add_tensor(gm, f"{bias.target}.rows", repeated)
        tiles = call(aten.linear.default, (call(aten.permute.default, (x, [0, 2, 3, 1])), rows, spread))
        tiles = call(aten.unflatten.int, (tiles, -1, [-1, *kernel]))  # [B, H, W, O, k, l]
        tiles = call(aten.permute.default, (tiles, [0, 3, 1, 4, 2, 5]))
        result = call(aten.flatten.using_ints, (call(aten.flatten.using_ints, (tiles, 4, 5)), 2, 3))
    graph.replace_node(node, result)


def channels_last_input(gm: GraphModule, node: Node) -> None:
    """Let a float convolution start the layout that the integer ones have."""
    x = node.all_input_nodes[0]
    with gm.graph.inserting_before(node):
        channels_last = gm.graph.call_function(aten.contiguous.default, (x,), {"memory_format": torch.channels_last})
    channels_last.meta = dict(x.meta)
    node.replace_input_with(x, channels_last)


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    arguments = operator_arguments(node.target)
    values = dict(zip((one.name for one in arguments), node.args, strict=False)) | dict(node.kwargs)
    return {one.name: values.get(one.name, one.default_value) for one in arguments}
