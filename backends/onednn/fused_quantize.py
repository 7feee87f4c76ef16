"""What stands before a quantize step computed with it, so that one byte is written: GELU, and norm with SiLU."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from dmq_ao.backends.onednn.matching import behind, has_one_reader, rank_of
from dmq_ao.backends.onednn.operators import PADDING
from dmq_ao.graph import aten
from dmq_ao.graph.values import VAL


def fuse_gelu(gm: GraphModule, quantize: Node) -> None:
    """GELU, or a factor times GELU (GEGLU), before quantize."""
    x, scale, zero_point, channel_scale, ch_axis, _, quant_max = quantize.args
    assert isinstance(x, Node)
    assert isinstance(quant_max, int)
    gelu, factor = behind(x, None)[0], None
    if gelu.target is aten.mul.Tensor and has_one_reader(gelu) and len(gelu.all_input_nodes) == 2:
        factor, gelu = gelu.all_input_nodes if _gelu_kind(gelu.all_input_nodes[1]) else gelu.all_input_nodes[::-1]
        gelu, _ = behind(gelu, None)
    kind = _gelu_kind(gelu)
    if kind is None or not has_one_reader(gelu) or quant_max > 255:
        return
    source = gelu.args[0]
    assert isinstance(source, Node)
    if rank_of(gelu) < 2 or ch_axis not in (-1, rank_of(gelu) - 1):
        return
    if factor is not None and factor.meta[VAL].shape != source.meta[VAL].shape:
        return
    with gm.graph.inserting_before(quantize):
        args = (source, factor, kind == "tanh", scale, zero_point, channel_scale, quant_max)
        codes = gm.graph.call_function(torch.ops.dmq_ao_cpu.gelu_quantize.default, args)
    quantize.replace_all_uses_with(codes)


def _gelu_kind(node: Node) -> str | None:
    """The formula of a GELU, ``tanh`` or ``none`` (erf) as PyTorch calls them; None for any other node."""
    node, _ = behind(node, None)
    if node.target is torch.ops.dmq_ao.gelu_tanh.default:
        return "tanh"
    return str(node.kwargs.get("approximate", "none")) if node.target is aten.gelu.default else None


def fuse_norm(gm: GraphModule, quantize: Node) -> None:
    """Group norm, with a SiLU and a transposition after it, before quantize."""
    x, scale, zero_point, channel_scale, ch_axis, _, quant_max = quantize.args
    assert isinstance(x, Node)
    assert isinstance(quant_max, int)
    x, turn = behind(x, aten.transpose.int)
    x, silu = behind(x, aten.silu.default)
    norm, _ = behind(x, None)
    if norm.target is not aten.group_norm.default or not has_one_reader(norm) or norm.kwargs or quant_max > 255:
        return
    rank = rank_of(norm)
    swapped = turn is not None and rank == 3 and {int(axis) % 3 for axis in turn.args[1:]} == {1, 2}  # type: ignore
    axis = 1 if turn is None else 2
    if rank not in (3, 4) or (turn is not None and not swapped) or ch_axis not in (axis, axis - rank):
        return
    norm_args = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])
    source = norm_args[0]
    assert isinstance(source, Node)
    value, shift = _shifted(source)
    with gm.graph.inserting_before(quantize):
        args = (value, shift, *norm_args[1:5], silu is not None, scale, zero_point, channel_scale, quant_max, [0, 0])
        codes = gm.graph.call_function(torch.ops.dmq_ao_cpu.group_norm_quantize.default, args)
        if turn is not None:
            codes = gm.graph.call_function(aten.transpose.int, (codes, *turn.args[1:]))
    quantize.replace_all_uses_with(codes)
    gm.graph.erase_node(quantize)


def _shifted(value: Node) -> tuple[Node, Node | None]:
    """``h + t[:, :, None, None]`` as ``h`` and ``t`` [B, C]; anything else as it is."""
    total, _ = behind(value, None)
    if total.target is not aten.add.Tensor or not has_one_reader(total) or len(total.all_input_nodes) != 2:
        return value, None
    if total.kwargs.get("alpha", 1) != 1:
        return value, None
    h, t = total.all_input_nodes
    spatial = h.meta[VAL].dim() - 2
    for _ in range(spatial):
        if t.target is not aten.unsqueeze.default or t.args[1] not in (-1, t.meta[VAL].dim() - 1):
            return value, None
        t = t.all_input_nodes[0]
    return (h, t) if t.meta[VAL].dim() == 2 else (value, None)


def take_padding(conv: Node) -> None:
    """Let the norm before a convolution, if nothing else reads it, write the padding too."""
    norm = conv.args[0]
    assert isinstance(norm, Node)
    if norm.target is aten.contiguous.default:
        norm = norm.all_input_nodes[0]
    around = conv.args[PADDING]
    if norm.target is not torch.ops.dmq_ao_cpu.group_norm_quantize.default or not has_one_reader(norm):
        return
    conv.args = (norm, *conv.args[1:PADDING], [0, 0], *conv.args[PADDING + 1 :])
    norm.args = (*norm.args[:-1], around)
