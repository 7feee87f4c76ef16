"""Checksums of everything in a folder, in ``manifest.json``: of each JSON file, and of each tensor by itself.

They find what was damaged or edited, and not who did it: an editor can write them anew (see ``docs/security.md``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmq_ao.config import InvalidFile, as_json

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "dmq_ao.manifest", 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """SHA-256, in hex.

    Attributes:
        files: of each JSON file, by name.
        tensors: of each tensor, by name.
    """

    files: Mapping[str, str]
    tensors: Mapping[str, str]

    def check_file(self, file: Path, data: bytes) -> None:
        """Refuse a JSON file, of which ``data`` was read, that is not the one that was written.

        Raises:
            InvalidFile: naming the file.
        """
        if hashlib.sha256(data).hexdigest() != self.files.get(file.name):
            raise InvalidFile(
                f"{file}: its checksum is not the one in {MANIFEST}: truncated, altered, or of another save; copy all"
                " files of the folder again"
            )

    def check_names(self, file: Path, names: frozenset[str]) -> None:
        """Refuse a file of other tensors than were written.

        Raises:
            InvalidFile: naming the file, and tensors.
        """
        missing, extra = sorted(set(self.tensors) - names), sorted(names - set(self.tensors))
        if missing or extra:
            raise InvalidFile(
                f"{file}: tensors missing {missing}, unexpected {extra} by {MANIFEST}; copy all files of the folder"
                " again"
            )

    def check_tensor(self, file: Path, name: str, tensor: Tensor) -> None:
        """Refuse a tensor [...] that is not the one that was written.

        Raises:
            InvalidFile: naming the file and the tensor.
        """
        if digest(tensor) != self.tensors.get(name):
            raise InvalidFile(
                f"{file}: the checksum of {name} is not the one in {MANIFEST}: truncated, altered, or of another save;"
                " copy all files of the folder again"
            )


def text(files: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The manifest of JSON files, by name with their SHA-256, and of tensors [...] by name."""
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    data = {"format": _FORMAT, "version": _VERSION, "files": dict(files), "tensors": digests}
    return json.dumps(data, indent=0, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where it has none, as those of dmq_ao 0.1 before November 2026.

    Raises:
        InvalidFile: for one that is damaged, or of another version.
    """
    file = folder / MANIFEST
    try:
        data = as_json.read_json(file)
        if data["format"] != _FORMAT or data["version"] != _VERSION:
            raise ValueError(f"format {data['format']!r} {data['version']!r}, this dmq_ao reads {_FORMAT} {_VERSION}")
        return Manifest(_digests(data["files"]), _digests(data["tensors"]))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidFile(f"{file}: not a manifest ({error!r}); it is damaged or was edited, copy it again") from error


def _digests(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in data.values()):
        raise ValueError("expected checksums of 64 hex digits by name")
    return data


def digest(tensor: Tensor) -> str:
    """SHA-256, in hex, of a tensor's dtype, shape [...] and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def sha256(file: Path) -> str:
    """SHA-256, in hex, of a file's bytes: as many as it says that it has, for some are read without end."""
    sha, remaining = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        while remaining > 0 and (chunk := stream.read(min(remaining, 2**20))):
            sha.update(chunk)
            remaining -= len(chunk)
    return sha.hexdigest()
