"""Files that an interrupted run goes on from: JSON and tensors in one file, written whole, never another run's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmq_ao.config import InvalidFile, as_json

_STATE_KEY = "dmq_ao.state"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run saves its progress, and for which run.

    Attributes:
        folder: of the files; None for a run that saves nothing.
        digest: of everything that the run depends on.
    """

    folder: Path | None
    digest: str

    def load(self, name: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """JSON and tensors [...] that ``save`` wrote under a name; None where there are none.

        Raises:
            InvalidFile: for a file that is damaged, or not ``what`` is expected.
            ValueError: for a file of another run.
        """
        return None if self.folder is None else load_state(self._file(self.folder, name), self.digest, what)

    def save(self, name: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write JSON and tensors [...] under a name; what stood there stays until the new file is whole."""
        if self.folder is not None:
            file = self._file(self.folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_state(file, self.digest, meta, tensors)

    @staticmethod
    def _file(folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"


def save_state(file: Path, digest: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state; whatever stood there stays until the new one is whole.

    Args:
        file: to write.
        digest: of everything the run depends on.
        meta: JSON-ready.
        tensors: by name, of any shapes [...].
    """
    partial = file.with_suffix(".partial")
    header = {_STATE_KEY: json.dumps({"digest": digest, "meta": dict(meta)})}
    save_file({key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}, partial, header)
    os.replace(partial, file)


def load_state(file: Path, digest: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What ``save_state`` wrote: JSON, and tensors [...] by name; None when there is no file.

    Args:
        file: to read.
        digest: of the run that goes on.
        what: the file is, for the error.

    Raises:
        InvalidFile: for a file that is damaged, or is no state.
        ValueError: for the state of another run.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as archive:
            header = as_json.parse((archive.metadata() or {})[_STATE_KEY])
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
        file_digest, meta = header["digest"], dict(header["meta"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidFile(f"{file}: not {what} ({error}); delete it to start again") from error
    if file_digest != digest:
        raise ValueError(
            f"{file} belongs to another run: model, recipe, samples, seed and batch_size must all be the same; delete"
            " the folder to start again, or give another state_dir"
        )
    return meta, tensors
