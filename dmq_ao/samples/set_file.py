"""The file of a calibration set: one safetensors file, whose header says what is no tensor."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmq_ao.config import as_json

# Sets without trajectories, which all readers know; with them; in buckets of several shapes.
FIRST_VERSION, WITH_TRAJECTORIES, WITH_BUCKETS = VERSIONS = (1, 2, 3)
# One metadata entry: safetensors writes several in an order of its own, and two runs must give the same bytes.
_HEADER = "dmq_ao.calibration_set"


@dataclass(frozen=True)
class SetHeader:
    """What of a set is no tensor.

    Attributes:
        format_version: one of ``VERSIONS``.
        inputs: names of the arguments with a row for each sample.
        shared: the others that are plain values.
        timestep_arg: name of the timestep.
        digest: of the whole set.
        buckets: how many shapes the set has.
        nesting: how arguments nest, where their names do not tell.
    """

    format_version: int
    inputs: tuple[str, ...]
    shared: dict[str, Any]
    timestep_arg: str
    digest: str
    buckets: int = 1
    nesting: Any = None


def write_set(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file of ``tensors`` [...], whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_set(path: str | os.PathLike[str]) -> tuple[SetHeader, dict[str, Tensor]]:
    """The header and all tensors [...] of a file.

    Raises:
        ValueError: for a file that is no calibration set, or of another version; safetensors and JSON raise their own.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder" if os.path.isdir(path) else "it is no regular file")
    with safe_open(path, framework="pt", device="cpu") as file:
        header = as_json.parse((file.metadata() or {}).get(_HEADER, "null"))
        if not isinstance(header, dict):
            raise ValueError("its metadata names no calibration set")
        if header.get("format_version") not in VERSIONS:
            raise ValueError(f"it has format version {header.get('format_version')}")
        names = list(file.keys())
        return as_json.typed(SetHeader, header, "header"), {name: file.get_tensor(name) for name in names}


def of_bucket(number: int) -> str:
    """What the names of a bucket's tensors begin with; of the first, nothing."""
    return "" if not number else f"bucket.{number}."
