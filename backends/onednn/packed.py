"""4-bit codes that stay packed in memory, two a byte, and are unpacked in every call.

Integer layers unpack to int8, shifts included, and oneDNN prepacks and multiplies that: the sums are those of codes
prepacked once. Layers that multiply floats unpack to the codes that the quantize/dequantize graph dequantizes. Linears
among them run on PyTorch's int4 kernel, which reads packed codes itself, where they are allowed bfloat16: it has no
fast kernel for other types (float32 on x86: 60 times slower than a product of dequantized weights).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph, numerics
from dmq_ao.backends.products import FLOAT_KERNEL
from dmq_ao.graph.kernels import KernelOperator
from dmq_ao.graph.values import VAL
from dmq_ao.numerics import ops
from dmq_ao.records import PACKED_BITS, Kernel, LayerRecord, PackedWeight, channel_shifts

PER_CALL = ", unpacked per call"
INT4 = "int4 linear, bfloat16"
# Of the int4 kernel: inputs that share a scale, largest first, and what divides the number of outputs.
_GROUPS = (256, 128, 64, 32)
_OUTPUTS = 16
_MIDDLE = 8  # the stored code that the int4 kernel takes for zero

_packed_library = torch.library.Library("dmq_ao", "FRAGMENT")
_packed_library.define("unpack_codes(Tensor packed, Tensor zero_point, Tensor? factor, int[] shape) -> Tensor")
_packed_library.define(
    "int4_linear(Tensor x, Tensor weight, Tensor ratios, Tensor scale, Tensor? bias, int group_size) -> Tensor"
)


def _unpack_codes(packed: Tensor, zero_point: Tensor, factor: Tensor | None, shape: Sequence[int]) -> Tensor:
    """int8 ``(code - zero_point) * factor``; zero_point is [out] or [1], factor [groups, channels / groups]."""
    codes = numerics.unpack_rows(packed, shape[0]).sub_(zero_point.unsqueeze(-1))
    if factor is not None:
        groups, channels = factor.shape
        codes.view(groups, -1, channels, codes.shape[1] // channels).mul_(factor[:, None, :, None])
    return codes.reshape(shape)


def _fake_unpack_codes(packed: Tensor, zero_point: Tensor, factor: Tensor | None, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.int8)


def _int4_linear(
    x: Tensor, weight: Tensor, ratios: Tensor, scale: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, ratios)
    result = product * scale if bias is None else torch.addcmul(bias.float(), product.float(), scale)
    return result.to(x.dtype).reshape(*x.shape[:-1], len(scale))


def _fake_int4_linear(
    x: Tensor, weight: Tensor, ratios: Tensor, scale: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


# Not compositions: the compiler's loops over bytes are several times slower than ATen's.
_packed_library.impl("unpack_codes", _unpack_codes, "CPU")
_packed_library.impl("int4_linear", _int4_linear, "CPU")
torch.library.register_fake("dmq_ao::unpack_codes", _fake_unpack_codes)
torch.library.register_fake("dmq_ao::int4_linear", _fake_int4_linear)

unpack_codes = torch.ops.dmq_ao.unpack_codes.default
"""int8 codes of ``shape`` from rows of ``numerics.pack_rows``, less a zero point, times a factor for each channel."""
int4_linear = torch.ops.dmq_ao.int4_linear.default
"""``x`` [..., in] in bfloat16 times codes of PyTorch's int4 kernel, in the type of ``x``.

``ratios`` [groups, out, 2] bfloat16 are scales and zeros relative to ``scale`` [out] float32: with one scale per
output they are small whole numbers, so that only ``x`` and the sums are rounded to bfloat16; with several per output,
the scales are rounded as well.
"""
FLOAT_KERNELS = (KernelOperator(int4_linear),)


def unpacked(
    gm: GraphModule, name: str, weight: PackedWeight, exponents: Tensor | None, groups: int, shape: Sequence[int]
) -> Node:
    """A node with the shifted int8 codes of an integer layer (``layer.shifted_codes``), in ``shape``, [out, ...]."""
    zero_point = (weight.zero_point[:, 0] + weight.offset).to(torch.int8)
    factor = None if exponents is None else (1 << channel_shifts(exponents, groups)).to(torch.int8)
    return _unpack(gm, name, weight.packed, zero_point, factor, shape)


def _unpack(
    gm: GraphModule, name: str, packed: Tensor, zero_point: Tensor, factor: Tensor | None, shape: Sequence[int]
) -> Node:
    reads = [
        None if tensor is None else graph.add_tensor(gm, f"{name}.{word}", tensor)
        for word, tensor in (("packed", packed), ("packed_zero", zero_point), ("packed_factor", factor))
    ]
    return gm.graph.call_function(unpack_codes, (*reads, list(shape)))


def float_layer(gm: GraphModule, node: Node, record: LayerRecord, why: str) -> Kernel:
    """Let a layer that multiplies floats, for the reason ``why``, read packed codes if its record has them."""
    weight = record.weight
    if not isinstance(weight, PackedWeight):
        may = record.activation is None and weight.bits <= PACKED_BITS
        return Kernel(FLOAT_KERNEL, f"{why} (packed=True would keep two codes a byte)" if may else why)
    real = node.args[1]
    assert isinstance(real, Node)
    assert real.target == ops.dequantize_weight
    with gm.graph.inserting_before(real):
        offset = torch.tensor([weight.offset], dtype=torch.int8)
        codes = _unpack(gm, record.name, weight.packed, offset, None, weight.shape)
    real.args = (codes, *real.args[1:])
    if record.kind != "linear":
        return Kernel(FLOAT_KERNEL + PER_CALL, why)
    if _fitting_group(weight.shape[0], weight.shape[1] // weight.scale.shape[1]) is None:
        return Kernel(
            FLOAT_KERNEL + PER_CALL, f"{why}; the int4 kernel wants outputs by 16 and inputs of a scale by 32"
        )
    if node.meta[VAL].dtype != torch.bfloat16:
        return Kernel(
            FLOAT_KERNEL + PER_CALL, f"{why}; the int4 kernel multiplies bfloat16: mode='max', or such a denoiser"
        )
    _on_int4(gm, node)
    return Kernel(INT4, why)


def _fitting_group(out: int, shared: int) -> int | None:
    """Group size of the int4 kernel for ``shared`` inputs to a scale; None where its shapes do not allow any."""
    return next((size for size in _GROUPS if shared % size == 0 and out % _OUTPUTS == 0), None)


def use_int4(gm: GraphModule) -> GraphModule:
    """Put every float32 linear on packed codes on the int4 kernel, in place; inputs are rounded to bfloat16.

    Before:  linear(x, dequantize_weight(unpack_codes(..)), bias)       After:  int4_linear(x, ..., bias)
    """
    for node in list(gm.graph.nodes):
        if node.target is graph.LINEAR and _reads_packed(node) and node.meta[VAL].dtype == torch.float32:
            _on_int4(gm, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _reads_packed(node: Node) -> bool:
    real = node.args[1]
    if not isinstance(real, Node) or real.target is not ops.dequantize_weight:
        return False
    codes = real.args[0]
    return isinstance(codes, Node) and codes.target is unpack_codes


def _on_int4(gm: GraphModule, node: Node) -> None:
    """Replace a linear that reads packed codes, unless its shape does not fit the kernel."""
    real = node.all_input_nodes[1]
    unpack, scale_node, zero_node = real.all_input_nodes
    packed, offset = (graph.attribute(gm, read) for read in unpack.all_input_nodes)
    scale, zero_point = graph.attribute(gm, scale_node), graph.attribute(gm, zero_node)
    codes = numerics.unpack_rows(packed, len(scale))
    size = _fitting_group(len(scale), codes.shape[1] // scale.shape[1])
    if size is None:
        return
    whole = scale.amax(1)
    ratios = _ratios(scale / whole[:, None], zero_point + offset, codes.shape[1] // size)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    name = str(scale_node.target).removesuffix("_weight_scale")
    with gm.graph.inserting_before(node):
        tensors = (("int4", weight), ("int4_ratios", ratios), ("int4_scale", whole))
        reads = [graph.add_tensor(gm, f"{name}.{word}", tensor) for word, tensor in tensors]
        bias = node.args[2] if len(node.args) > 2 else None
        result = gm.graph.call_function(int4_linear, (node.args[0], *reads, bias, size))
    graph.replace_node(node, result)


def _ratios(scale: Tensor, zero_point: Tensor, groups: int) -> Tensor:
    """What the int4 kernel reads: [groups, out, 2] of ``scale`` and the value of its middle code."""
    pairs = torch.stack([scale, (_MIDDLE - zero_point) * scale], -1)
    return pairs.repeat_interleave(groups // scale.shape[1], 1).transpose(0, 1).to(torch.bfloat16).contiguous()
