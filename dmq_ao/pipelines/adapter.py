"""Pipelines in and out: load one (quantized or not), record through it, sample with it, save it.

A quantized pipeline on disk is the diffusers folder it came from, with the denoiser's subfolder written by
``dmq_ao.save``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmq_ao.api.arguments import DENOISER_NAMES
from dmq_ao.api.compile import compile
from dmq_ao.api.quantize import denoiser_name
from dmq_ao.api.saving import load, save, usable_device
from dmq_ao.config import InvalidFile, Selection, SelectMethod, as_json
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation.report import json_ready
from dmq_ao.pipelines.checkpoints import fuse_lora, pipeline_of_file
from dmq_ao.pipelines.prompts import Prompts, call_arguments
from dmq_ao.pipelines.seeds import INDEX, calibration_seeds, note_seeds, trajectory_seeds
from dmq_ao.samples import CalibrationSet, record
from dmq_ao.serialization.folder import CONFIG, KEY

DEMO = "demo"
REPORT = "report.json"
_LIBRARIES = ("diffusers", "transformers")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def demo_folder() -> Path:
    """Where the bundled demo pipeline lies: an unconditional DDIM pipeline on Fashion-MNIST (28x28, grey)."""
    return Path(str(resources.files("dmq_ao") / "demo_denoiser"))


def load_pipeline(
    source: str | Path,
    *,
    backend: str = "auto",
    packed: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    lora: str | Path | None = None,
) -> Any:
    """Load a pipeline; a denoiser that dmq_ao saved becomes a ``QuantizedDenoiser``.

    Args:
        source: a diffusers pipeline folder, a single ``.safetensors`` checkpoint, a Hub id, or ``"demo"``.
        backend: for a quantized denoiser, as in ``dmq_ao.load``; and so is the next.
        packed: see there.
        dtype: of what is float; None for that which a quantized denoiser takes, and else float32.
        device: of all of it.
        lora: weights to fuse into a float pipeline, as ``checkpoints.fuse_lora`` takes them.

    Raises:
        ValueError: when there is no such device; for LoRA weights that do not fit, or of a quantized pipeline.
        InvalidFile: when a folder is no pipeline, naming what it lacks, or is not there.
    """
    import diffusers

    device = usable_device(device)
    if str(source) == DEMO:
        source = demo_folder()
    folder = Path(source)
    if folder.is_file():
        return _placed(pipeline_of_file(folder, dtype or torch.float32), device, lora)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise InvalidFile(
                f"{source}: no such folder; give a diffusers pipeline folder, a .safetensors checkpoint, a Hub id or"
                f" {DEMO!r}"
            )
        whole = diffusers.DiffusionPipeline.from_pretrained(str(source), dtype=dtype or torch.float32)
        return _placed(whole, device, lora)
    if not (folder / INDEX).exists():
        raise InvalidFile(
            f"{folder} has no {INDEX}; give a diffusers pipeline folder (for a denoiser alone: dmq_ao.load)"
        )
    _check_parts(folder / INDEX)
    seeds = calibration_seeds(folder)
    names = [name for name in DENOISER_NAMES if is_quantized(folder / name)]
    if names and lora is not None:
        raise ValueError(f"{folder} is quantized; LoRA weights are fused into the float pipeline, before")
    quantized = {name: load(folder / name, backend=backend, packed=packed, device=device) for name in names}
    dtype = dtype or next((denoiser.dtype for denoiser in quantized.values()), torch.float32)
    # diffusers wants components of its own classes: it is given the weightless originals, and then the real ones.
    components = {name: denoiser.skeleton for name, denoiser in quantized.items()}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **components)
    except Exception as error:  # diffusers' own, of any type: they are about the folder's files
        raise InvalidFile(
            f"{folder}: diffusers {diffusers.__version__} does not load this pipeline ({error!r}); it is incomplete,"
            " was edited, or is of another version of diffusers"
        ) from error
    for name, denoiser in quantized.items():
        setattr(pipeline, name, denoiser)
    if seeds is not None:
        note_seeds(pipeline, seeds)
    return _placed(pipeline, device, lora)


def _check_parts(index: Path) -> None:
    """Refuse parts of other libraries: some versions of diffusers import whatever the index of a pipeline names.

    Raises:
        InvalidFile: naming the part.
    """
    import diffusers

    try:
        parts = dict(as_json.read_json(index))
    except (TypeError, ValueError) as error:
        raise InvalidFile(f"{index}: not a pipeline index ({error}); copy it again") from error
    for name, part in parts.items():
        if isinstance(part, list) and len(part) == 2 and not name.startswith("_"):
            library = str(part[0])
            own = library.isidentifier() and hasattr(diffusers.pipelines, library)
            if part[0] is not None and library not in _LIBRARIES and not own:
                raise InvalidFile(
                    f"{index}: {name} is from {library!r}; only parts of {_LIBRARIES} and of diffusers' pipelines are"
                    " loaded"
                )


def load_denoiser(
    folder: str | Path, *, backend: str = "auto", packed: bool = False, device: torch.device | str = "cpu"
) -> QuantizedDenoiser:
    """Load only the quantized denoiser of a pipeline folder, or of a folder that ``dmq_ao.save`` wrote.

    ``backend``, ``packed`` and ``device`` are as in ``dmq_ao.load``.

    Raises:
        InvalidFile: when there is none.
    """
    return load(denoiser_folder(folder), backend=backend, packed=packed, device=device)


def denoiser_folder(folder: str | Path) -> Path:
    """Where a pipeline folder keeps its denoiser; a folder that is no pipeline's is itself the denoiser's.

    Raises:
        InvalidFile: when ``folder`` is not there, or is a pipeline without a denoiser.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidFile(f"{folder}: no such folder; give a quantized pipeline folder, or one that dmq_ao.save wrote")
    if not (folder / INDEX).exists():
        return folder
    for name in DENOISER_NAMES:
        if (folder / name).is_dir():
            return folder / name
    raise InvalidFile(f"{folder} is a pipeline without a {' or '.join(DENOISER_NAMES)}; give one that has a denoiser")


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


def _placed(pipeline: Any, device: torch.device, lora: str | Path | None) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        fuse_lora(pipeline, lora)
    return pipeline.to(device)


def compile_denoiser(pipeline: Any) -> None:
    """Compile a pipeline's denoiser in place: ``torch.compile``, or ``dmq_ao.compile`` where it is quantized."""
    name = denoiser_name(pipeline)
    denoiser = getattr(pipeline, name)
    quantized = isinstance(denoiser, QuantizedDenoiser)
    setattr(pipeline, name, compile(denoiser) if quantized else torch.compile(denoiser))


def save_pipeline(pipeline: Any, folder: str | Path, report: Mapping[str, Any] | None = None) -> None:
    """Write a pipeline whose denoiser is quantized; nothing is left behind when it fails.

    Args:
        pipeline: with a quantized denoiser.
        folder: where to.
        report: kept beside the pipeline as ``report.json``.

    Raises:
        ValueError: when ``folder`` exists and is not empty.
        TypeError: when the denoiser is not quantized.
    """
    folder = Path(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = denoiser_name(pipeline)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-partial-") as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        denoiser = getattr(pipeline, name)
        save(denoiser, partial / name)
        for other, component in pipeline.components.items():
            if other != name and hasattr(component, "save_pretrained"):
                component.save_pretrained(partial / other)
        index = {key: value for key, value in pipeline.config.items() if key != "_name_or_path"}
        index |= {"_class_name": type(pipeline).__name__, name: ["diffusers", type(denoiser.skeleton).__name__]}
        (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if report is not None:
            (partial / REPORT).write_text(json.dumps(json_ready(report), indent=2, allow_nan=False) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)


def check_free(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` can be written: absent, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give another one, or remove it first")


def sample(
    pipeline: Any,
    seeds: Sequence[int],
    *,
    steps: int = 20,
    prompt: Prompts = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """Run a pipeline once per seed, each with a generator of its own, so that a seed means the same in any batch.

    Returns:
        Images [seeds, C, H, W] float32 in 0..1; of pipelines that draw videos [seeds, frames, C, H, W].

    Raises:
        ValueError: when the pipeline wants a prompt and there is none, and the like, as ``prompts.call_arguments``.
        TypeError: when it draws neither images nor videos.
    """
    images = []
    with tqdm(total=len(seeds), disable=not progress, unit="image", desc="sample") as bar:
        for start in range(0, len(seeds), batch_size):
            chunk = seeds[start : start + batch_size]
            result = _run(pipeline, chunk, steps, prompt, "np")
            pictures = getattr(result, "images", getattr(result, "frames", None))
            if pictures is None:
                raise TypeError(f"{type(pipeline).__name__} returns {', '.join(result)}, not images")
            images.append(torch.as_tensor(np.asarray(pictures)).movedim(-1, -3).float())
            bar.update(len(chunk))
    return torch.cat(images).contiguous()


def _run(pipeline: Any, seeds: Sequence[int], steps: int, prompt: Prompts, output_type: str) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        **call_arguments(pipeline, seeds, prompt),
        generator=generators,
        num_inference_steps=steps,
        output_type=output_type,
    )


def record_pipeline(
    pipeline: Any,
    *,
    num_samples: int,
    steps: int = 20,
    seed: int = 0,
    prompt: Prompts = None,
    batch_size: int = 8,
    trajectories: int | None = None,
    select: str | Selection = SelectMethod.UNIFORM,
    progress: bool = False,
) -> CalibrationSet:
    """Record calibration samples from a pipeline's own sampling loop.

    Args:
        pipeline: with a float denoiser.
        num_samples: rows to keep.
        steps: of the sampler.
        seed: first seed of the trajectories; one a trajectory.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn.
        batch_size: trajectories at a time.
        trajectories: how many to run; as for ``seeds.trajectory_seeds``.
        select: how the rows are spread over the timesteps, as for ``dmq_ao.record``.
        progress: show a progress bar.

    Raises:
        TypeError: when the denoiser is already quantized.
        ValueError: when the pipeline wants a prompt and there is none, and the like, as ``prompts.call_arguments``.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if isinstance(denoiser, QuantizedDenoiser):
        raise TypeError("the denoiser is already quantized; record from the float pipeline it came from")
    call_arguments(pipeline, [seed], prompt)  # before anything is wrapped
    seeds = trajectory_seeds(num_samples, steps=steps, seed=seed, trajectories=trajectories, select=select)
    with (
        record(denoiser, num_samples=num_samples, seed=seed, select=select) as recorder,
        tqdm(total=len(seeds), disable=not progress, unit="trajectory", desc="record") as bar,
    ):
        for start in range(0, len(seeds), batch_size):
            chunk = seeds[start : start + batch_size]
            with recorder.trajectory(part=len(chunk) / (len(seeds) - start)):
                _run(pipeline, chunk, steps, prompt, "latent")  # nothing is decoded where the pipeline can leave it
            bar.update(len(chunk))
    return recorder.calibration_set()
