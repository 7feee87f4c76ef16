"""What an operator of a stored graph may be called with, where the operator itself would not say no.

Some arguments pass on the meta device and end a process, or read what nobody wrote, when there are values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dmq_ao import graph
from dmq_ao.config import MAX_INPUT_BITS
from dmq_ao.graph import aten
from dmq_ao.graph.private import OpOverload, mutates_arguments, operator_arguments
from dmq_ao.numerics import ops

MAX_PIECES = 4096
MAX_POWER = 4
_SCALES = (1e-3, 1e3)

_CONVOLUTIONS = {*graph.CONVOLUTIONS, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_MATRICES = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default}
_ADDED = {aten.addmm.default, aten.addbmm.default, aten.baddbmm.default}
_ATTENTION = aten.scaled_dot_product_attention.default
_SPLITS = {aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.hsplit.int, aten.dsplit.int}
_SPLITS |= {aten.split.sizes, aten.split_with_sizes.default}
_DIVISIONS = {aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default, aten.fmod.Scalar}
_DIVISIONS |= {aten.remainder.Tensor, aten.remainder.Scalar}
_PADS = {aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.replication_pad1d.default}
_PADS |= {aten.replication_pad2d.default, aten.replication_pad3d.default}


def check_arguments(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call before it is made.

    Args:
        target: an operator of the list, or a function on sizes.
        args: tensors without values, numbers, and the like.
        kwargs: likewise.

    Raises:
        ValueError, TypeError: saying what is wanted.
    """
    if not isinstance(target, OpOverload):
        _check_arithmetic(target, args)
        return
    if mutates_arguments(target):
        raise ValueError("it changes its argument, which a stored graph does not")
    arguments = {one.name: value for one, value in zip(operator_arguments(target), args, strict=False)} | dict(kwargs)
    if target.namespace == "dmq_ao":
        _check_ours(target, arguments)
    elif target in _SPLITS:
        _check_pieces(target, arguments)
    elif target in _DIVISIONS:
        _check_division(arguments)
    elif target in _PADS or target is aten.pad.default and arguments.get("mode", "constant") != "constant":
        if any(size < 0 for size in arguments.get("pad", arguments.get("padding"))):  # type: ignore[union-attr]
            raise ValueError("negative padding is only possible in mode constant")
    elif target.name().startswith("aten::upsample"):
        _check_resampling(arguments)
    elif target in _CONVOLUTIONS | _TRANSPOSED | _MATRICES | _ADDED | {graph.LINEAR, _ATTENTION}:
        _check_factors(target, arguments)


def multiply_adds(target: Callable[..., Any], args: tuple[Any, ...], result: Any) -> int:
    """How many multiplications a call takes, near enough; of anything but products, one an element."""
    if not isinstance(result, Tensor):
        several = result if isinstance(result, (tuple, list)) else ()
        return sum(one.numel() for one in several if isinstance(one, Tensor))
    return result.numel() * _products_of_an_element(target, args, result)


def _products_of_an_element(target: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> int:
    if target in _CONVOLUTIONS or target is graph.LINEAR:
        return int(math.prod(args[1].shape[1:]))
    if target in _TRANSPOSED:  # each input goes to as many outputs
        return int(math.prod(args[1].shape[1:]) * args[0].numel() // max(1, result.numel()))
    if target in _MATRICES:
        return int(args[0].shape[-1])
    if target in _ADDED:
        return int(args[1].shape[1] if args[1].dim() == 2 else args[1].shape[0] * args[1].shape[2])
    if target is _ATTENTION:
        return 2 * int(args[1].shape[-2])
    return 1


def _check_arithmetic(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Python's own operators take anything, and texts and lists as well: here sizes and results alone."""
    if target is operator.getitem:
        whole, place = args
        if not isinstance(whole, (tuple, list)) or type(place) is not int:
            raise TypeError(f"getitem takes one of several results by its number, got {place!r}")
    elif not all(isinstance(value, (int, float, Tensor)) for value in args):
        raise TypeError("sizes must be numbers")
    elif target is operator.pow and not (type(args[1]) is int and 0 <= args[1] <= MAX_POWER):
        raise ValueError(f"sizes are taken to powers of 0 to {MAX_POWER}")


def _check_pieces(target: OpOverload, arguments: Mapping[str, Any]) -> None:
    """Splitting makes a tensor a piece, each of which takes time."""
    size = max(arguments["self"].shape, default=0)
    if target is aten.split.Tensor:
        pieces = math.ceil(size / arguments["split_size"]) if arguments["split_size"] > 0 else 0
    elif "split_sizes" in arguments or "split_size" in arguments:
        pieces = len(arguments["split_sizes"] if "split_sizes" in arguments else arguments["split_size"])
    else:
        pieces = size if target is aten.unbind.int else arguments.get("chunks", arguments.get("sections", 0))
    if pieces > MAX_PIECES:
        raise ValueError(f"{pieces} pieces, at most {MAX_PIECES}")


def _check_division(arguments: Mapping[str, Any]) -> None:
    """Whole numbers are divided by a number above zero: by zero, or the smallest by -1, ends the process."""
    whole, other = arguments["self"], arguments["other"]
    if isinstance(whole, Tensor) and whole.dtype.is_floating_point:
        return
    if isinstance(other, Tensor) and other.dtype.is_floating_point or isinstance(other, float):
        return
    if isinstance(other, Tensor) or other < 1:
        raise ValueError("whole numbers are divided by a whole number of 1 or more")


def _check_resampling(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        for scale in value if isinstance(value, (tuple, list)) else [value]:
            if "scale" in name and scale is not None and not _SCALES[0] <= scale <= _SCALES[1]:
                raise ValueError(f"{name} must be {_SCALES[0]:g} to {_SCALES[1]:g}, got {scale}")


def _check_factors(target: OpOverload, arguments: Mapping[str, Any]) -> None:
    """Of one dtype, which the meta device does not look at; a bias is one number an output, which it would repeat."""
    dtypes = {value.dtype for name, value in arguments.items() if isinstance(value, Tensor) and name != "attn_mask"}
    if len(dtypes) > 1:
        raise TypeError(f"factors of one dtype, got {sorted(map(str, dtypes))}")
    bias = arguments.get("bias")
    if isinstance(bias, Tensor):
        weight, groups = arguments["weight"], arguments.get("groups", 1)
        outputs = weight.shape[1] * groups if target in _TRANSPOSED else weight.shape[0]
        if list(bias.shape) != [outputs]:
            raise ValueError(f"a bias of shape [{outputs}], got {list(bias.shape)}")
    strides = [arguments.get(name, 1) for name in ("stride", "dilation")]
    if any(step < 1 for value in strides for step in (value if isinstance(value, (tuple, list)) else [value])):
        raise ValueError("a stride and a dilation of 1 or more")


def _check_ours(target: OpOverload, arguments: Mapping[str, Any]) -> None:
    x = arguments.get("x", arguments.get("codes"))
    if target in (ops.quantize, ops.quantize_float8, ops.dequantize):
        _check_scales(x, arguments)
    if "dtype" in arguments and not arguments["dtype"].is_floating_point:
        raise TypeError(f"values are in floating point, got {arguments['dtype']}")
    if target is ops.quantize:
        widths = [2**bits - 1 for bits in range(1, MAX_INPUT_BITS + 1)]
        if arguments["quant_min"] != 0 or arguments["quant_max"] not in widths:
            raise ValueError(f"codes are 0 to 2**bits - 1, got {arguments['quant_min']} to {arguments['quant_max']}")
    if target is ops.dynamic_qparams and not (1 <= arguments["bits"] <= MAX_INPUT_BITS and x.dim() > 1):
        raise ValueError(f"ranges of 1 to {MAX_INPUT_BITS} bits of samples [B, ...]")


def _check_scales(x: Tensor, arguments: Mapping[str, Any]) -> None:
    """One number for all samples or for each, one factor for each channel: kernels read them by index."""
    axis = arguments["ch_axis"]
    if x.dim() < 2 or not -x.dim() <= axis < x.dim():
        raise ValueError(f"ch_axis {axis} of {list(x.shape)}")
    numbers = [arguments[name] for name in ("scale", "zero_point") if name in arguments]
    if any(one.dim() != 1 or one.numel() not in (1, x.shape[0]) for one in numbers):
        raise ValueError(f"one scale and zero point, or one for each of {x.shape[0]} samples")
    if len({one.numel() for one in numbers}) > 1:
        raise ValueError("as many scales as zero points")
    factors, channels = arguments["channel_scale"], x.shape[axis]
    if factors is not None and list(factors.shape) not in ([channels], [x.shape[0], channels]):
        raise ValueError(f"a channel_scale for each of {channels} channels, got {list(factors.shape)}")
