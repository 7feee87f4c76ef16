"""Pipelines in and out: load one (quantized or not), record through it, sample with it, save it.

A quantized pipeline on disk is the diffusers folder it came from, with the denoiser's subfolder written by
``dmq_ao.save``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.calibration import CalibrationSet, record
from dmq_ao.config import InvalidFile
from dmq_ao.module import QuantizedDenoiser
from dmq_ao.quantize import DENOISER_NAMES, denoiser_name, load, save
from dmq_ao.serialization import CONFIG, KEY

DEMO = "demo"


def demo_folder() -> Path:
    """Where the bundled demo pipeline lies: an unconditional DDIM pipeline on Fashion-MNIST (28x28, grey)."""
    return Path(str(resources.files("dmq_ao") / "demo_denoiser"))


def load_pipeline(source: str | Path, *, backend: str = "auto", dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline; a denoiser that dmq_ao saved becomes a ``QuantizedDenoiser``.

    Args:
        source: a diffusers pipeline folder, a Hub id, or ``"demo"``.
        backend: for a quantized denoiser, as in ``dmq_ao.load``.
        dtype: of a float denoiser.

    Raises:
        InvalidFile: when a folder is no pipeline, naming what it lacks.
    """
    import diffusers

    if str(source) == DEMO:
        source = demo_folder()
    folder = Path(source)
    if not folder.is_dir():
        return _quiet(diffusers.DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype))
    if not (folder / "model_index.json").exists():
        raise InvalidFile(
            f"{folder} holds no model_index.json; give a diffusers pipeline folder (for a denoiser alone: dmq_ao.load)"
        )
    given: dict[str, nn.Module] = {}
    for name in DENOISER_NAMES:
        if _is_quantized(folder / name):
            given[name] = load(folder / name, backend=backend)
    return _quiet(diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, **given))


def _is_quantized(folder: Path) -> bool:
    config = folder / CONFIG
    return config.exists() and KEY in json.loads(config.read_text())


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline whose denoiser is quantized; nothing is left behind when it fails.

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
        (partial / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)


def check_free(folder: Path) -> None:
    """Raise ``ValueError`` unless ``folder`` can be written: absent, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give another one, or remove it first")


def sample(
    pipeline: Any, seeds: Sequence[int], *, steps: int = 20, prompt: str | None = None, batch_size: int = 8
) -> Tensor:
    """Run a pipeline once per seed, each with a generator of its own, so that a seed means the same in any batch.

    Returns:
        Images [seeds, C, H, W] float32 in 0..1.
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        chunk = seeds[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in chunk]
        inputs: dict[str, Any] = {"batch_size": len(chunk)} if prompt is None else {"prompt": [prompt] * len(chunk)}
        result = pipeline(**inputs, generator=generators, num_inference_steps=steps, output_type="np")
        images.append(torch.from_numpy(result.images).permute(0, 3, 1, 2).float())
    return torch.cat(images).contiguous()


def record_pipeline(
    pipeline: Any,
    *,
    num_samples: int,
    steps: int = 20,
    seed: int = 0,
    prompt: str | None = None,
    batch_size: int = 8,
    trajectories: int | None = None,
) -> CalibrationSet:
    """Record calibration samples from a pipeline's own sampling loop.

    Args:
        pipeline: with a float denoiser.
        num_samples: rows to keep, uniform over the timesteps.
        steps: of the sampler.
        seed: first seed of the trajectories; one a trajectory.
        prompt: for pipelines that want one.
        batch_size: trajectories at a time.
        trajectories: how many to run; by default enough to give every kept row a trajectory of its own at each
            timestep.

    Raises:
        TypeError: when the denoiser is already quantized.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if isinstance(denoiser, QuantizedDenoiser):
        raise TypeError("the denoiser is already quantized; record from the float pipeline it came from")
    count = trajectories or max(2, -(-num_samples // steps))
    with record(denoiser, num_samples=num_samples, seed=seed) as recorder:
        sample(pipeline, range(seed, seed + count), steps=steps, prompt=prompt, batch_size=batch_size)
    return recorder.calibration_set()
