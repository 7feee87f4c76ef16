"""The integer products that a layer of the q/dq graph becomes, whichever kernel runs them.

A layer is one product of its input's codes and its weight's. Power-of-two exponents cost nothing when the shifted
weight codes fit int8; codes too wide for that are multiplied in up to four groups of channels, one group per exponent,
each exact. Inputs of more than 8 bits are multiplied byte by byte:
``q - zero_point = 2**s * (high - zero_high) + (low - zero_low)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.graph.values import VAL
from dmq_ao.numerics import ops
from dmq_ao.passes.join_siblings import join_siblings
from dmq_ao.passes.look_up_codes import look_up_codes
from dmq_ao.records import Kernel, LayerPlan, LayerRecord, WeightRecord, joint_record, outline, shift_fits_int8

LOOK_UP = "look-up of codes"  # the kernel of an embedding table
FLOAT_KERNEL = "float on dequantized values"  # of a layer that stays as the graph has it


@dataclass(frozen=True, eq=False)
class Product:
    """One integer kernel: uint8 codes times int8-sized codes of the weight, each counting ``factor * scale``.

    The weight's codes are shifted by ``exponents`` [C], if there are any.
    """

    codes: Node
    scale: Any
    zero_point: Any
    weight: WeightRecord
    exponents: Tensor | None
    factor: float


Emit = Callable[[Product, Any], Node]


def fits(record: LayerRecord) -> bool:
    """Whether every weight code of a layer, shifted by its exponent, is an int8."""
    assert record.activation is not None
    exponents = record.activation.exponents
    largest = 0 if exponents is None else int(exponents.max())
    return shift_fits_int8(record.weight.bits, record.weight.symmetric, largest)


def unfoldable(plan: Mapping[str, LayerPlan]) -> list[str]:
    """What of a plan cannot be folded into one stored int8 weight, one sentence each."""
    reasons = []
    for item in plan.values():
        if item.power_of_two is not None and item.power_of_two.per_step:
            reasons.append(
                f"{item.name}: exponents of each timestep cannot be folded into one stored weight; use"
                " backend='reference', or power_of_two with per_step=False"
            )
        weight = item.weight if item.activation is not None else None
        if weight is not None and not weight.symmetric and weight.bits > 7:
            reasons.append(
                f"{item.name}: asymmetric {weight.bits}-bit weight codes do not fit int8 once their zero point is"
                " taken off; use symmetric=True, or at most 7 bits"
            )
    return reasons


def why_float(record: LayerRecord) -> str:
    """Why no backend multiplies a layer as integers; empty when one might."""
    if record.activation is None:
        return "weight-only: the input is float"
    if record.weight.scale.shape[1] > 1:
        return "a scale per group of inputs: an integer sum cannot run across groups"
    if record.weight.float8 != record.activation.float8:
        return "float8 times integers: there is no such product"
    return "no int8 kernel for 3-d convolutions" if record.kind == "conv3d" else ""


def replace_layers(
    gm: GraphModule,
    records: Mapping[str, LayerRecord],
    why_not: Callable[[LayerRecord, Node], str],
    in_float: Callable[[Node, str, str], Kernel],
    in_integers: Callable[[Node, LayerRecord], Kernel],
    join: bool = True,
) -> dict[str, Kernel]:
    """Give every layer of a q/dq graph its kernel, in place.

    Args:
        gm: the graph.
        records: of its layers.
        why_not: why a layer stays in float; empty when it does not.
        in_float: does what is to be done with the node of such a layer, given its name and the reason.
        in_integers: replaces the node of a layer, or of joint layers with their joint record.
        join: whether linears that read the same codes become one.

    Returns:
        The kernel of each layer.
    """
    kernels = {name: Kernel(LOOK_UP) for name in look_up_codes(gm)}
    layers = [name for name in graph.layer_nodes(gm) if name in records and name not in kernels]
    outlines = {name: outline(records, name) for name in layers}
    for name, node in graph.layer_nodes(gm).items():
        why = why_not(outlines[name], node) if name in outlines else ""
        if why:
            kernels[name] = in_float(node, name, why)
            del outlines[name]
    joint = join_siblings(gm, outlines) if join else {}
    for name, node in graph.layer_nodes(gm).items():
        members = joint.get(name, (name,) if name in outlines else ())
        if members:
            record = joint_record([records[member] for member in members])
            kernels |= dict.fromkeys(members, in_integers(node, record))
    return kernels


def replace_layer(gm: GraphModule, node: Node, record: LayerRecord, emit: Emit) -> tuple[str, str]:
    """Put integer products in the place of a layer's node.

    Args:
        gm: the graph.
        node: of the layer, which is erased.
        record: of the layer.
        emit: adds the nodes of one product, given the node of the bias or None.

    Returns:
        How many products there are, as a suffix `` xN`` of a kernel's name, and why more than one; else empty words.
    """
    bias = node.args[2] if len(node.args) > 2 else None
    assert record.activation is not None
    why = []
    with gm.graph.inserting_before(node):
        whole = fits(record)
        folded = record.activation.exponents if whole else None
        largest = 0 if folded is None else int(folded.max())
        products = _bytes(gm, node, record.activation.bits, record.weight, folded, 2.0**-largest)
        if len(products) > 1:
            why.append(f"one product per byte of a {record.activation.bits}-bit input")
        if not whole:
            products = [part for one in products for part in _by_exponent(gm, record, one)]
            why.append("one product per exponent: shifted codes are wider than int8")
        parts = [emit(one, bias if one is products[0] else None) for one in products]
        for part in parts:
            part.meta[VAL] = node.meta[VAL]
        result = parts[0]
        for part in parts[1:]:
            result = gm.graph.call_function(graph.aten.add.Tensor, (result, part))
    graph.replace_node(node, result)
    return f" x{len(products)}" if why else "", "; ".join(why)


def _bytes(
    gm: GraphModule, node: Node, bits: int, weight: WeightRecord, exponents: Tensor | None, factor: float
) -> list[Product]:
    """The products that a layer's input makes: one, or a high and a low byte of wide codes."""
    real = node.args[0]
    assert isinstance(real, Node)
    assert real.target == ops.dequantize
    codes, scale, zero_point = real.args[:3]
    assert isinstance(codes, Node)
    if bits <= 8:
        return [Product(codes, scale, zero_point, weight, exponents, factor)]
    call, shift = gm.graph.call_function, bits - 8
    high, zero_high = (
        call(graph.aten.bitwise_right_shift.Tensor_Scalar, (whole, shift)) for whole in (codes, zero_point)
    )
    low, zero_low = (call(graph.aten.bitwise_and.Scalar, (whole, (1 << shift) - 1)) for whole in (codes, zero_point))
    high, low = (call(graph.aten.to.dtype, (part, torch.uint8)) for part in (high, low))
    return [
        Product(high, scale, zero_high, weight, exponents, factor * 2.0**shift),
        Product(low, scale, zero_low, weight, exponents, factor),
    ]


def _by_exponent(gm: GraphModule, record: LayerRecord, whole: Product) -> list[Product]:
    """A product for each exponent, over the channels that have it."""
    assert record.activation is not None
    assert record.activation.exponents is not None
    exponents, axis = record.activation.exponents, record.activation.ch_axis
    products = []
    for exponent in exponents.unique().tolist():
        index = torch.nonzero(exponents == exponent)[:, 0]
        index_node = graph.add_tensor(gm, f"{record.name}.channels", index)
        codes = gm.graph.call_function(graph.aten.index_select.default, (whole.codes, axis, index_node))
        weight = replace(whole.weight, codes=whole.weight.codes.index_select(1, index))
        products.append(replace(whole, codes=codes, factor=whole.factor * 2.0**-exponent, weight=weight))
    return products


def move_channels(gm: GraphModule, value: Node, to: int) -> Node:
    """Channels moved from axis 1 to the last, or back: a view of channels-last memory."""
    return gm.graph.call_function(torch.ops.aten.movedim.int, (value, -to, to))


def channels_last(gm: GraphModule, codes: Node) -> Node:
    """The codes laid out channels-last, once for all their readers."""
    for user in codes.users:
        if user.target == graph.aten.contiguous.default and user.kwargs:
            return user
    with gm.graph.inserting_after(codes):
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        return gm.graph.call_function(graph.aten.contiguous.default, (codes,), layout)


def random_codes(dtype: torch.dtype, *shape: int) -> Tensor:
    """Whole numbers [*shape] over the range of ``dtype``, the same ones each time, to measure kernels on."""
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
