"""int8 on CPUs: convolutions and linears on oneDNN's u8 x s8 kernels, weights prepacked, exponents folded by shift.

A layer ``dequantize(quantize(x)) * dequantize_weight(codes)`` of the q/dq graph becomes one integer kernel that reads
the codes. The quantize step stays plain operators, so Inductor fuses it with the norm and activation before it.
``products`` says which layers take more than one.

The kernels are operators of their own (``dmq_ao::int_conv``, ``dmq_ao::int_linear``) because Inductor lowers oneDNN's
only under global freezing. Scales and zero points are tensors, so a table looked up by timestep needs no
recompilation. The zero point never reaches oneDNN, whose compensation for it is slow: padding is written as codes, and
the rest, ``zero_point`` times the sum of the weights, is taken off the bias.

A record that keeps its codes packed stays packed in the graph (``onednn_packed``): the kernels take a weight that
oneDNN prepacked once, or plain int8 codes, which they prepack for the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.onednn import packed as onednn_packed
from dmq_ao.backends.products import (
    Convolution,
    Product,
    channels_last,
    fits,
    replace_layer,
    replace_layers,
    turned,
    unfoldable,
    why_float,
)
from dmq_ao.graph.values import VAL
from dmq_ao.passes.hoist_tables import hoist_tables
from dmq_ao.records import Kernel, LayerPlan, LayerRecord, PackedRecords, PackedWeight, WeightRecord, shifted_codes

_library = torch.library.Library("dmq_ao", "FRAGMENT")
_library.define(
    "int_conv(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int[] kernel_size, ScalarType dtype)"
    " -> Tensor"
)
_library.define(
    "int_linear(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? bias, ScalarType dtype) -> Tensor"
)


def _by_rows(
    kernel: Callable[[Tensor, float, int], Tensor], codes: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Run a kernel that takes one scale and zero point; rows of other timesteps go in calls of their own."""
    pairs = list(zip(scale.tolist(), zero_point.tolist(), strict=True))
    if all(pair == pairs[0] for pair in pairs):
        return kernel(codes, *pairs[0])
    return torch.cat([kernel(codes[i : i + 1], *pair) for i, pair in enumerate(pairs)])


def _offset(shift: float, weight_sum: Tensor, bias: Tensor | None) -> Tensor:
    """What is left of the bias once the zero point is off every code: oneDNN's own way costs up to half the time."""
    offset = weight_sum * -shift
    return offset if bias is None else offset + bias.to(offset.dtype)


def _int_conv(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kernel_size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    del kernel_size
    if not weight.is_mkldnn:
        geometry = (stride, padding, dilation, groups)
        weight = torch.ops.onednn.qconv_prepack(weight, weight_scale, 1.0, 0, *geometry, None)
    weight_zero = torch.zeros_like(weight_scale, dtype=torch.int32)

    def kernel(part: Tensor, x_scale: float, x_zero: int) -> Tensor:
        around = list(padding)
        if x_zero and any(around):
            part, around = F.pad(part, [pad for pad in reversed(around) for _ in range(2)], value=x_zero), [0, 0]
        offset = _offset(x_scale * x_zero, weight_sum, bias)
        args = (part, x_scale, 0, weight, weight_scale, weight_zero, offset, stride, around, dilation, groups)
        result: Tensor = torch.ops.onednn.qconv_pointwise.default(*args, 1.0, 0, dtype, "none", [], "")
        return result

    return _by_rows(kernel, codes, scale, zero_point)


def _int_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if not weight.is_mkldnn:
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
    weight_zero = torch.zeros_like(weight_scale, dtype=torch.int32)

    def multiply(part: Tensor, x_scale: float, offset: Tensor | None, out: torch.dtype) -> Tensor:
        args = (part, x_scale, 0, weight, weight_scale, weight_zero, offset)
        result: Tensor = torch.ops.onednn.qlinear_pointwise.default(*args, 1.0, 0, out, "none", [], "")
        return result

    def kernel(part: Tensor, x_scale: float, x_zero: int) -> Tensor:
        return multiply(part, x_scale, _offset(x_scale * x_zero, weight_sum, bias), dtype)

    if codes.dim() > 2 or len(scale) == 1:
        return _by_rows(kernel, codes, scale, zero_point)
    # Vectors: a call for each would read the whole weight for one product a row.
    product = multiply(codes, 1.0, None, torch.float32)
    result = (product - zero_point.unsqueeze(1) * weight_sum) * scale.unsqueeze(1)
    return (result if bias is None else result + bias).to(dtype)


# Prepacked weights are opaque oneDNN tensors, which dispatch on a key of their own.
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("int_conv", _int_conv, _key)
    _library.impl("int_linear", _int_linear, _key)


def fake_conv(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kernel_size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Shape and layout of an integer convolution, for the compiler."""
    sizes = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(codes.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    layout = torch.channels_last if len(sizes) == 2 else torch.contiguous_format
    shape = (codes.shape[0], weight_scale.shape[0], *sizes)
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=layout)


def fake_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Shape of an integer linear, for the compiler."""
    return codes.new_empty((*codes.shape[:-1], weight_scale.shape[0]), dtype=dtype)


torch.library.register_fake("dmq_ao::int_conv", fake_conv)
torch.library.register_fake("dmq_ao::int_linear", fake_linear)


Instead = Callable[[GraphModule, Node, LayerRecord], Kernel | None]


class OneDNN:
    """int8 kernels of oneDNN, reached through PyTorch."""

    name = "onednn"

    def why_not_on(self, device: torch.device) -> str:
        """Why it does not run on a device, and what to do; empty when it does."""
        return "" if device.type == "cpu" else f"it is for CPUs and the denoiser is on {device}; move it"

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run, one sentence each; what runs slower is no reason."""
        if hasattr(torch.ops.onednn, "qconv_pointwise"):
            return unfoldable(plan)
        missing = "this PyTorch build has no oneDNN quantized kernels (torch.ops.onednn); use backend='reference'"
        return [missing, *unfoldable(plan)]

    def lower(
        self, gm: GraphModule, records: Mapping[str, LayerRecord], instead: Instead = lambda *_: None
    ) -> tuple[GraphModule, dict[str, Kernel]]:
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
            _why_not,
            lambda node, name, why: onednn_packed.float_layer(gm, node, records[name], why),
            lambda node, record: instead(gm, node, record) or _lower(gm, node, record),
            join=not isinstance(records, PackedRecords),
        )
        hoist_tables(gm)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm, kernels


def has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8 without saturating in 16 bits (AVX512-VNNI, AVX-VNNI or AMX)."""
    check = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(check and check())


def _why_not(record: LayerRecord, node: Node) -> str:
    """Why a layer has no integer kernel here; empty when it has one."""
    why = why_float(record)
    if why:
        return why
    if record.weight.float8:
        return "float8: CPUs multiply no such codes; use w8a8"
    if not has_vnni():
        return "this CPU has no VNNI: its int8 products saturate"
    conv = Convolution.of(node, record.kind)
    if conv is not None and conv.groups > 1 and not fits(record):
        return "exponents of a grouped convolution whose shifted codes do not fit int8"
    return ""


def _lower(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel:
    word = "linear" if record.kind == "linear" else "convolution"
    times, why = replace_layer(gm, node, record, partial(_emit, gm, node, record, {}))
    when = onednn_packed.PER_CALL if isinstance(record.weight, PackedWeight) else ""
    return Kernel(f"onednn int8 {word}{times}{when}", why)


def _emit(
    gm: GraphModule, node: Node, record: LayerRecord, weights: dict[WeightRecord, Node], product: Product, bias: Any
) -> Node:
    """The nodes of one integer kernel; ``weights`` holds the weights that other products of the layer read."""
    call = gm.graph.call_function
    codes = product.codes
    conv = Convolution.of(node, record.kind)
    groups = 1 if conv is None else conv.groups
    weight = shifted_codes(product.weight, product.exponents, groups)[0].to(torch.int8)
    out_dtype: torch.dtype = node.meta[VAL].dtype
    kernel_dtype = out_dtype if out_dtype in (torch.float32, torch.bfloat16) else torch.float32
    # The layer's power of two goes into the weight scale: exact, and the table of input scales stays shared.
    weight_scale = record.weight.scale[:, 0] * product.factor
    weight_sum = _row_sums(weight) * weight_scale
    scale_node = graph.add_tensor(gm, f"{record.name}.kernel_scale", weight_scale)
    sum_node = graph.add_tensor(gm, f"{record.name}.kernel_sum", weight_sum)
    pointwise = conv is not None and conv.is_pointwise(weight)
    if conv is None or pointwise:
        if pointwise:
            weight, codes = weight.flatten(1), turned(gm, codes, to=-1)
        prepack = partial(torch.ops.onednn.qlinear_prepack, weight, None)
        codes = call(graph.aten.contiguous.default, (codes,))
        target, geometry = torch.ops.dmq_ao.int_linear.default, ()
    else:
        shape = conv.in_2d
        if record.kind == "conv1d":
            weight, codes = weight.unsqueeze(2), call(graph.aten.unsqueeze.default, (codes, 2))
        prepack = partial(torch.ops.onednn.qconv_prepack, weight, weight_scale, 1.0, 0, *shape, groups, None)
        codes = channels_last(gm, codes)
        target = torch.ops.dmq_ao.int_conv.default
        geometry = (*shape, groups, list(weight.shape[2:]))  # type: ignore[assignment]
    if product.weight not in weights:
        weights[product.weight] = _weight(gm, record.name, product, groups, weight.shape, prepack)
    reads = (weights[product.weight], scale_node, sum_node)
    result = call(target, (codes, product.scale, product.zero_point, *reads, bias, *geometry, kernel_dtype))
    if pointwise:
        result = turned(gm, result, to=1)
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
        return onednn_packed.unpacked(gm, name, product.weight, product.exponents, groups, shape)
    return graph.add_tensor(gm, f"{name}.packed", prepack())


def _row_sums(weight: Tensor) -> Tensor:
    """Sums [out] int32 of the codes of each output, some rows at a time: torch widens what it sums."""
    return torch.cat([rows.sum(1, dtype=torch.int32) for rows in weight.flatten(1).split(64)])
