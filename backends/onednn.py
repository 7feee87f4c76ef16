"""int8 on CPUs: convolutions and linears on oneDNN's u8 x s8 kernels, weights prepacked, exponents folded by shift.

A layer ``dequantize(quantize(x)) * dequantize_weight(codes)`` of the q/dq graph becomes one integer kernel that reads
the codes. The quantize step stays plain operators, so Inductor fuses it with the norm and activation before it.
Power-of-two exponents cost nothing when the shifted weight codes fit int8; codes too wide for that are multiplied in
up to four groups of channels, one group per exponent, each exact. Inputs of more than 8 bits are multiplied byte by
byte: ``q - zero_point = 2**s * (high - zero_high) + (low - zero_low)``.

The kernels are operators of their own (``dmq_ao::int_conv``, ``dmq_ao::int_linear``) because Inductor lowers oneDNN's
only under global freezing. Scales and zero points are tensors, so a table looked up by timestep needs no
recompilation. The zero point never reaches oneDNN, whose compensation for it is slow: padding is written as codes, and
the rest, ``zero_point`` times the sum of the weights, is taken off the bias.

A record that keeps its codes packed stays packed in the graph (``onednn_packed``): the kernels take a weight that
oneDNN prepacked once, or plain int8 codes, which they prepack for the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph, ops
from dmq_ao.backends import onednn_packed
from dmq_ao.layer import (
    Kernel,
    LayerPlan,
    LayerRecord,
    PackedRecords,
    PackedWeight,
    WeightRecord,
    joined,
    outline,
    shift_fits_int8,
    shifted_codes,
)
from dmq_ao.passes.hoist_tables import hoist_tables
from dmq_ao.passes.join_siblings import join_siblings
from dmq_ao.values import VAL

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

    def kernel(part: Tensor, x_scale: float, x_zero: int) -> Tensor:
        offset = _offset(x_scale * x_zero, weight_sum, bias)
        args = (part, x_scale, 0, weight, weight_scale, weight_zero, offset)
        result: Tensor = torch.ops.onednn.qlinear_pointwise.default(*args, 1.0, 0, dtype, "none", [], "")
        return result

    return _by_rows(kernel, codes, scale, zero_point)


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


@dataclass(frozen=True)
class _Convolution:
    """Geometry of a convolution node; a 1-d one is run as 2-d of height one."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @classmethod
    def of(cls, node: Node, dims: int) -> _Convolution:
        defaults = ([1], [0], [1], 1)
        given: list[Any] = [*node.args[3:], *defaults[len(node.args) - 3 :]] if len(node.args) > 3 else list(defaults)
        stride, padding, dilation = (_repeat(value, dims) for value in given[:3])
        return cls(stride, padding, dilation, given[3])

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether this is one product of pixels by a matrix, for which oneDNN has the better linear kernels."""
        return weight[0, 0].numel() == 1 and self.groups == 1 and set(self.stride) == {1} and set(self.padding) == {0}


def _repeat(value: Any, dims: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [int(value)]
    return values * dims if len(values) == 1 else values


Instead = Callable[[GraphModule, Node, LayerRecord], Kernel | None]


class OneDNN:
    """int8 kernels of oneDNN, reached through PyTorch."""

    name = "onednn"

    def unsupported(self, plan: Mapping[str, LayerPlan]) -> list[str]:
        """Reasons why a plan cannot run, one sentence each; what runs slower is no reason."""
        reasons = []
        if not hasattr(torch.ops.onednn, "qconv_pointwise"):
            reasons.append(
                "this PyTorch build has no oneDNN quantized kernels (torch.ops.onednn); use backend='reference'"
            )
        for item in plan.values():
            if item.power_of_two is not None and item.power_of_two.per_step:
                reasons.append(
                    f"{item.name}: exponents of each timestep cannot be folded into one stored weight; use"
                    " backend='reference', or power_of_two with per_step=False"
                )
            if (
                item.weight is not None
                and item.activation is not None
                and not item.weight.symmetric
                and item.weight.bits > 7
            ):
                reasons.append(
                    f"{item.name}: asymmetric {item.weight.bits}-bit weight codes do not fit int8 once their zero"
                    " point is taken off; use symmetric=True, or at most 7 bits"
                )
        return reasons

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
        kernels: dict[str, Kernel] = {}
        outlines = {name: outline(records, name) for name in graph.layer_nodes(gm) if name in records}
        for name, node in graph.layer_nodes(gm).items():
            why = _why_not(outlines[name], node) if name in outlines else ""
            if why:
                kernels[name] = onednn_packed.float_layer(gm, node, records[name], why)
                del outlines[name]
        joint = {} if isinstance(records, PackedRecords) else join_siblings(gm, outlines)
        for name, node in graph.layer_nodes(gm).items():
            members = joint.get(name, (name,) if name in outlines else ())
            if members:
                record = joined([records[member] for member in members])
                kernel = instead(gm, node, record) or _lower(gm, node, record)
                kernels |= dict.fromkeys(members, kernel)
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
    if record.activation is None:
        return "weight-only: the input is float"
    if record.weight.scale.shape[1] > 1:
        return "a scale per group of inputs: an integer sum cannot run across groups"
    if record.kind == "conv3d":
        return "no int8 kernel for 3-d convolutions"
    if not has_vnni():
        return "this CPU has no VNNI: its int8 products saturate"
    exponents = record.activation.exponents
    grouped = record.kind != "linear" and _Convolution.of(node, 2).groups > 1
    if grouped and exponents is not None and not _fits(record):
        return "exponents of a grouped convolution whose shifted codes do not fit int8"
    return ""


def _fits(record: LayerRecord) -> bool:
    assert record.activation is not None
    exponents = record.activation.exponents
    largest = 0 if exponents is None else int(exponents.max())
    return shift_fits_int8(record.weight.bits, record.weight.symmetric, largest)


def _lower(gm: GraphModule, node: Node, record: LayerRecord) -> Kernel:
    bias = node.args[2] if len(node.args) > 2 else None
    word = "linear" if record.kind == "linear" else "convolution"
    assert record.activation is not None
    why = []
    with gm.graph.inserting_before(node):
        fits = _fits(record)
        folded = record.activation.exponents if fits else None
        largest = 0 if folded is None else int(folded.max())
        products = _bytes(gm, node, record.activation.bits, record.weight, folded, 2.0**-largest)
        if len(products) > 1:
            why.append(f"one product per byte of a {record.activation.bits}-bit input")
        if not fits:
            products = [part for one in products for part in _by_exponent(gm, record, one)]
            why.append("one product per exponent: shifted codes are wider than int8")
        result = _emit(gm, node, record, products[0], bias)
        for one in products[1:]:
            part = _emit(gm, node, record, one, None)
            result = gm.graph.call_function(graph.aten.add.Tensor, (result, part))
    result.meta = {**node.meta}
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    times = f" x{len(products)}" if why else ""
    when = onednn_packed.PER_CALL if isinstance(record.weight, PackedWeight) else ""
    return Kernel(f"onednn int8 {word}{times}{when}", "; ".join(why))


@dataclass(frozen=True, eq=False)
class _Product:
    """One integer kernel: uint8 codes times int8-sized codes of the weight, each counting ``factor * scale``.

    The weight's codes are shifted by ``exponents``, if there are any.
    """

    codes: Node
    scale: Any
    zero_point: Any
    weight: WeightRecord
    exponents: Tensor | None
    factor: float


def _bytes(
    gm: GraphModule, node: Node, bits: int, weight: WeightRecord, exponents: Tensor | None, factor: float
) -> list[_Product]:
    """The products that a layer's input makes: one, or a high and a low byte of wide codes."""
    real = node.args[0]
    assert isinstance(real, Node)
    assert real.target == ops.dequantize
    codes, scale, zero_point = real.args[:3]
    assert isinstance(codes, Node)
    if bits <= 8:
        return [_Product(codes, scale, zero_point, weight, exponents, factor)]
    call, shift = gm.graph.call_function, bits - 8
    high, zero_high = (
        call(graph.aten.bitwise_right_shift.Tensor_Scalar, (whole, shift)) for whole in (codes, zero_point)
    )
    low, zero_low = (call(graph.aten.bitwise_and.Scalar, (whole, (1 << shift) - 1)) for whole in (codes, zero_point))
    high, low = (call(graph.aten.to.dtype, (part, torch.uint8)) for part in (high, low))
    return [
        _Product(high, scale, zero_high, weight, exponents, factor * 2.0**shift),
        _Product(low, scale, zero_low, weight, exponents, factor),
    ]


def _by_exponent(gm: GraphModule, record: LayerRecord, whole: _Product) -> list[_Product]:
    """A product for each exponent, over the channels that have it."""
    assert record.activation is not None
    assert record.activation.exponents is not None
    exponents, axis = record.activation.exponents, record.activation.ch_axis
    products = []
    for exponent in exponents.unique().tolist():
        index = torch.nonzero(exponents == exponent)[:, 0]
        index_node = graph.add_tensor(gm, f"{record.name}.channels", index)
        chosen = gm.graph.call_function(graph.aten.index_select.default, (whole.codes, axis, index_node))
        weight = replace(whole.weight, codes=whole.weight.codes.index_select(1, index))
        products.append(replace(whole, codes=chosen, factor=whole.factor * 2.0**-exponent, weight=weight))
    return products


def _emit(gm: GraphModule, node: Node, record: LayerRecord, product: _Product, bias: Any) -> Node:
    """The nodes of one integer kernel."""
    call = gm.graph.call_function
    codes = product.codes
    conv = None if record.kind == "linear" else _Convolution.of(node, 1 if record.kind == "conv1d" else 2)
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
            weight, codes = weight.flatten(1), _turned(gm, codes, to=-1)
        packed = _weight(gm, record.name, product, groups, weight, torch.ops.onednn.qlinear_prepack, None)
        codes = call(graph.aten.contiguous.default, (codes,))
        target, geometry = torch.ops.dmq_ao.int_linear.default, ()
    else:
        shape = (conv.stride, conv.padding, conv.dilation)
        if record.kind == "conv1d":
            weight, codes = weight.unsqueeze(2), call(graph.aten.unsqueeze.default, (codes, 2))
            shape = ([1, *conv.stride], [0, *conv.padding], [1, *conv.dilation])
        args = (weight_scale, 1.0, 0, *shape, groups, None)
        packed = _weight(gm, record.name, product, groups, weight, torch.ops.onednn.qconv_prepack, *args)
        codes = _channels_last(gm, codes)
        target = torch.ops.dmq_ao.int_conv.default
        geometry = (*shape, groups, list(weight.shape[2:]))  # type: ignore[assignment]
    result = call(
        target, (codes, product.scale, product.zero_point, packed, scale_node, sum_node, bias, *geometry, kernel_dtype)
    )
    if pointwise:
        result = _turned(gm, result, to=1)
    elif record.kind == "conv1d":
        result = call(graph.aten.squeeze.dim, (result, 2))
    if kernel_dtype != out_dtype:
        result = call(graph.aten.to.dtype, (result, out_dtype))
    return result


def _weight(
    gm: GraphModule,
    name: str,
    product: _Product,
    groups: int,
    codes: Tensor,
    prepack: Callable[..., Tensor],
    *args: Any,
) -> Node:
    """The node of a weight: prepacked once, or unpacked in every call where the record keeps it packed."""
    if isinstance(product.weight, PackedWeight):
        return onednn_packed.unpacked(gm, name, product.weight, product.exponents, groups, codes.shape)
    return graph.add_tensor(gm, f"{name}.packed", prepack(codes, *args))


def _row_sums(weight: Tensor) -> Tensor:
    """Sums [out] int32 of the codes of each output, some rows at a time: torch widens what it sums."""
    return torch.cat([rows.sum(1, dtype=torch.int32) for rows in weight.flatten(1).split(64)])


def _turned(gm: GraphModule, value: Node, to: int) -> Node:
    """Channels moved from axis 1 to the last, or back: a view of channels-last memory."""
    return gm.graph.call_function(torch.ops.aten.movedim.int, (value, -to, to))


def _channels_last(gm: GraphModule, codes: Node) -> Node:
    """The codes laid out channels-last, once for all their readers."""
    for user in codes.users:
        if user.target == graph.aten.contiguous.default and user.kwargs:
            return user
    with gm.graph.inserting_after(codes):
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        return gm.graph.call_function(graph.aten.contiguous.default, (codes,), layout)
