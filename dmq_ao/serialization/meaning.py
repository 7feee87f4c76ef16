"""Whether what a file says of a layer can be a layer: every number one that its meaning allows, all of them together.

The integer kernels and the q/dq graph read the same records, and agree on records that mean something. On others
(a negative scale, a zero point that is no code) each would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dmq_ao.config import MAX_BITS, MAX_INPUT_BITS, Ranges
from dmq_ao.graph import TABLE
from dmq_ao.numerics.segments import segment_bytes
from dmq_ao.records import zero_point_dtype
from dmq_ao.serialization.layers import FIELDS, StoredInput, StoredLayer

_AXES = {"conv1d": 3, "conv2d": 4, "conv3d": 5, "linear": 2, TABLE: 2}
_MAX_NUMEL = 2**40
_MAX_AXES = 16
# Of a float32 scale: normal numbers, of which two and a code multiply to a finite one.
_SMALLEST_SCALE, _LARGEST_SCALE = torch.finfo(torch.float32).tiny, 1e15


class Meaningless(ValueError):
    """A value that nothing means; the message names the tensor or field, what it must be, and what it is."""


def check_layer(name: str, layer: StoredLayer) -> None:
    """Refuse fields of a layer that contradict each other, before a tensor is read.

    Args:
        name: of the layer.
        layer: what the file says of it.

    Raises:
        Meaningless: for what cannot be.
    """
    if layer.kind not in _AXES:
        _refuse(f"{name}: kind", f"one of {sorted(_AXES)}", repr(layer.kind))
    sizes = layer.shape
    if len(sizes) != _AXES[layer.kind] or any(size < 1 for size in sizes) or math.prod(sizes) > _MAX_NUMEL:
        _refuse(f"{name}: shape", f"{_AXES[layer.kind]} sizes of 1 or more for a {layer.kind}", list(sizes))
    if not 1 <= layer.bits <= MAX_BITS:
        _refuse(f"{name}: bits", f"1 to {MAX_BITS}", layer.bits)
    if layer.float8 and not (layer.bits == MAX_BITS and layer.symmetric and layer.segments is None):
        _refuse(f"{name}: float8", "symmetric codes of 8 bits", f"symmetric={layer.symmetric}, bits={layer.bits}")
    _check_segments(name, layer)
    if layer.input is not None:
        _check_input(name, layer, layer.input)


def _check_segments(name: str, layer: StoredLayer) -> None:
    if layer.segments is None:
        return
    if not layer.segments or any(len(pair) != 2 for pair in layer.segments):
        _refuse(f"{name}: segments", "pairs of a width and a number of channels", layer.segments)
    widths, counts = zip(*layer.segments, strict=True)
    is_ascending = list(widths) == sorted(set(widths)) and widths[0] >= 1
    if not is_ascending or widths[-1] != layer.bits or min(counts) < 1 or sum(counts) != layer.shape[0]:
        _refuse(
            f"{name}: segments",
            f"ascending widths up to {layer.bits}, the numbers of channels adding up to {layer.shape[0]}",
            [list(pair) for pair in layer.segments],
        )


def _check_input(name: str, layer: StoredLayer, config: StoredInput) -> None:
    if layer.kind == TABLE:
        _refuse(f"{name}: input", "null, for tables take indices", config)
    if not 1 <= config.bits <= MAX_INPUT_BITS:
        _refuse(f"{name}: input bits", f"1 to {MAX_INPUT_BITS}", config.bits)
    last = _MAX_AXES if layer.kind == "linear" else 1
    if not 1 <= config.ch_axis <= last:
        _refuse(f"{name}: input ch_axis", "the channel axis of the input, not its batch", config.ch_axis)
    if config.float8 and (config.bits != MAX_BITS or config.ranges is Ranges.DYNAMIC):
        _refuse(f"{name}: input float8", "8 bits, and ranges that are not dynamic", config)


def expected_fields(layer: StoredLayer) -> tuple[set[str], set[str]]:
    """Fields of ``FIELDS`` that a layer must have in the file of tensors, and those that it may have."""
    must = {"weight", "weight_scale"}
    must |= set() if layer.symmetric else {"weight_zero_point"}
    must |= set() if layer.segments is None else {"weight_bits"}
    may = {"corrected_bias"}
    if layer.input is not None:
        may |= {"input_channel_scale"} | (set() if layer.input.float8 else {"input_exponents"})
        must |= set() if layer.input.ranges is Ranges.DYNAMIC else {"input_scale", "input_zero_point"}
        must |= {"input_timesteps"} if layer.input.ranges is Ranges.PER_STEP else set()
    return must, may


def check_fields(name: str, layer: StoredLayer, present: set[str]) -> None:
    """Refuse a layer with tensors that it must not have, or without those that it must.

    Raises:
        Meaningless: naming the tensors.
    """
    must, may = expected_fields(layer)
    missing, extra = sorted(must - present), sorted(present - must - may)
    if missing or extra:
        keys = [[f"{name}.{field}" for field in fields] for fields in (missing, extra)]
        raise Meaningless(f"tensors missing {keys[0]}, unexpected {keys[1]}")


def check_record(name: str, layer: StoredLayer, names: frozenset[str]) -> set[str]:
    """Fields that a file of tensors ``names`` holds of a layer, after ``check_layer`` and ``check_fields``."""
    check_layer(name, layer)
    fields = {field for field in FIELDS if f"{name}.{field}" in names}
    check_fields(name, layer, fields)
    return fields


def check_codes(name: str, layer: StoredLayer, shape: list[int], dtype: str) -> None:
    """Refuse packed codes of another size than the layer's.

    Args:
        name: of the layer.
        layer: what the file says of it.
        shape: of the packed codes.
        dtype: as safetensors names it.

    Raises:
        Meaningless: naming the tensor.
    """
    expected = sum(segment_bytes(layer.widths, math.prod(layer.shape[1:])))
    if shape != [expected] or dtype != "U8":
        widths = " and ".join(str(bits) for bits, _ in layer.widths)
        raise Meaningless(
            f"{name}.weight: {math.prod(layer.shape)} codes of {widths} bits take {expected} uint8, got {shape}"
            f" {dtype}"
        )


def check_tensors(
    name: str, layer: StoredLayer, tensors: Mapping[str, Tensor], max_exponent: int, *, signed: bool = False
) -> None:
    """Refuse tensors of a layer, all but its codes, that cannot be its own.

    Args:
        name: of the layer.
        layer: that passed ``check_layer``.
        tensors: by field, as ``check_fields`` requires them; ``weight_scale`` [out, groups] and the rest as in
            ``serialization.layers``.
        max_exponent: of power-of-two scaling.
        signed: allow weight scales below zero, which distillation left in files before there were manifests.

    Raises:
        Meaningless: naming the tensor.
    """
    out, inputs = layer.shape[0], math.prod(layer.shape[1:])
    scale = tensors["weight_scale"]
    groups = scale.shape[1] if scale.dim() == 2 else 0
    if layer.kind == TABLE and groups > 1:
        _refuse(f"{name}.weight_scale", f"[{out}, 1], for rows of a table are looked up whole", _layout(scale))
    if scale.dtype != torch.float32 or tuple(scale.shape) != (out, groups) or groups < 1 or inputs % groups:
        _refuse(f"{name}.weight_scale", f"[{out}, groups] float32, groups dividing {inputs}", _layout(scale))
    _check_scale(f"{name}.weight_scale", scale.abs() if signed else scale)
    if layer.segments is not None:
        _check_widths(f"{name}.weight_bits", layer, tensors["weight_bits"])
    if not layer.symmetric:
        _check_zero_points(f"{name}.weight_zero_point", layer, tensors, [out, groups])
    if "corrected_bias" in tensors:
        bias = tensors["corrected_bias"]
        if bias.dtype != torch.float32 or list(bias.shape) != [out] or not bool(bias.isfinite().all()):
            _refuse(f"{name}.corrected_bias", f"[{out}] finite float32", _layout(bias))
    if layer.input is not None:
        _check_input_tensors(name, layer, layer.input, tensors, max_exponent)


def _check_widths(key: str, layer: StoredLayer, widths: Tensor) -> None:
    if widths.dtype != torch.uint8 or list(widths.shape) != [layer.shape[0]]:
        _refuse(key, f"[{layer.shape[0]}] uint8", _layout(widths))
    values, counts = widths.unique(return_counts=True)
    if list(zip(values.tolist(), counts.tolist(), strict=True)) != layer.widths:
        _refuse(key, f"channels of each width as in the config, {layer.widths}", "others")


def _check_zero_points(key: str, layer: StoredLayer, tensors: Mapping[str, Tensor], shape: list[int]) -> None:
    zero_point = tensors["weight_zero_point"]
    if zero_point.dtype != torch.uint8 or list(zero_point.shape) != shape:
        _refuse(key, f"{shape} uint8", _layout(zero_point))
    bits = tensors["weight_bits"] if layer.segments is not None else torch.tensor([layer.bits], dtype=torch.uint8)
    # In 16 bits, for 2**8 is none of uint8. One-bit codes stand on both sides of their zero point.
    limit = torch.bitwise_left_shift(torch.ones((), dtype=torch.int16), bits.to(torch.int16))[:, None] - 1
    if bool((zero_point > limit).any()) or bool(((bits == 1)[:, None] & (zero_point != 1)).any()):
        _refuse(key, f"codes of {' and '.join(str(width) for width, _ in layer.widths)} bits", "others")


def _check_input_tensors(
    name: str, layer: StoredLayer, config: StoredInput, tensors: Mapping[str, Tensor], max_exponent: int
) -> None:
    rows = 0
    if config.ranges is not Ranges.DYNAMIC:
        scale, zero_point = tensors["input_scale"], tensors["input_zero_point"]
        rows = len(scale) if scale.dim() == 1 else 0
        if scale.dtype != torch.float32 or rows < 1 or config.ranges is Ranges.STATIC and rows != 1:
            rows_word = "rows" if config.ranges is Ranges.PER_STEP else "1"
            _refuse(f"{name}.input_scale", f"[{rows_word}] float32", _layout(scale))
        _check_scale(f"{name}.input_scale", scale)
        dtype = zero_point_dtype(config.bits)
        if zero_point.dtype != dtype or list(zero_point.shape) != [rows]:
            _refuse(f"{name}.input_zero_point", f"[{rows}] {dtype}", _layout(zero_point))
        low, high = (int(end) for end in zero_point.aminmax())
        if low < 0 or high > (0 if config.float8 else 2**config.bits - 1):
            limits = "0, for float8 has none" if config.float8 else f"codes of {config.bits} bits"
            _refuse(f"{name}.input_zero_point", limits, f"{low} to {high}")
    if config.ranges is Ranges.PER_STEP:
        _check_timesteps(f"{name}.input_timesteps", tensors["input_timesteps"], rows)
    channels = layer.shape[1]
    if "input_channel_scale" in tensors:
        factors = tensors["input_channel_scale"]
        if factors.dtype != torch.float32 or not _are_channels(layer, list(factors.shape)):
            _refuse(f"{name}.input_channel_scale", f"[{channels}] float32", _layout(factors))
        _check_scale(f"{name}.input_channel_scale", factors)
    if "input_exponents" in tensors:
        exponents = tensors["input_exponents"]
        shape = list(exponents.shape)
        per_step = config.ranges is Ranges.PER_STEP and len(shape) == 2 and shape[0] == rows
        if exponents.dtype != torch.int8 or not _are_channels(layer, shape[1:] if per_step else shape):
            _refuse(f"{name}.input_exponents", f"[{channels}] int8, or [{rows}, {channels}]", _layout(exponents))
        low, high = (int(end) for end in exponents.aminmax())
        if low < 0 or high > max_exponent:
            _refuse(f"{name}.input_exponents", f"0 to {max_exponent}", f"{low} to {high}")


def _are_channels(layer: StoredLayer, shape: list[int]) -> bool:
    """Whether a shape is [channels]; a grouped convolution has as many as its groups times what its weight says."""
    if len(shape) != 1:
        return False
    return shape[0] == layer.shape[1] or layer.kind != "linear" and shape[0] > 0 and shape[0] % layer.shape[1] == 0


def _check_timesteps(key: str, timesteps: Tensor, rows: int) -> None:
    if timesteps.dtype != torch.float32 or list(timesteps.shape) != [rows]:
        _refuse(key, f"[{rows}] float32", _layout(timesteps))
    if not bool(timesteps.isfinite().all()) or not bool((timesteps[1:] < timesteps[:-1]).all()):
        _refuse(key, "finite, each below the one before", timesteps.tolist())


def _check_scale(key: str, scale: Tensor) -> None:
    low, high = (float(end) for end in scale.aminmax())  # NaN if any is
    if not (low >= _SMALLEST_SCALE and high <= _LARGEST_SCALE):
        _refuse(key, "positive, finite and no denormal number", f"{low:g} to {high:g}")


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _refuse(what: str, expectation: str, got: object) -> None:
    raise Meaningless(f"{what} must be {expectation}; got {got}")
