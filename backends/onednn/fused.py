"""What ``dmq_ao.compile(mode="max")`` adds on CPUs: operators of our own, compiled for the machine on first use.

Inductor's group norm over channels-last memory reads each group's few channels alone; here norm, SiLU and quantize are
two passes over contiguous rows, and uint8 is written once. The integer kernels are oneDNN's, reached without Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.backends.onednn import backend as onednn
from dmq_ao.graph.values import VAL, Value
from dmq_ao.numerics import ops

aten = torch.ops.aten
_SOURCE = Path(__file__).with_name("onednn_kernels.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


@functools.cache
def load_kernels() -> None:
    """Compile the operators ``dmq_ao_cpu::*``, or take them from PyTorch's cache of extensions, and register them.

    Raises:
        RuntimeError: without a C++ compiler or ninja, with what to install.
    """
    from torch.utils import cpp_extension

    try:
        # A build has a folder of its own for each source, torch and CPU: homes are shared, machine code is not.
        cpu: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        where = [*_FLAGS, torch.__version__, platform.machine(), str(sorted(cpu.items()))]
        key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(where).encode()).hexdigest()[:12]
        with _pip_ninja():
            cpp_extension.load(f"dmq_ao_cpu_{key}", [str(_SOURCE)], extra_cflags=_FLAGS, is_python_module=False)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            "the fused CPU kernels could not be compiled; install a C++ compiler (g++ or clang) and ninja (pip install"
            f' ninja), or use mode="default". The compiler said: {error}'
        ) from error
    torch.library.register_fake("dmq_ao_cpu::group_norm_quantize", _fake_norm)
    torch.library.register_fake("dmq_ao_cpu::float_linear", _fake_linear)
    torch.library.register_fake("dmq_ao_cpu::gelu_quantize", _fake_gelu)
    torch.library.register_fake("dmq_ao_cpu::attention", _fake_attention)
    torch.library.register_fake("dmq_ao_cpu::conv", onednn.fake_conv)
    torch.library.register_fake("dmq_ao_cpu::linear", onednn.fake_linear)
    torch.library.register_fake("dmq_ao_cpu::two_byte_linear", _fake_two_bytes)


@contextlib.contextmanager
def _pip_ninja() -> Iterator[None]:
    """The ninja that pip installed, found even where the environment is not activated."""
    before = os.environ.get("PATH", "")
    if importlib.util.find_spec("ninja") is not None:
        folder = importlib.import_module("ninja").BIN_DIR
        os.environ["PATH"] = os.pathsep.join([before, folder]) if before else folder
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fake_norm(
    x: Tensor,
    shift: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    quant_max: int,
    padding: Sequence[int],
) -> Tensor:
    sizes = [size + 2 * pad for size, pad in zip(x.shape[2:], padding[-(x.dim() - 2) :], strict=True)]
    return x.new_empty((x.shape[0], *sizes, x.shape[1]), dtype=torch.uint8).movedim(-1, 1)


def _fake_gelu(
    x: Tensor,
    factor: Tensor | None,
    tanh: bool,
    scale: Tensor,
    zero_point: Tensor,
    channel_scale: Tensor | None,
    quant_max: int,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_two_bytes(
    high: Tensor,
    low: Tensor,
    scale: Tensor,
    zero_high: Tensor,
    zero_low: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    ratio: float,
) -> Tensor:
    return scale.new_empty((high.shape[0], weight_scale.shape[0]))


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, rows, width = query.shape
    return query.new_empty((batch, rows, heads, width)).transpose(1, 2)


def fuse(gm: GraphModule) -> GraphModule:
    """Put the compiled operators into a graph that the oneDNN backend lowered, in place.

    Before:  group_norm -> silu -> quantize -> int_conv      After:  group_norm_quantize -> conv
    """
    load_kernels()
    for node in list(gm.graph.nodes):
        if node.target is aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.all_input_nodes[0])  # torch.fx takes it for random and would keep it
            gm.graph.erase_node(node)
        elif node.target is ops.quantize:
            _fuse_gelu(gm, node)
            _fuse_norm(gm, node)
        elif node.target is torch.ops.dmq_ao.int_conv.default:
            node.target = torch.ops.dmq_ao_cpu.conv.default
            _take_padding(node)
        elif node.target is torch.ops.dmq_ao.int_linear.default:
            node.target = torch.ops.dmq_ao_cpu.linear.default
        elif node.target is aten.add.Tensor:
            _fuse_bytes(gm, node)
        elif node.target is aten.linear.default and _rank(node) == 2 and node.meta[VAL].dtype == torch.float32:
            node.target = torch.ops.dmq_ao_cpu.float_linear.default  # of the timestep: as many rows as samples
            node.args = (*node.args, *(None,) * (3 - len(node.args)))
        elif node.target is aten.scaled_dot_product_attention.default:
            _fuse_attention(gm, node)
        elif node.target is aten.matmul.default:
            _fuse_written_out_attention(gm, node)
        elif node.target is aten.conv2d.default:
            _channels_last_input(gm, node)
        elif node.target is aten.conv_transpose2d.input:
            _tiles_as_linear(gm, node)
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
    if (
        high.args[3] is not low.args[3]
        or _rank(high) != 2
        or high.args[-1] != torch.float32
        or low.args[6] is not None
    ):
        return
    scales = [graph.attribute(gm, part.args[4]) for part in parts]  # type: ignore[arg-type]
    ratio = float(scales[0][0] / scales[1][0])
    zeros = (high.args[2], low.args[2])
    with gm.graph.inserting_before(node):
        args = (high.args[0], low.args[0], high.args[1], *zeros, *low.args[3:6], high.args[6], ratio)
        result = gm.graph.call_function(torch.ops.dmq_ao_cpu.two_byte_linear.default, args)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)


def _fuse_attention(gm: GraphModule, node: Node) -> None:
    """Attention without mask, in bfloat16."""
    if len(node.args) != 3 or set(node.kwargs) - {"scale"}:
        return
    q, k, v = (one for one in node.args if isinstance(one, Node))
    width = _width(q)
    if width and {_width(k), _width(v)} == {width} and all(_rank(one) == 4 for one in (q, k, v)):
        given = node.kwargs.get("scale")
        _emit_attention(gm, node, (q, k, v), float(width) ** -0.5 if given is None else given)


def _fuse_written_out_attention(gm: GraphModule, node: Node) -> None:
    """``softmax(q @ k.transpose(1, 2) * scale, -1) @ v`` of one head, [B, N, D] each."""
    shares, v = node.args
    assert isinstance(shares, Node)
    assert isinstance(v, Node)
    softmax, _ = _behind(shares, None)
    if softmax.target is not aten.softmax.int or softmax.args[1] not in (-1, 2) or not _only_reader(softmax):
        return
    scaled, _ = _behind(softmax.all_input_nodes[0], None)
    scale: Any = 1.0
    product = scaled
    if scaled.target is aten.mul.Tensor and _only_reader(scaled):
        product, scale = scaled.args  # type: ignore[assignment]
    if not isinstance(scale, float) or product.target is not aten.matmul.default or not _only_reader(product):
        return
    q, turned = product.args
    assert isinstance(q, Node)
    assert isinstance(turned, Node)
    swaps = ((1, 2), (2, 1), (-1, -2), (-2, -1))
    if turned.target is not aten.transpose.int or tuple(turned.args[1:]) not in swaps:
        return
    heads = (q, turned.all_input_nodes[0], v)
    if len({_width(one) for one in heads}) != 1 or any(_rank(one) != 3 for one in heads):
        return
    with gm.graph.inserting_before(node):
        single = tuple(gm.graph.call_function(aten.unsqueeze.default, (one, 1)) for one in heads)
    for one, whole in zip(single, heads, strict=True):
        batch, *rest = whole.meta[VAL].shape
        one.meta[VAL] = Value((batch, 1, *rest), whole.meta[VAL].dtype)
    _emit_attention(gm, node, single, scale, squeeze=True)


def _emit_attention(
    gm: GraphModule, node: Node, heads: tuple[Node, ...], scale: Any, *, squeeze: bool = False
) -> None:
    width = _width(heads[0])
    if width is None or width % 2 or not (isinstance(scale, float) and scale > 0):
        return
    if any(one.meta[VAL].dtype != torch.bfloat16 for one in heads):
        return
    with gm.graph.inserting_before(node):
        fast = gm.graph.call_function(torch.ops.dmq_ao_cpu.attention.default, (*heads, scale))
        if squeeze:
            fast = gm.graph.call_function(aten.squeeze.dim, (fast, 1))
    graph.replace_node(node, fast)


def _rank(node: Node) -> int:
    return int(node.meta[VAL].dim())


def _width(node: Node) -> int | None:
    """Size of the last axis, if the graph fixes it."""
    size = node.meta[VAL].shape[-1]
    return size if isinstance(size, int) else None


def _take_padding(conv: Node) -> None:
    """Let the norm before a convolution, if nothing else reads it, write the padding too."""
    norm = conv.args[0]
    assert isinstance(norm, Node)
    if norm.target is aten.contiguous.default:
        norm = norm.all_input_nodes[0]
    at = 8
    around = conv.args[at]
    if norm.target is not torch.ops.dmq_ao_cpu.group_norm_quantize.default or not _only_reader(norm):
        return
    conv.args = (norm, *conv.args[1:at], [0, 0], *conv.args[at + 1 :])
    norm.args = (*norm.args[:-1], around)


def _tiles_as_linear(gm: GraphModule, node: Node) -> None:
    """A transposed convolution whose outputs do not overlap (patches back to pixels) as one product.

    Before:  conv_transpose2d(x, w, b, stride=kernel)
    After:   linear(x as [B, H, W, C], w as [O * k * l, C], b k * l times), its tiles laid side by side
    """
    given = _arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    kernel = list(weight.meta[VAL].shape[2:])
    plain = set(given["padding"]) == set(given["output_padding"]) == {0} and given["groups"] == 1
    if weight.op != "get_attr" or given["stride"] != kernel or not plain or set(given["dilation"]) != {1}:
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


def _channels_last_input(gm: GraphModule, node: Node) -> None:
    """Let a float convolution start the layout that the integer ones have."""
    x = node.all_input_nodes[0]
    with gm.graph.inserting_before(node):
        turned = gm.graph.call_function(aten.contiguous.default, (x,), {"memory_format": torch.channels_last})
    turned.meta = dict(x.meta)
    node.replace_input_with(x, turned)


def _fuse_gelu(gm: GraphModule, quantize: Node) -> None:
    """GELU, or a factor times GELU (GEGLU), before quantize."""
    x, scale, zero_point, channel_scale, ch_axis, _, quant_max = quantize.args
    assert isinstance(x, Node)
    assert isinstance(quant_max, int)
    gelu, factor = _behind(x, None)[0], None
    if gelu.target is aten.mul.Tensor and _only_reader(gelu) and len(gelu.all_input_nodes) == 2:
        factor, gelu = gelu.all_input_nodes if _gelu_kind(gelu.all_input_nodes[1]) else gelu.all_input_nodes[::-1]
        gelu, _ = _behind(gelu, None)
    kind = _gelu_kind(gelu)
    if kind is None or not _only_reader(gelu) or quant_max > 255:
        return
    source = gelu.args[0]
    assert isinstance(source, Node)
    if _rank(gelu) < 2 or ch_axis not in (-1, _rank(gelu) - 1):
        return
    if factor is not None and factor.meta[VAL].shape != source.meta[VAL].shape:
        return
    with gm.graph.inserting_before(quantize):
        args = (source, factor, kind == "tanh", scale, zero_point, channel_scale, quant_max)
        codes = gm.graph.call_function(torch.ops.dmq_ao_cpu.gelu_quantize.default, args)
    quantize.replace_all_uses_with(codes)


def _gelu_kind(node: Node) -> str | None:
    """The formula of a GELU, ``tanh`` or ``none`` (erf) as PyTorch calls them; None for any other node."""
    node, _ = _behind(node, None)
    if node.target is torch.ops.dmq_ao.gelu_tanh.default:
        return "tanh"
    return str(node.kwargs.get("approximate", "none")) if node.target is aten.gelu.default else None


def _fuse_norm(gm: GraphModule, quantize: Node) -> None:
    x, scale, zero_point, channel_scale, ch_axis, _, quant_max = quantize.args
    assert isinstance(x, Node)
    assert isinstance(quant_max, int)
    x, turn = _behind(x, aten.transpose.int)
    x, silu = _behind(x, aten.silu.default)
    norm, _ = _behind(x, None)
    if norm.target is not aten.group_norm.default or not _only_reader(norm) or norm.kwargs or quant_max > 255:
        return
    rank = _rank(norm)
    swapped = turn is not None and rank == 3 and {int(axis) % 3 for axis in turn.args[1:]} == {1, 2}  # type: ignore
    axis = 1 if turn is None else 2
    if rank not in (3, 4) or (turn is not None and not swapped) or ch_axis not in (axis, axis - rank):
        return
    given = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])
    source = given[0]
    assert isinstance(source, Node)
    value, shift = _shifted(source)
    with gm.graph.inserting_before(quantize):
        args = (value, shift, *given[1:5], silu is not None, scale, zero_point, channel_scale, quant_max, [0, 0])
        codes = gm.graph.call_function(torch.ops.dmq_ao_cpu.group_norm_quantize.default, args)
        if turn is not None:
            codes = gm.graph.call_function(aten.transpose.int, (codes, *turn.args[1:]))
    quantize.replace_all_uses_with(codes)
    gm.graph.erase_node(quantize)


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = dict(zip((one.name for one in arguments), node.args, strict=False)) | dict(node.kwargs)
    return {one.name: given.get(one.name, one.default_value) for one in arguments}


def _behind(node: Node, target: object) -> tuple[Node, Node | None]:
    """The node before ``target``, past what changes no value, and ``target``'s node; the node itself if not there."""
    while _only_reader(node) and (node.target is aten.clone.default or _is_float_cast(node)):
        node = node.all_input_nodes[0]
    if target is None or node.target is not target or not _only_reader(node):
        return node, None
    return node.all_input_nodes[0], node


def _is_float_cast(node: Node) -> bool:
    return node.target is aten.to.dtype and isinstance(node.args[1], torch.dtype) and node.args[1].is_floating_point


def _only_reader(node: Node) -> bool:
    return len(node.users) == 1


def _shifted(value: Node) -> tuple[Node, Node | None]:
    """``h + t[:, :, None, None]`` as ``h`` and ``t`` [B, C]; anything else as it is."""
    total, _ = _behind(value, None)
    if total.target is not aten.add.Tensor or not _only_reader(total) or len(total.all_input_nodes) != 2:
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
