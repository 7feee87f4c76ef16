"""The denoisers of a pipeline's folder, read without the rest: most have one, Wan 2.2 has two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from dmq_ao.api.arguments import DENOISER_NAMES
from dmq_ao.api.saving import load
from dmq_ao.config import InvalidFile, as_json
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.pipelines.seeds import INDEX
from dmq_ao.serialization.folder import CONFIG, KEY

Part = TypeVar("Part")


def load_denoisers(
    folder: str | Path, *, backend: str = "auto", packed: bool = False, device: torch.device | str = "cpu"
) -> dict[str, QuantizedDenoiser]:
    """Load only the quantized denoisers of a pipeline folder, or that of a folder that ``dmq_ao.save`` wrote, by name.

    ``backend``, ``packed`` and ``device`` are as in ``dmq_ao.load``.

    Raises:
        InvalidFile: when there is none.
    """
    folders = denoiser_folders(folder)
    return {name: load(part, backend=backend, packed=packed, device=device) for name, part in folders.items()}


def load_denoiser(
    folder: str | Path, *, backend: str = "auto", packed: bool = False, device: torch.device | str = "cpu"
) -> QuantizedDenoiser:
    """Load the one quantized denoiser of a folder; arguments as for ``load_denoisers``.

    Raises:
        InvalidFile: when there is none.
        ValueError: when there are several.
    """
    return load(denoiser_folder(folder), backend=backend, packed=packed, device=device)


def denoiser_folder(folder: str | Path) -> Path:
    """Where a pipeline folder keeps its one denoiser; a folder that is no pipeline's is itself the denoiser's.

    Raises:
        InvalidFile: when ``folder`` is not there, or is a pipeline without a denoiser.
        ValueError: for a pipeline of several.
    """
    return the_only(denoiser_folders(folder), str(folder))


def denoiser_folders(folder: str | Path) -> dict[str, Path]:
    """Where a pipeline folder keeps its denoisers, by name: the quantized ones, or all where none is.

    A folder that is no pipeline's is itself a denoiser's, called as the folder.

    Raises:
        InvalidFile: when ``folder`` is not there, or is a pipeline without a denoiser.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidFile(f"{folder}: no such folder; give a quantized pipeline folder, or one that dmq_ao.save wrote")
    if not (folder / INDEX).exists():
        return {folder.resolve().name: folder}
    folders = {name: folder / name for name in DENOISER_NAMES if (folder / name).is_dir()}
    if not folders:
        raise InvalidFile(
            f"{folder} is a pipeline without a {' or '.join(DENOISER_NAMES)}; give one that has a denoiser"
        )
    return {name: part for name, part in folders.items() if is_quantized(part)} or folders


def the_only(parts: Mapping[str, Part], where: str) -> Part:
    """What there is one of, by the names of denoisers.

    Raises:
        ValueError: when there are several.
    """
    if len(parts) > 1:
        raise ValueError(f"{where} has {len(parts)} denoisers, {' and '.join(parts)}, and one is wanted here; name it")
    return next(iter(parts.values()))


def is_quantized(folder: Path) -> bool:
    """Whether a denoiser's folder holds one that was quantized, by dmq_ao or another tool.

    Raises:
        InvalidFile: when its config is not JSON.
    """
    config = folder / CONFIG
    if not config.exists():
        return False
    try:
        data = as_json.read_json(config)
    except ValueError as error:
        raise InvalidFile(
            f"{config}: not JSON ({error}); it is truncated or foreign, copy or save it again"
        ) from error
    return isinstance(data, dict) and KEY in data
