"""Integers on NVIDIA GPUs: int8 tensor cores through Triton, weights of 2 to 8 bits packed in memory.

A layer ``dequantize(quantize(x)) * dequantize_weight(codes)`` of the q/dq graph becomes one kernel that reads packed
codes, unpacks, centres and shifts them in registers, and multiplies them by the input's codes. The quantize step stays
plain operators, so Inductor fuses it with the norm and activation before it. A residual that is added to a layer's
output is added as it is written. Layers whose input stays in float multiply it by codes that they unpack
likewise, if it has 16 bits. ``products`` says which layers take more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.backend import Lowered
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda.operands import Operands
from dmq_ao.backends.cuda.weights import KernelWeight, kernel_weight
from dmq_ao.backends.products import FLOAT_KERNEL, Product, move_channels, replace_layer, replace_layers, why_float
from dmq_ao.graph.geometry import Geometry
from dmq_ao.graph.values import VAL
from dmq_ao.passes.hoist_tables import hoist_tables
from dmq_ao.records import Kernel, LayerRecord, WeightRecord, shift_fits_int8

HALVES = (torch.bfloat16, torch.float16)
RESIDUAL = Operands._fields.index("residual")
FLOAT8_MULTIPLE = 16  # of the sizes that PyTorch's float8 product takes
# What the products of one weight read.
Weights = dict[WeightRecord, tuple[KernelWeight, tuple[Any, ...]]]


def lower_to_cuda(gm: GraphModule, records: Mapping[str, LayerRecord]) -> Lowered:
    """Replace layers of a q/dq graph by integer kernels, in place; the rest stays as it is, with the reason."""
    kernels = replace_layers(
        gm,
        records,
        _why_no_codes,
        lambda node, name, why: _weight_only_layer(gm, node, records[name], why),
        partial(_codes_layer, gm),
    )
    _add_residuals(gm)
    hoist_tables(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, kernels


def _why_no_codes(record: LayerRecord, node: Node) -> str:
    """Why a layer has no product of codes here; empty when it has one."""
    why = why_float(record)
    if not why and Geometry.of(node, record.weight.shape).groups > 1:
        return "no int8 kernel for grouped convolutions on CUDA"
    if not why and record.weight.float8 and any(size % FLOAT8_MULTIPLE for size in record.weight.shape):
        return f"float8 products take sizes in multiples of {FLOAT8_MULTIPLE}, not {tuple(record.weight.shape)}"
    return why


def _weight_only_layer(gm: GraphModule, node: Node, record: LayerRecord, why: str) -> Kernel:
    """Floats times packed codes where there is a kernel for them; else as the graph has it."""
    dtype: torch.dtype = node.meta[VAL].dtype
    grouped = record.weight.scale.shape[1] > 1 or Geometry.of(node, record.weight.shape).groups > 1
    if record.activation is not None or grouped or record.kind == "conv3d" or record.weight.float8:
        return Kernel(FLOAT_KERNEL, why)
    if not shift_fits_int8(record.weight.bits, record.weight.symmetric, 0):
        return Kernel(
            FLOAT_KERNEL, f"{why}; asymmetric codes of {record.weight.bits} bits are wider than a byte when centred"
        )
    if dtype not in HALVES:
        return Kernel(FLOAT_KERNEL, f"{why}; packed codes are multiplied in a denoiser of bfloat16 or float16")
    bias = node.args[2] if len(node.args) > 2 else None
    with gm.graph.inserting_before(node):
        product = Product(node.args[0], None, None, record.weight, None, 1.0)  # type: ignore[arg-type]
        result, weight = _cuda_product(gm, node, record, {}, product, bias)
    graph.replace_node(node, result)
    return Kernel(f"triton {str(dtype).removeprefix('torch.')}, {_words(weight.widths)}", why)


def _words(widths: Iterable[int]) -> str:
    return f"weight in {'+'.join(map(str, sorted(widths)))} bits"


def _float8_layer(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel:
    real, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
    assert isinstance(real, Node)
    with gm.graph.inserting_before(node):
        weight = graph.add_tensor(gm, f"{record.name}.codes", record.weight.codes)
        scale = graph.add_tensor(gm, f"{record.name}.kernel_scale", record.weight.scale[:, 0])
        args = (*real.args[:2], weight, scale, bias, node.meta[VAL].dtype)
        result = gm.graph.call_function(cuda_ops.float8_linear, args)
    graph.replace_node(node, result)
    return Kernel("float8 linear", "the recipe asks for float8")


def _codes_layer(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel:
    if record.weight.float8:
        return _float8_layer(gm, node, record)
    word = "linear" if record.kind == "linear" else "convolution"
    widths: set[int] = set()
    weights: Weights = {}

    def emit(product: Product, bias: Any) -> Node:
        result, weight = _cuda_product(gm, node, record, weights, product, bias)
        widths.update(weight.widths)
        return result

    times, why = replace_layer(gm, node, record, emit)
    return Kernel(f"triton int8 {word}{times}, {_words(widths)}", why)


def _cuda_product(
    gm: GraphModule, node: Node, record: LayerRecord, weights: Weights, product: Product, bias: Any
) -> tuple[Node, KernelWeight]:
    """The nodes of one integer kernel, and its weight; ``weights`` holds what other products of the layer read."""
    call, weight = gm.graph.call_function, product.weight
    codes = product.codes if product.scale is None else _signed(gm, product.codes)
    layer = Geometry.of(node, record.weight.shape)
    out_dtype: torch.dtype = node.meta[VAL].dtype
    if layer.is_pointwise:
        codes, weight = move_channels(gm, codes, to=-1), replace(weight, codes=weight.codes.flatten(1))
    elif record.kind == "conv1d":
        codes = call(graph.aten.unsqueeze.default, (codes, 2))
        weight = replace(weight, codes=weight.codes.unsqueeze(2))
    if product.weight not in weights:
        laid_out = kernel_weight(weight, product.exponents)
        weights[product.weight] = laid_out, _reads(gm, record.name, laid_out)
    laid_out, reads = weights[product.weight]
    scale = graph.add_tensor(gm, f"{record.name}.kernel_scale", record.weight.scale[:, 0] * product.factor)
    args = (codes, product.scale, product.zero_point, *reads, scale, bias, None)
    if layer.is_linear or layer.is_pointwise:
        result = call(cuda_ops.cuda_linear, (*args, out_dtype))
        return move_channels(gm, result, to=1) if layer.is_pointwise else result, laid_out
    windows = layer.in_2d
    geometry = (list(one) for one in (windows.kernel, windows.stride, windows.padding, windows.dilation))
    result = call(cuda_ops.cuda_conv, (*args, *geometry, out_dtype))
    return call(graph.aten.squeeze.dim, (result, 2)) if record.kind == "conv1d" else result, laid_out


def _signed(gm: GraphModule, codes: Node) -> Node:
    """The codes less 128, once for all their readers."""
    for user in codes.users:
        if user.target == cuda_ops.signed_codes:
            return user
    with gm.graph.inserting_after(codes):
        return gm.graph.call_function(cuda_ops.signed_codes, (codes,))


def _reads(gm: GraphModule, name: str, weight: KernelWeight) -> tuple[Any, ...]:
    """The weight's arguments of an operator, all but its scale."""

    def read(word: str, tensor: Tensor | None) -> Node | None:
        return None if tensor is None else graph.add_tensor(gm, f"{name}.{word}", tensor)

    return (
        [read(f"packed{width}", tensor) for width, tensor in zip(weight.widths, weight.packed, strict=True)],
        weight.widths,
        read("order", weight.order),
        read("middle", weight.middle),
        read("shifts", weight.shifts),
        read("kernel_sums", weight.sums),
    )


def _add_residuals(gm: GraphModule) -> None:
    """Let kernels add what is added to their output, in place.

    Before:  add(cuda_conv(.., residual=None, ..), x)      After:  cuda_conv(.., residual=x, ..)
    """
    for node in list(gm.graph.nodes):
        user = next(iter(node.users), None)
        if node.target not in (cuda_ops.cuda_conv, cuda_ops.cuda_linear) or len(node.users) != 1 or user is None:
            continue
        added = [source for source in user.args if source is not node]
        if not _is_sum(user) or len(added) != 1 or not _alike(added[0], node):
            continue
        with gm.graph.inserting_before(user):
            args = (*node.args[:RESIDUAL], added[0], *node.args[RESIDUAL + 1 :])
            result = gm.graph.call_function(node.target, args)
        result.meta = {**user.meta, graph.LAYER: node.meta.get(graph.LAYER)}
        user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _is_sum(node: Node) -> bool:
    return node.target == graph.aten.add.Tensor and not node.kwargs and len(node.args) == 2


def _alike(value: Any, result: Node) -> bool:
    """Whether a value has the shape and type of a layer's output, so that nothing is broadcast or promoted."""
    mine, others = result.meta.get(VAL), value.meta.get(VAL) if isinstance(value, Node) else None
    return mine is not None and others is not None and (mine.shape, mine.dtype) == (others.shape, others.dtype)
