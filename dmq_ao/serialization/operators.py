"""The operators that a stored graph may name: pure functions of their arguments, and nothing else.

None reads or writes files, draws, changes an argument, or gives out memory that it did not fill. Views are among them,
but not those that take strides. ``ALLOWED`` is what a file may say and what ``graph`` writes; a denoiser that computes
anything else is saved without its graph, and loaded with ``model=``.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dmq_ao.graph.private import OpOverload, operator_arguments

_ATEN = """
_assert_tensor_metadata.default _to_copy.default abs.default acos.default acosh.default adaptive_avg_pool1d.default
adaptive_avg_pool2d.default add.Scalar add.Tensor addbmm.default addcdiv.default addcmul.default addmm.default
alias.default all.default all.dim amax.default amin.default any.default any.dim arange.default arange.start
arange.start_step argmax.default argmin.default argsort.default asin.default asinh.default atan.default atan2.default
atanh.default atleast_1d.default atleast_2d.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
baddbmm.default batch_norm.default bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor_Scalar
bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Tensor
bmm.default broadcast_tensors.default broadcast_to.default bucketize.Tensor cat.default ceil.default celu.default
channel_shuffle.default chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default clip.default
clone.default col2im.default column_stack.default complex.default concat.default concatenate.default conj.default
constant_pad_nd.default contiguous.default conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default
conv3d.padding conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input copy.default copysign.Tensor
cos.default cosh.default cosine_similarity.default cumprod.default cumsum.default deg2rad.default detach.default
diagonal.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode divide.Tensor dot.default dropout.default
dsplit.int einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default exp.default exp2.default
expand.default expand_as.default expm1.default feature_dropout.default fft_fft2.default fft_fftn.default
fft_fftshift.default fft_ifft2.default fft_ifftn.default fft_ifftshift.default fft_irfft2.default fft_rfft2.default
fill.Scalar fill.Tensor flatten.using_ints flip.default floor.default floor_divide.default fmod.Scalar frac.default
full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default group_norm.default
gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default hsplit.int hstack.default im2col.default
imag.default index.Tensor index_select.default instance_norm.default isfinite.default isinf.default isnan.default
layer_norm.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lift_fresh_copy.default
linalg_cross.default linalg_vector_norm.default linear.default linspace.default log.default log10.default
log1p.default log2.default log_sigmoid.default log_softmax.int logical_and.default logical_not.default
logical_or.default logical_xor.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
matmul.default max.default max.dim max_pool2d.default maximum.default mean.default mean.dim meshgrid.default
meshgrid.indexing min.default min.dim minimum.default mish.default mm.default moveaxis.int movedim.int movedim.intlist
mul.Scalar mul.Tensor multiply.Tensor mv.default nan_to_num.default narrow.default ne.Scalar ne.Tensor neg.default
new_full.default new_ones.default new_zeros.default norm.Scalar norm.ScalarOpt_dim numpy_T.default one_hot.default
ones.default ones_like.default outer.default pad.default pairwise_distance.default permute.default
pixel_shuffle.default pixel_unshuffle.default polar.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
prelu.default prod.default prod.dim_int rad2deg.default ravel.default real.default reciprocal.default
reflection_pad1d.default reflection_pad2d.default relu.default relu6.default remainder.Scalar remainder.Tensor
repeat.default repeat_interleave.self_int replication_pad1d.default replication_pad2d.default
replication_pad3d.default reshape.default reshape_as.default rms_norm.default roll.default rot90.default
round.decimals round.default rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default
scaled_dot_product_attention.default select.int select_scatter.default selu.default sgn.default sigmoid.default
sign.default silu.default sin.default sinc.default sinh.default slice.Tensor slice_scatter.default softmax.int
softplus.default sort.default split.Tensor split.sizes split_with_sizes.default sqrt.default square.default
squeeze.default squeeze.dim squeeze.dims stack.default std.correction std.dim sub.Scalar sub.Tensor sum.default
sum.dim_IntList swapaxes.default swapdims.default sym_numel.default sym_size.int t.default take_along_dim.default
tan.default tanh.default tensordot.default tile.default to.device to.dtype to.dtype_layout to.other topk.default
transpose.int tril.default triu.default true_divide.Tensor trunc.default type_as.default unbind.int unflatten.int
unfold.default unsqueeze.default upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec
upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_trilinear3d.vec var.correction var.dim
var_mean.correction view.default view.dtype view_as.default view_as_complex.default view_as_real.default
vstack.default where.Scalar where.ScalarOther where.ScalarSelf where.self zeros.default zeros_like.default
"""
_OURS = "dequantize dequantize_weight dynamic_qparams look_up quantize quantize_float8 row"
_WORDS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem"]
_WORDS += ["eq", "ne", "lt", "le", "gt", "ge"]

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{word}": getattr(operator, word) for word in _WORDS},
    **{f"math.{word}": getattr(math, word) for word in ("ceil", "floor", "trunc")},
    **{f"torch.{word}": getattr(torch, word) for word in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")},
}
"""Arithmetic of sizes, by name."""
ATEN = frozenset(f"aten.{word}" for word in _ATEN.split())
OURS = frozenset(f"dmq_ao.{word}.default" for word in _OURS.split())
ALLOWED = ATEN | OURS | frozenset(FUNCTIONS)
"""Names that a file may hold."""
_IN_PLACE = frozenset(word.replace(".", "_.") for word in _ATEN.split())
REWRITTEN = frozenset(f"aten.{word}" for word in _IN_PLACE | {"copy_.default", "empty_like.default"})
"""In files of earlier versions: ``passes.out_of_place`` takes them out, and where it does not, nothing is loaded."""
# What an operator must be told, by position and name, so that it draws nothing and changes no statistics.
_REQUIRED: Mapping[str, tuple[int, str, Any]] = {
    "aten.dropout.default": (2, "train", False),
    "aten.feature_dropout.default": (2, "train", False),
    "aten.batch_norm.default": (5, "training", False),
    "aten.instance_norm.default": (3, "running_mean", None),
    "aten.scaled_dot_product_attention.default": (4, "dropout_p", 0.0),
}
# Words that operators take: modes of padding, resampling, rounding, GELU and transforms; and equations of einsum.
_MODES = frozenset({"none", "tanh", "floor", "trunc", "same", "valid", "ij", "xy", "ortho", "forward", "backward"})
_MODES |= {"constant", "reflect", "replicate", "circular", "zeros", "border", "reflection"}
_MODES |= {"nearest", "bilinear", "bicubic"}
_LITERAL_TYPES = {"ScalarType": torch.dtype, "Device": torch.device, "Layout": torch.layout}
_LITERAL_TYPES |= {"MemoryFormat": torch.memory_format}
_EQUATION = re.compile(r"[A-Za-z., ]{1,100}(->[A-Za-z. ]{0,100})?")
_NAMES = {function: name for name, function in FUNCTIONS.items()}


class NotReadable(ValueError):
    """A stored graph needs an operator that this PyTorch does not have; the message names it."""


class Forbidden(ValueError):
    """A stored graph names an operator that no stored graph may hold; the message names it."""


def name_of(target: Any) -> str | None:
    """How a file names an operator; None when it has no name for it."""
    name = str(target) if isinstance(target, OpOverload) else _NAMES.get(target)
    return name if name in ALLOWED else None


def operator_of(name: Any) -> Callable[..., Any]:
    """The operator that a file names.

    Raises:
        Forbidden: for a name that is not in ``ALLOWED`` or ``REWRITTEN``.
        NotReadable: for one that is, where this PyTorch has no such operator.
    """
    if not isinstance(name, str) or name not in ALLOWED | REWRITTEN:
        raise Forbidden(f"the operator {name!r} is not one that a stored graph may hold")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(target, OpOverload):
        raise NotReadable(f"torch {torch.__version__} has no operator {name!r}")
    return target


def check_call(name: str, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that an operator does not have, those that would let it draw or remember, and texts.

    Args:
        name: of the operator.
        target: the operator.
        args: positional arguments.
        kwargs: the others.

    Raises:
        TypeError: for a keyword that is not in the operator's schema, or that is given twice.
        ValueError: for an operator that would draw, or change what it keeps, and for words that are no mode.
    """
    arguments = operator_arguments(target)
    if name in OURS and (kwargs or len(args) != len(arguments)):
        raise TypeError(f"{name} takes all its arguments by position")
    if kwargs:
        names = [argument.name for argument in arguments]
        later = set(names[len(args) :])
        unknown = sorted(set(kwargs) - later)
        if unknown:
            raise TypeError(f"{name} takes no further arguments {unknown}; it has {names}")
    for value in (*args, *kwargs.values()):
        _check_word(name, value)
    for place, (argument, literal) in _literals(target).items():
        value = args[place] if len(args) > place else kwargs.get(argument)
        if value is not None and not isinstance(value, literal):  # torch would take a number for it
            raise TypeError(f"{name} takes a {literal.__name__} as {argument}, got {value!r}")
    if kwargs.get("pin_memory"):
        raise ValueError(f"{name} with pin_memory, which a stored graph must not have")
    if name in _REQUIRED:
        place, argument, constant = _REQUIRED[name]
        value = args[place] if len(args) > place else kwargs.get(argument, constant)
        if value is not constant and value != constant or type(value) is not type(constant):
            raise ValueError(f"{name} with {argument}={value!r}; a stored graph has {constant!r} there")


@functools.cache
def _literals(target: Callable[..., Any]) -> dict[int, tuple[str, type]]:
    """The arguments of an operator that are neither tensors nor numbers: places with names and types."""
    places = {}
    for place, argument in enumerate(operator_arguments(target)):
        word = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        if word in _LITERAL_TYPES:
            places[place] = (argument.name, _LITERAL_TYPES[word])
    return places


def _check_word(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for one in value:
            _check_word(name, one)
    elif isinstance(value, str) and value not in _MODES:
        is_equation = name == "aten.einsum.default" and _EQUATION.fullmatch(value)
        if not is_equation:
            raise ValueError(f"{name} knows no {value[:80]!r}")
