"""A quantized denoiser on disk: ``config.json``, packed integers in safetensors, and ``graph.json``. Nothing pickled.

Keys of the tensors, by original layer name::

    <layer>.weight                packed codes, uint8 [ceil(numel / 8) * bits]; signed codes are offset by 2**(bits-1),
                                  float8 ones are their bytes
    <layer>.weight_scale          [out, groups] float32          <layer>.weight_zero_point   [out, groups] uint8
    <layer>.input_scale           [rows] float32                 <layer>.input_zero_point    [rows] uint8
    <layer>.input_timesteps       [rows] float32, per step       <layer>.input_exponents     [channels] int8, if voted
    graph.<name>                  a constant of the stored graph (see ``graph_file``)
    anything else                 a tensor that stayed in float, under its own name
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmq_ao import numerics
from dmq_ao.config import InvalidFile, Ranges, Recipe
from dmq_ao.layer import ActivationRecord, LayerRecord, WeightRecord, zero_point_dtype
from dmq_ao.segments import pack_segments, segment_bytes, unpack_segments

FORMAT_VERSION = 1
CONFIG = "config.json"
TENSORS = "diffusion_pytorch_model.safetensors"
GRAPH = "graph.json"
_CONSTANT = "graph."
# What a layer's record takes in the file of tensors, after the layer's name.
_FIELDS = (
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
KEY = "quantization_config"


@dataclass(frozen=True, eq=False)
class Stored:
    """Everything that a folder holds.

    Attributes:
        recipe: how it was made.
        records: integers by layer name.
        float_tensors: what stayed in float, by original name.
        model_config: the diffusers ``config``, empty for other models.
        parameters: original parameter names and shapes: the model's identity.
        example: shape and dtype name of each tensor argument.
        constants: values of the other arguments.
        timestep_arg: name of the timestep, None without one.
        sqnr_db: output noise per layer, as calibration measured it.
        merged: layers that were copies, each with that which stands for it.
        graph: JSON text of the converted graph, see ``graph_file``; None when it cannot be stored.
        graph_constants: tensors of that graph that are of no layer and not of the original model.
    """

    recipe: Recipe
    records: Mapping[str, LayerRecord]
    float_tensors: Mapping[str, Tensor]
    model_config: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    example: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    constants: Mapping[str, Any]
    timestep_arg: str | None
    sqnr_db: Mapping[str, float]
    merged: Mapping[str, str]
    graph: str | None = None
    graph_constants: Mapping[str, Tensor] = field(default_factory=dict)


class StoredRecords(Mapping[str, LayerRecord]):
    """The layer records of a file, each read when asked for: memory holds one copy of the codes, the kernels'."""

    def __init__(self, file: Path, layers: Mapping[str, Any], checksum: str) -> None:
        """``checksum`` is that of ``file`` now; a file that changes is not read from any more.

        Raises:
            KeyError, ValueError: for codes that are missing, or of another size than ``layers`` says.
        """
        self._file, self._layers, self._checksum = file.absolute(), dict(layers), checksum
        self._seen = _stamp(self._file)
        with safe_open(self._file, "pt") as opened:
            self._names = frozenset(opened.keys())
            for name, layer in self._layers.items():
                self._check_size(name, layer, opened)

    def _check_size(self, name: str, layer: Mapping[str, Any], opened: Any) -> None:
        key = f"{name}.weight"
        if key not in self._names:
            raise KeyError(key)
        expected, found = (
            sum(segment_bytes(_segments(layer), math.prod(layer["shape"][1:]))),
            opened.get_slice(key).get_shape(),
        )
        if found != [expected]:
            widths = " and ".join(str(bits) for bits, _ in _segments(layer))
            raise ValueError(
                f"{key}: {math.prod(layer['shape'])} codes of {widths} bits take {expected} uint8, got {found}"
            )

    def __getitem__(self, name: str) -> LayerRecord:
        """The record of a layer.

        Raises:
            KeyError: for an unknown layer.
            InvalidFile: when the file is gone or changed, or does not hold the record.
        """
        return self._read(name, self.tensor_names(name), _record)

    def without_codes(self, name: str) -> LayerRecord:
        """The record with codes on the meta device; raises what reading it whole does."""
        keys = [key for key in self.tensor_names(name) if key != f"{name}.weight"]
        return self._read(name, keys, _record_without_codes)

    def _read(self, name: str, keys: list[str], build: Callable[..., LayerRecord]) -> LayerRecord:
        layer = self._layers[name]
        self._check_unchanged()
        with safe_open(self._file, "pt") as opened:
            # Cloned, for what is read maps the file, and all that was ever looked at would count as memory.
            left = {key: opened.get_tensor(key).clone() for key in keys}
        try:
            return build(name, layer, left)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InvalidFile(f"{self._file}: {name}: {error}; it is damaged or was edited, save again") from error

    def tensor_names(self, name: str) -> list[str]:
        """The tensors of a layer's record in the file."""
        return [key for part in _FIELDS if (key := f"{name}.{part}") in self._names]

    @property
    def all_names(self) -> frozenset[str]:
        """Every tensor of the file."""
        return self._names

    def _check_unchanged(self) -> None:
        if not self._file.exists():
            raise InvalidFile(f"{self._file} is gone, and the codes were still in it; load again from where it is now")
        if (stamp := _stamp(self._file)) != self._seen:
            if _sha256(self._file) != self._checksum:
                raise InvalidFile(f"{self._file} has changed since it was loaded; load again")
            self._seen = stamp  # written again with the same bytes

    def __contains__(self, name: object) -> bool:
        """Whether there is a record of that layer; reads nothing."""
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        """Layer names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self._layers)


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def write(stored: Stored, folder: str | Path) -> None:
    """Write a folder: into a temporary one beside it first, then file by file under the final names.

    Raises:
        ValueError: when ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        tensors = {name: value.contiguous() for name, value in _tensors(stored).items()}
        save_file(tensors, Path(partial) / TENSORS, {"format": "pt"})
        checksums = {TENSORS: _sha256(Path(partial) / TENSORS)}
        if stored.graph is not None:
            (Path(partial) / GRAPH).write_text(stored.graph)
            checksums[GRAPH] = _sha256(Path(partial) / GRAPH)
        config = json.dumps(_config(stored, checksums), indent=2, sort_keys=True, allow_nan=False)
        (Path(partial) / CONFIG).write_text(config + "\n")
        # safetensors makes its file private; a model folder has the permissions of any other file.
        shutil.copymode(Path(partial) / CONFIG, Path(partial) / TENSORS)
        # The config names the checksums of the others, so a kill between two renames is noticed on loading.
        for name in (*checksums, CONFIG):
            os.replace(Path(partial) / name, folder / name)


def read(folder: str | Path) -> Stored:
    """Read what ``write`` wrote.

    Raises:
        InvalidFile: for anything missing, truncated, foreign, altered or of another version; it names the file, what
            was expected and what to do.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    mine = config[KEY]
    checksums = {TENSORS: mine.get("sha256")} | ({GRAPH: mine["graph_sha256"]} if mine.get("graph_sha256") else {})
    for name, checksum in checksums.items():
        _check(folder / name, checksum)
    try:
        records = StoredRecords(folder / TENSORS, mine["layers"], str(mine["sha256"]))
        text = (folder / GRAPH).read_text() if GRAPH in checksums else None
        return _from_parts(config, records, folder / TENSORS, text)
    except SafetensorError as error:
        raise InvalidFile(f"{folder / TENSORS}: not a safetensors file ({error}); copy or save it again") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidFile(f"{folder}: {error}; the folder is damaged or was edited, save it again") from error


def _check(file: Path, checksum: str | None) -> None:
    if not file.exists():
        raise InvalidFile(
            f"{file} is missing; {file.parent} must hold {CONFIG}, {TENSORS} and {GRAPH} as dmq_ao.save wrote them"
        )
    if _sha256(file) != checksum:
        raise InvalidFile(
            f"{file}: its checksum is not the one in {CONFIG}: truncated, altered, or of another save; copy both again"
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(file.read_text())
    except FileNotFoundError:
        raise InvalidFile(f"{file} is missing; give a folder that dmq_ao.save wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidFile(f"{file}: not JSON ({error}); it is truncated or foreign, copy or save it again") from error
    mine = config.get(KEY) if isinstance(config, dict) else None
    if not isinstance(mine, dict) or mine.get("quant_method") != "dmq_ao":
        raise InvalidFile(
            f"{file}: no {KEY} of dmq_ao in it; this is a float model or another tool's, quantize it first"
        )
    if mine.get("format_version") != FORMAT_VERSION:
        raise InvalidFile(
            f"{file}: format_version {mine.get('format_version')}, this dmq_ao reads {FORMAT_VERSION}; it was written"
            f" by {mine.get('producer')}: install that version, or quantize again"
        )
    return dict(config)


def _config(stored: Stored, checksums: Mapping[str, str]) -> dict[str, Any]:
    producer = {name: importlib.metadata.version(name) for name in ("dmq_ao", "torch", "torchao")}
    mine = {
        "quant_method": "dmq_ao",
        "format_version": FORMAT_VERSION,
        "producer": producer,
        "sha256": checksums[TENSORS],
        "graph_sha256": checksums.get(GRAPH),
        "recipe": stored.recipe.to_dict(),
        "layers": layer_configs(stored.records),
        "float_tensors": sorted(stored.float_tensors),
        "parameters": {name: list(shape) for name, shape in stored.parameters.items()},
        "example": {
            n: {"shape": list(s), "dtype": str(d).removeprefix("torch.")} for n, (s, d) in stored.example.items()
        },
        "constants": dict(stored.constants),
        "timestep_arg": stored.timestep_arg,
        # A layer without noise has infinitely many dB, which JSON does not know.
        "sqnr_db": {name: db if math.isfinite(db) else str(db) for name, db in stored.sqnr_db.items()},
        "merged": dict(stored.merged),
    }
    return {**stored.model_config, KEY: mine}


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
    kept = {"bits": activation.bits, "ch_axis": activation.ch_axis, "ranges": activation.ranges.value}
    return kept | ({"float8": True} if activation.float8 else {})


def _tensors(stored: Stored) -> dict[str, Tensor]:
    tensors = {name: value.detach().cpu() for name, value in stored.float_tensors.items()}
    tensors |= {f"{_CONSTANT}{name}": value.cpu() for name, value in stored.graph_constants.items()}
    return {name: value.clone() for name, value in tensors.items()} | layer_tensors(stored.records)


def layer_tensors(records: Mapping[str, LayerRecord]) -> dict[str, Tensor]:
    """The tensors of the records as a file holds them: codes packed, all on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, record in records.items():
        weight, activation = record.weight, record.activation
        widths = None if weight.channel_bits is None else weight.channel_bits.cpu()
        tensors[f"{name}.weight"] = _packed(weight, widths)
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


def _packed(weight: WeightRecord, widths: Tensor | None) -> Tensor:
    codes, signed = weight.codes.cpu(), weight.symmetric
    if weight.float8:
        codes, signed = codes.view(torch.uint8), False
    return pack_segments(codes, weight.segments, widths, signed)


def layer_records(layers: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, LayerRecord]:
    """The records back from configs and tensors; what belongs to them is taken out of ``tensors``.

    Raises:
        KeyError: for a tensor or key that is missing.
    """
    return {name: _record(name, layer, tensors) for name, layer in layers.items()}


def _from_parts(config: dict[str, Any], records: StoredRecords, file: Path, text: str | None) -> Stored:
    mine = config[KEY]
    taken = {name for layer in records for name in records.tensor_names(layer)}
    with safe_open(file, "pt") as opened:
        left = {name: opened.get_tensor(name).clone() for name in sorted(records.all_names - taken)}
    constants = {name.removeprefix(_CONSTANT): left.pop(name) for name in list(left) if name.startswith(_CONSTANT)}
    parameters = {name: tuple(shape) for name, shape in mine["parameters"].items()}
    _check_float_tensors(left, mine["float_tensors"], parameters)
    return Stored(
        recipe=Recipe.from_dict(mine["recipe"]),
        records=records,
        float_tensors=left,
        model_config={key: value for key, value in config.items() if key != KEY},
        parameters=parameters,
        example={n: (tuple(e["shape"]), getattr(torch, e["dtype"])) for n, e in mine["example"].items()},
        constants=mine["constants"],
        timestep_arg=mine["timestep_arg"],
        sqnr_db={name: float(db) for name, db in mine["sqnr_db"].items()},
        merged=dict(mine.get("merged", {})),
        graph=text,
        graph_constants=constants,
    )


def _check_float_tensors(
    tensors: Mapping[str, Tensor], expected: list[str], parameters: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise ValueError(f"tensors missing {missing}, unexpected {extra}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != parameters[name]:
            raise ValueError(f"{name} must be {parameters[name]}, got {tuple(tensor.shape)}")


def _record(name: str, layer: Mapping[str, Any], left: dict[str, Tensor]) -> LayerRecord:
    """Take one layer's tensors out of ``left``."""
    packed = left.pop(f"{name}.weight")
    widths = left[f"{name}.weight_bits"] if "segments" in layer else None
    float8 = layer.get("float8", False)
    signed = layer["symmetric"] and not float8
    codes = unpack_segments(packed, layer["shape"], _segments(layer), widths, signed)
    if float8:
        codes = codes.view(numerics.FLOAT8)
    return _with_codes(name, layer, left, codes)


def _record_without_codes(name: str, layer: Mapping[str, Any], left: dict[str, Tensor]) -> LayerRecord:
    dtype = numerics.code_dtype(layer["symmetric"], layer.get("float8", False))
    return _with_codes(name, layer, left, torch.empty(layer["shape"], dtype=dtype, device="meta"))


def _segments(layer: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Widths, each with its number of output channels, in the order of the file."""
    return [(bits, count) for bits, count in layer.get("segments", [(layer["bits"], layer["shape"][0])])]


def _with_codes(name: str, layer: Mapping[str, Any], left: dict[str, Tensor], codes: Tensor) -> LayerRecord:
    bits, symmetric = layer["bits"], layer["symmetric"]
    scale = left.pop(f"{name}.weight_scale")
    zero_point = torch.zeros_like(scale) if symmetric else left.pop(f"{name}.weight_zero_point")
    widths = left.pop(f"{name}.weight_bits") if "segments" in layer else None
    weight = WeightRecord(bits, symmetric, codes, scale, zero_point.to(torch.int32), widths)
    bias = left.pop(f"{name}.corrected_bias", None)
    return LayerRecord(name, layer["kind"], weight, _activation(name, layer["input"], left), bias)


def _activation(name: str, given: Mapping[str, Any] | None, left: dict[str, Tensor]) -> ActivationRecord | None:
    if given is None:
        return None
    ranges = Ranges(given["ranges"])
    dynamic = ranges is Ranges.DYNAMIC
    return ActivationRecord(
        bits=given["bits"],
        ch_axis=given["ch_axis"],
        ranges=ranges,
        scale=torch.zeros(0) if dynamic else left.pop(f"{name}.input_scale"),
        zero_point=(torch.zeros(0) if dynamic else left.pop(f"{name}.input_zero_point")).to(torch.int32),
        timesteps=left.pop(f"{name}.input_timesteps") if ranges is Ranges.PER_STEP else None,
        exponents=left.pop(f"{name}.input_exponents", None),
        channel_scale=left.pop(f"{name}.input_channel_scale", None),
        float8=given.get("float8", False),
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
