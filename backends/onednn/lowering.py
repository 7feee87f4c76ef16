"""int8 on CPUs: convolutions and linears on oneDNN's u8 x s8 kernels, weights prepacked, exponents folded by shift.

A layer ``dequantize(quantize(x)) * dequantize_weight(codes)`` of the q/dq graph becomes one integer kernel that reads
the codes. The quantize step stays plain operators, so Inductor fuses it with the norm and activation before it.
``products`` says which layers take more than one. A record that keeps its codes packed stays packed in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.backend import Lowered
from dmq_ao.backends.onednn import packed, self_test
from dmq_ao.backends.onednn.operators import int_conv, int_linear
from dmq_ao.backends.onednn.pair_sums import INT16, sums_of_two
from dmq_ao.backends.products import (
    Product,
    channels_last,
    fits,
    move_channels,
    replace_layer,
    replace_layers,
    why_float,
)
from dmq_ao.graph.geometry import Geometry
from dmq_ao.graph.values import VAL
from dmq_ao.passes.hoist_tables import hoist_tables
from dmq_ao.records import Kernel, LayerRecord, PackedRecords, PackedWeight, WeightRecord, shifted_codes

Instead = Callable[[GraphModule, Node, LayerRecord], Kernel | None]


def lower_to_onednn(
    gm: GraphModule, records: Mapping[str, LayerRecord], instead: Instead = lambda *_: None
) -> Lowered:
    """Replace layers of a q/dq graph by integer kernels, in place; the rest stays as it is, with the reason.

    Args:
        gm: the graph.
        records: of its layers.
        instead: asked about each node that can run on integers, joint layers as one, with its record: the kernel
            that it gave the node, or None to leave it to this backend.
    """
    kernels = replace_layers(
        gm,
        records,
        partial(_why_not_integer, records),
        lambda node, name, why: packed.float_layer(gm, node, records[name], why),
        lambda node, record: instead(gm, node, record) or _integer_layer(gm, node, record),
        join=not isinstance(records, PackedRecords),
    )
    hoist_tables(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, kernels


def _why_not_integer(records: Mapping[str, LayerRecord], record: LayerRecord, node: Node) -> str:
    """Why a layer has no integer kernel here; empty when it has one. Codes are read where it turns on them."""
    why = why_float(record)
    if why:
        return why
    if record.weight.float8:
        return "float8: CPUs multiply no such codes; use w8a8"
    layer = Geometry.of(node, record.weight.shape)
    if layer.groups > 1 and not fits(record):
        return "exponents of a grouped convolution whose shifted codes do not fit int8"
    word: self_test.Word = "linear" if layer.is_linear or layer.is_pointwise else "convolution"
    verdict = self_test.sums(word)
    if verdict is self_test.Sums.WRONG:
        return f"oneDNN's int8 {word} makes wrong sums on this machine; `dmq-ao doctor` says which"
    if verdict is self_test.Sums.PAIRS:
        return _why_saturated(records[record.name], word, layer.groups)
    return ""


def _why_saturated(record: LayerRecord, word: str, groups: int) -> str:
    """Why int16 does not hold two products of a layer's codes; empty when it does."""
    activation = record.activation
    assert activation is not None
    weight = shifted_codes(record.weight, activation.exponents if fits(record) else None, groups)[0]
    largest = 2 ** min(activation.bits, 8) - 1  # wider inputs are multiplied byte by byte
    low, high = sums_of_two(weight, largest)
    if low >= INT16[0] and high <= INT16[1]:
        return ""
    reach = low if -low > high else high
    return (
        f"oneDNN's int8 {word} uses no VNNI here: two products add up to {reach}, and saturate beyond int16; weights"
        " of at most 4 bits, or inputs of at most 7, would run on integers"
    )


def _integer_layer(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel:
    word = "linear" if record.kind == "linear" else "convolution"
    times, why = replace_layer(gm, node, record, partial(_integer_product, gm, node, record, {}))
    when = packed.PER_CALL if isinstance(record.weight, PackedWeight) else ""
    return Kernel(f"onednn int8 {word}{times}{when}", why)


def _integer_product(
    gm: GraphModule, node: Node, record: LayerRecord, weights: dict[WeightRecord, Node], product: Product, bias: Any
) -> Node:
    """The nodes of one integer kernel; ``weights`` holds the weights that other products of the layer read."""
    call = gm.graph.call_function
    codes = product.codes
    layer = Geometry.of(node, record.weight.shape)
    groups = layer.groups
    weight = shifted_codes(product.weight, product.exponents, groups)[0].to(torch.int8)
    out_dtype: torch.dtype = node.meta[VAL].dtype
    kernel_dtype = out_dtype if out_dtype in (torch.float32, torch.bfloat16) else torch.float32
    # The layer's power of two goes into the weight scale: exact, and the table of input scales stays shared.
    weight_scale = record.weight.scale[:, 0] * product.factor
    weight_sum = _row_sums(weight) * weight_scale
    scale_node = graph.add_tensor(gm, f"{record.name}.kernel_scale", weight_scale)
    sum_node = graph.add_tensor(gm, f"{record.name}.kernel_sum", weight_sum)
    if layer.is_linear or layer.is_pointwise:
        if layer.is_pointwise:
            weight, codes = weight.flatten(1), move_channels(gm, codes, to=-1)
        prepack = partial(torch.ops.onednn.qlinear_prepack, weight, None)
        codes = call(graph.aten.contiguous.default, (codes,))
        target, geometry = int_linear, ()
    else:
        windows = layer.in_2d
        shape = (list(windows.stride), list(windows.padding), list(windows.dilation))
        if record.kind == "conv1d":
            weight, codes = weight.unsqueeze(2), call(graph.aten.unsqueeze.default, (codes, 2))
        prepack = partial(torch.ops.onednn.qconv_prepack, weight, weight_scale, 1.0, 0, *shape, groups, None)
        codes = channels_last(gm, codes)
        target = int_conv
        geometry = (*shape, groups, list(windows.kernel))  # type: ignore[assignment]
    if product.weight not in weights:
        weights[product.weight] = _weight(gm, record.name, product, groups, weight.shape, prepack)
    reads = (weights[product.weight], scale_node, sum_node)
    result = call(target, (codes, product.scale, product.zero_point, *reads, bias, *geometry, kernel_dtype))
    if layer.is_pointwise:
        result = move_channels(gm, result, to=1)
    elif record.kind == "conv1d":
        result = call(graph.aten.squeeze.dim, (result, 2))
    if kernel_dtype != out_dtype:
        result = call(graph.aten.to.dtype, (result, out_dtype))
    return result


def _weight(
    gm: GraphModule, name: str, product: Product, groups: int, shape: torch.Size, prepack: Callable[[], Tensor]
) -> Node:
    """The node of a weight: prepacked once, or unpacked in every call where the record keeps it packed."""
    if isinstance(product.weight, PackedWeight):
        return packed.unpacked(gm, name, product.weight, product.exponents, groups, shape)
    return graph.add_tensor(gm, f"{name}.packed", prepack())


def _row_sums(weight: Tensor) -> Tensor:
    """Sums [out] int32 of the codes of each output, some rows at a time: torch widens what it sums."""
    return torch.cat([rows.sum(1, dtype=torch.int32) for rows in weight.flatten(1).split(64)])
