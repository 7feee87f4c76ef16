"""A quantized denoiser as a folder: config.json, packed integers in safetensors, graph.json, manifest.json.

The tensors are those of the layers (see ``layers``), constants of the stored graph as ``graph.<name>``, and what
stayed in float under its own name, or another that the config tells where that one is taken: a weight that is codes in
one layer and float in another is in the file twice.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dmq_ao.config import InvalidFile, Recipe, as_json
from dmq_ao.graph.arguments import nested
from dmq_ao.graph.capture import SAMPLE_NAMES
from dmq_ao.graph.containers import nesting_from_json, nesting_to_json
from dmq_ao.records import LayerRecord
from dmq_ao.serialization import manifest, meaning
from dmq_ao.serialization.graph import read_dtype
from dmq_ao.serialization.layers import FIELDS, layer_configs, layer_tensors, stored_layers
from dmq_ao.serialization.records import StoredRecords

FOLDER_VERSION = 1
CONFIG = "config.json"
TENSORS = "diffusion_pytorch_model.safetensors"
GRAPH = "graph.json"
KEY = "quantization_config"
_CONSTANT, _FLOAT = "graph.", "float."
_LONGEST_NAME = 1000


@dataclass(frozen=True, eq=False)
class Stored:
    """Everything that a folder holds.

    Attributes:
        recipe: how it was made.
        records: integers by layer name.
        float_tensors: what stayed in float, [...] of the original shapes by original name.
        model_config: the diffusers ``config``, empty for other models.
        parameters: original parameter names and shapes: the model's identity.
        example: shape and dtype name of each tensor argument.
        constants: values of the other arguments.
        timestep_arg: name of the timestep, None without one.
        sqnr_db: output noise per layer, as calibration measured it.
        merged: layers that were copies, each with that which stands for it.
        graph: JSON text of the converted graph, see ``serialization.graph``; None when it cannot be stored.
        graph_constants: tensors [...] of that graph that are of no layer and not of the original model.
        nesting: the arguments with dotted paths for values; None where the paths alone tell how arguments nest.
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
    nesting: Mapping[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model: of its sample; the timestep may well be float32 where all else is narrower."""
        names = sorted(self.example, key=lambda name: name not in SAMPLE_NAMES)
        floats = [self.example[n] for n in names if n != self.timestep_arg and self.example[n][1].is_floating_point]
        return max(floats, key=lambda one: len(one[0]) >= 2, default=((), torch.float32))[1]


@dataclass(frozen=True)
class _Example:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Config:
    """``quantization_config`` of ``config.json``, key by key; ``Stored`` says what they are."""

    quant_method: str
    format_version: int
    producer: dict[str, str]
    sha256: str
    graph_sha256: str | None
    recipe: Recipe
    layers: dict[str, Any]
    float_tensors: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    example: dict[str, _Example]
    constants: dict[str, Any]
    timestep_arg: str | None
    sqnr_db: dict[str, Any]
    merged: dict[str, str] = field(default_factory=dict)
    float_names: dict[str, str] = field(default_factory=dict)
    nesting: Any = None


def write(stored: Stored, folder: str | Path) -> None:
    """Write a folder: into a temporary one beside it first, then file by file under the final names.

    Raises:
        ValueError: when ``folder`` is a file, or for what could not be read again.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save into")
    tensors = {name: value.contiguous() for name, value in _tensors(stored).items()}
    layers = layer_configs(stored.records)
    _check_readable(layers, tensors, max_exponent(stored.recipe))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
        partial = Path(temporary)
        save_file(tensors, partial / TENSORS, {"format": "pt"})
        checksums = {TENSORS: manifest.sha256(partial / TENSORS)}
        if stored.graph is not None:
            (partial / GRAPH).write_text(stored.graph)
            checksums[GRAPH] = manifest.sha256(partial / GRAPH)
        config = json.dumps(_config(stored, layers, checksums), indent=2, sort_keys=True, allow_nan=False)
        (partial / CONFIG).write_text(config + "\n")
        files = {name: manifest.sha256(partial / name) for name in (CONFIG, GRAPH) if (partial / name).exists()}
        (partial / manifest.MANIFEST).write_text(manifest.text(files, tensors))
        # safetensors makes its file private; a model folder has the permissions of any other file.
        shutil.copymode(partial / CONFIG, partial / TENSORS)
        # The config names the checksums of the tensors and the graph, and the manifest those of all, so a kill between
        # two renames is noticed on loading.
        for name in (*checksums, CONFIG, manifest.MANIFEST):
            os.replace(partial / name, folder / name)


def _check_readable(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], largest_exponent: int) -> None:
    """What ``read`` would refuse is refused before it is written."""
    for name, layer in stored_layers(layers).items():
        fields = meaning.check_record(name, layer, frozenset(tensors))
        meaning.check_tensors(name, layer, {one: tensors[f"{name}.{one}"] for one in fields}, largest_exponent)


def max_exponent(recipe: Recipe) -> int:
    """Of power-of-two scaling; 0 without it."""
    return 0 if recipe.config.power_of_two is None else recipe.config.power_of_two.max_exponent


def read(folder: str | Path) -> Stored:
    """Read what ``write`` wrote.

    Raises:
        InvalidFile: for anything missing, truncated, foreign, altered or of another version; it names the file, what
            was expected and what to do.
    """
    folder = Path(folder)
    whole, data = _read_config(folder / CONFIG)
    checksums = manifest.read_manifest(folder)
    if checksums is not None:
        checksums.check_file(folder / CONFIG, data)
    try:
        config = as_json.typed(_Config, whole[KEY], KEY)
        graph = _read_files(folder, config, checksums)
        layers = stored_layers(config.layers)
        records = StoredRecords(folder / TENSORS, layers, config.sha256, checksums, max_exponent(config.recipe))
        return _from_parts(whole, config, records, graph)
    except InvalidFile:
        raise
    except SafetensorError as error:
        raise InvalidFile(f"{folder / TENSORS}: not a safetensors file ({error}); copy or save it again") from error
    except Exception as error:  # of any type: all that is read here is the file's
        raise InvalidFile(f"{folder}: {error}; the folder is damaged or was edited, save it again") from error


def _read_files(folder: Path, config: _Config, checksums: manifest.Manifest | None) -> str | None:
    """All files there, and those that they were; tensors by themselves where there is a manifest. The graph's text."""
    graph = None
    for name in (TENSORS, *([] if config.graph_sha256 is None else [GRAPH])):
        file = folder / name
        if not file.is_file():
            raise InvalidFile(
                f"{file} is missing; {folder} must hold {CONFIG}, {TENSORS} and {GRAPH} as dmq_ao.save wrote them"
            )
        if name == GRAPH:
            data = as_json.read_bytes(file)
            differs, graph = hashlib.sha256(data).hexdigest() != config.graph_sha256, data.decode()
        else:
            differs = checksums is None and manifest.sha256(file) != config.sha256
        if differs:
            raise InvalidFile(
                f"{file}: its checksum is not the one in {CONFIG}: truncated, altered, or of another save; copy both"
                " again"
            )
    if config.graph_sha256 is None and checksums is not None and GRAPH in checksums.files:
        raise InvalidFile(f"{folder / CONFIG} knows no {GRAPH}, and {manifest.MANIFEST} does; copy all files again")
    return graph


def _read_config(file: Path) -> tuple[dict[str, Any], bytes]:
    try:
        data = as_json.read_bytes(file)
        config: Any = as_json.parse(data)
    except FileNotFoundError:
        raise InvalidFile(f"{file} is missing; give a folder that dmq_ao.save wrote") from None
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{file}: not JSON ({error}); it is truncated or foreign, copy or save it again") from error
    mine = config.get(KEY) if isinstance(config, dict) else None
    if not isinstance(mine, dict) or mine.get("quant_method") != "dmq_ao":
        raise InvalidFile(
            f"{file}: no {KEY} of dmq_ao in it; this is a float model or another tool's, quantize it first"
        )
    if mine.get("format_version") != FOLDER_VERSION:
        raise InvalidFile(
            f"{file}: format_version {mine.get('format_version')}, this dmq_ao reads {FOLDER_VERSION}; it was written"
            f" by {mine.get('producer')}: install that version, or quantize again"
        )
    return dict(config), data


def _config(stored: Stored, layers: Mapping[str, Any], checksums: Mapping[str, str]) -> dict[str, Any]:
    producer = {name: importlib.metadata.version(name) for name in ("dmq_ao", "torch", "torchao")}
    mine = {
        "quant_method": "dmq_ao",
        "format_version": FOLDER_VERSION,
        "producer": producer,
        "sha256": checksums[TENSORS],
        "graph_sha256": checksums.get(GRAPH),
        "recipe": stored.recipe.to_dict(),
        "layers": layers,
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
        **({} if stored.nesting is None else {"nesting": nesting_to_json(stored.nesting)}),
    }
    renamed = _float_names(stored)
    if renamed:
        mine["float_names"] = renamed
    return {**stored.model_config, KEY: mine}


def _tensors(stored: Stored) -> dict[str, Tensor]:
    names = _float_names(stored)
    tensors = {names.get(name, name): value.detach().cpu() for name, value in stored.float_tensors.items()}
    tensors |= {f"{_CONSTANT}{name}": value.cpu() for name, value in stored.graph_constants.items()}
    own = layer_tensors(stored.records)
    twice = sorted(set(tensors) & set(own))
    if twice:
        raise ValueError(f"{twice} are both of a quantized layer and constants of the graph; keep that layer in float")
    return {name: value.clone() for name, value in tensors.items()} | own


def _float_names(stored: Stored) -> dict[str, str]:
    """Names in the file of the float tensors that cannot have their own: a layer's record does, or constants do."""
    record_names = {f"{layer}.{part}" for layer in stored.records for part in FIELDS}
    names = {}
    for name in sorted(stored.float_tensors):
        if name in record_names or name.startswith(_CONSTANT):
            names[name] = _FLOAT + name
            while names[name] in record_names or names[name] in stored.float_tensors:
                names[name] = _FLOAT + names[name]
    return names


def _by_original_name(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take the float tensors that have another name in the file out of ``tensors``.

    Raises:
        ValueError: for a name that the file does not have, or has under its own name too.
    """
    lost = sorted(other for other in names.values() if other not in tensors)
    if lost or len(set(names.values())) < len(names) or names.keys() & tensors.keys():
        raise ValueError(f"float_names: {dict(names)} do not name tensors of the file once each; missing {lost}")
    return {name: tensors.pop(other) for name, other in names.items()}


def _from_parts(whole: dict[str, Any], config: _Config, records: StoredRecords, graph: str | None) -> Stored:
    rest = dict(records.rest)
    renamed = _by_original_name(rest, config.float_names)
    constants = {name.removeprefix(_CONSTANT): rest.pop(name) for name in list(rest) if name.startswith(_CONSTANT)}
    rest |= renamed
    for names in (records, config.parameters, config.example, config.constants, config.merged):
        _check_names(names)
    _check_float_tensors(rest, config.float_tensors, config.parameters)
    if config.timestep_arg is not None and config.timestep_arg not in config.example:
        raise ValueError(f"timestep_arg {config.timestep_arg!r} is not one of the arguments {sorted(config.example)}")
    if any(not isinstance(value, (bool, int, float, str, type(None))) for value in config.constants.values()):
        raise TypeError("constants must be numbers, strings, true, false or null")
    nesting = None if config.nesting is None else nesting_from_json(config.nesting)
    nested(nesting, config.example | config.constants)
    return Stored(
        recipe=config.recipe,
        records=records,
        float_tensors=rest,
        model_config={key: value for key, value in whole.items() if key != KEY},
        parameters=config.parameters,
        example={name: (one.shape, read_dtype(one.dtype)) for name, one in config.example.items()},
        constants=config.constants,
        timestep_arg=config.timestep_arg,
        sqnr_db={name: _db(name, db) for name, db in config.sqnr_db.items()},
        merged=config.merged,
        graph=graph,
        graph_constants=constants,
        nesting=nesting,
    )


def _check_names(names: Mapping[str, Any]) -> None:
    """Paths of modules, parameters and arguments."""
    for name in names:
        if not name.isprintable() or len(name) > _LONGEST_NAME or not all(name.split(".")):
            raise ValueError(f"{name[:80]!r} is not a dotted name")


def _db(name: str, value: Any) -> float:
    if type(value) is float or value in ("inf", "-inf", "nan"):
        return float(value)
    raise TypeError(f"sqnr_db.{name}: expected a number of dB, got {value!r}")


def _check_float_tensors(
    tensors: Mapping[str, Tensor], expected: tuple[str, ...], parameters: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra or not set(expected) <= set(parameters):
        unknown = sorted(set(expected) - set(parameters))
        raise ValueError(
            f"tensors missing {missing}, unexpected {extra}" + (f", unknown {unknown}" if unknown else "")
        )
    for name, shape in parameters.items():
        if any(size < 0 for size in shape) or name in tensors and tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"{name} must be {shape}, got {got}")
