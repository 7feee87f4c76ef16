"""Layer records as JSON and tensors, and back: what a folder and a checkpoint of a calibration have in common.

Keys of the tensors, by original layer name::

    <layer>.weight                packed codes, uint8 [ceil(numel / 8) * bits]; signed codes are offset by 2**(bits-1),
                                  float8 ones are their bytes
    <layer>.weight_scale          [out, groups] float32          <layer>.weight_zero_point   [out, groups] uint8
    <layer>.weight_bits           [out] uint8, where they differ
    <layer>.input_scale           [rows] float32                 <layer>.input_zero_point    [rows] uint8 or int16
    <layer>.input_timesteps       [rows] float32, per step       <layer>.input_exponents     [channels] int8, if voted
    <layer>.input_channel_scale   [channels] float32, if learned <layer>.corrected_bias      [out] float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.config import Ranges
from dmq_ao.config.as_json import typed
from dmq_ao.numerics.segments import pack_segments, unpack_segments
from dmq_ao.records import ActivationRecord, LayerRecord, WeightRecord, zero_point_dtype

# What a layer's record takes in the file of tensors, after the layer's name.
FIELDS = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_bits",
    "input_scale",
    "input_zero_point",
    "input_timesteps",
    "input_exponents",
    "input_channel_scale",
    "corrected_bias",
)


@dataclass(frozen=True)
class StoredInput:
    """What of an ``ActivationRecord`` is no tensor."""

    bits: int
    ch_axis: int
    ranges: Ranges
    float8: bool = False


@dataclass(frozen=True)
class StoredLayer:
    """What of a ``LayerRecord`` is no tensor.

    Attributes:
        kind: of the layer.
        shape: of its weight.
        bits: of its widest codes.
        symmetric: signed codes without zero points.
        input: None where that stays in float, or is indices.
        segments: widths, each with its number of output channels; None where all have ``bits``.
        float8: the weight's codes are no integers.
    """

    kind: str
    shape: tuple[int, ...]
    bits: int
    symmetric: bool
    input: StoredInput | None
    segments: tuple[tuple[int, ...], ...] | None = None
    float8: bool = False

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Widths, each with its number of output channels, in the order of the file."""
        return [(bits, count) for bits, count in self.segments or ((self.bits, self.shape[0]),)]


def layer_configs(records: Mapping[str, LayerRecord]) -> dict[str, Any]:
    """What of the records is no tensor, JSON-ready; with ``layer_tensors`` the input of ``layer_records``."""
    return {
        name: {
            "kind": record.kind,
            "shape": list(record.weight.codes.shape),
            "bits": record.weight.bits,
            **({} if record.weight.channel_bits is None else {"segments": record.weight.segments}),
            "symmetric": record.weight.symmetric,
            **({"float8": True} if record.weight.float8 else {}),
            "input": _input_config(record.activation),
        }
        for name, record in records.items()
    }


def _input_config(activation: ActivationRecord | None) -> dict[str, Any] | None:
    if activation is None:
        return None
    config = {"bits": activation.bits, "ch_axis": activation.ch_axis, "ranges": activation.ranges.value}
    return config | ({"float8": True} if activation.float8 else {})


def stored_layers(configs: Any) -> dict[str, StoredLayer]:
    """What ``layer_configs`` wrote, every key and type checked.

    Raises:
        ValueError, TypeError: for anything else.
    """
    if not isinstance(configs, Mapping):
        raise TypeError(f"layers: expected an object, got {type(configs).__name__}")
    return {name: typed(StoredLayer, config, f"layers.{name}") for name, config in configs.items()}


def layer_tensors(records: Mapping[str, LayerRecord]) -> dict[str, Tensor]:
    """The tensors of the records as a file holds them, shaped as above: codes packed, [bytes], all on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, record in records.items():
        weight, activation = record.weight, record.activation
        widths = None if weight.channel_bits is None else weight.channel_bits.cpu()
        tensors[f"{name}.weight"] = _pack_codes(weight, widths)
        if widths is not None:
            tensors[f"{name}.weight_bits"] = widths
        tensors[f"{name}.weight_scale"] = weight.scale.cpu()
        if not weight.symmetric:
            tensors[f"{name}.weight_zero_point"] = weight.zero_point.cpu().to(torch.uint8)
        if activation is not None and activation.ranges is not Ranges.DYNAMIC:
            tensors[f"{name}.input_scale"] = activation.scale.cpu()
            width = zero_point_dtype(activation.bits)
            tensors[f"{name}.input_zero_point"] = activation.zero_point.cpu().to(width)
        if activation is not None and activation.timesteps is not None:
            tensors[f"{name}.input_timesteps"] = activation.timesteps.cpu()
        if activation is not None and activation.exponents is not None:
            tensors[f"{name}.input_exponents"] = activation.exponents.cpu()
        if activation is not None and activation.channel_scale is not None:
            tensors[f"{name}.input_channel_scale"] = activation.channel_scale.cpu()
        if record.bias is not None:
            tensors[f"{name}.corrected_bias"] = record.bias.cpu()
    # safetensors refuses tensors that share storage, and siblings share their input's qparams.
    return {name: value.clone() for name, value in tensors.items()}


def _pack_codes(weight: WeightRecord, widths: Tensor | None) -> Tensor:
    codes, symmetric = weight.codes.cpu(), weight.symmetric
    if weight.float8:
        codes, symmetric = codes.view(torch.uint8), False
    return pack_segments(codes, weight.segments, widths, symmetric)


def layer_records(configs: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, LayerRecord]:
    """The records back from configs and tensors [...] of a file; what belongs to them is taken out of ``tensors``.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError, TypeError: for a config that is none, or codes of another size.
    """
    return {name: layer_record(name, layer, tensors) for name, layer in stored_layers(configs).items()}


def layer_record(name: str, layer: StoredLayer, tensors: dict[str, Tensor]) -> LayerRecord:
    """One layer's record, codes [out, ...]; its tensors are taken out of ``tensors``.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError: for codes of another size, or float8 codes that are NaN.
    """
    packed = tensors.pop(f"{name}.weight")
    widths = None if layer.segments is None else tensors[f"{name}.weight_bits"]
    codes = unpack_segments(packed, layer.shape, layer.widths, widths, layer.symmetric and not layer.float8)
    if layer.float8:
        codes = codes.view(numerics.FLOAT8)
        if bool(codes.float().isnan().any()):
            raise ValueError("float8 codes must not be NaN")
    return _with_codes(name, layer, tensors, codes)


def layer_outline(name: str, layer: StoredLayer, tensors: dict[str, Tensor]) -> LayerRecord:
    """``layer_record`` with codes [out, ...] on the meta device, from all tensors but the packed codes."""
    dtype = numerics.code_dtype(layer.symmetric, layer.float8)
    return _with_codes(name, layer, tensors, torch.empty(layer.shape, dtype=dtype, device="meta"))


def _with_codes(name: str, layer: StoredLayer, tensors: dict[str, Tensor], codes: Tensor) -> LayerRecord:
    scale = tensors.pop(f"{name}.weight_scale")
    zero_point = torch.zeros_like(scale) if layer.symmetric else tensors.pop(f"{name}.weight_zero_point")
    widths = None if layer.segments is None else tensors.pop(f"{name}.weight_bits")
    weight = WeightRecord(layer.bits, layer.symmetric, codes, scale, zero_point.to(torch.int32), widths)
    bias = tensors.pop(f"{name}.corrected_bias", None)
    return LayerRecord(name, layer.kind, weight, _activation(name, layer.input, tensors), bias)


def _activation(name: str, config: StoredInput | None, tensors: dict[str, Tensor]) -> ActivationRecord | None:
    if config is None:
        return None
    dynamic = config.ranges is Ranges.DYNAMIC
    return ActivationRecord(
        bits=config.bits,
        ch_axis=config.ch_axis,
        ranges=config.ranges,
        scale=torch.zeros(0) if dynamic else tensors.pop(f"{name}.input_scale"),
        zero_point=(torch.zeros(0) if dynamic else tensors.pop(f"{name}.input_zero_point")).to(torch.int32),
        timesteps=tensors.pop(f"{name}.input_timesteps") if config.ranges is Ranges.PER_STEP else None,
        exponents=tensors.pop(f"{name}.input_exponents", None),
        channel_scale=tensors.pop(f"{name}.input_channel_scale", None),
        float8=config.float8,
    )
