"""The file of a calibration set: tensors by name, and one entry of metadata with the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor

from dmq_ao.config import as_json

FORMAT_VERSION = 2
# Of sets without trajectories, which older readers know; both are read.
FIRST_VERSION = 1
# One metadata entry: safetensors writes several in an order of its own, and two runs must give the same bytes.
HEADER = "dmq_ao.calibration_set"


@dataclass(frozen=True)
class Header:
    """What of a set is no tensor; ``CalibrationSet`` says what the fields mean."""

    format_version: int
    inputs: tuple[str, ...]
    shared: dict[str, Any]
    timestep_arg: str
    digest: str
    nesting: Any = None


def read_set(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors [...] of a file.

    Raises:
        ValueError: for what is no calibration set, or of another version.
        SafetensorError: for a damaged file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder" if os.path.isdir(path) else "it is no regular file")
    with safe_open(path, framework="pt", device="cpu") as file:
        header = as_json.parse((file.metadata() or {}).get(HEADER, "null"))
        if not isinstance(header, dict):
            raise ValueError("its metadata names no calibration set")
        if header.get("format_version") not in (FIRST_VERSION, FORMAT_VERSION):
            raise ValueError(f"it has format version {header.get('format_version')}")
        names = list(file.keys())
        return as_json.typed(Header, header, "header"), {name: file.get_tensor(name) for name in names}
