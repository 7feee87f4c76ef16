"""Quantized pipelines against the float one they came from: same seeds, same states, none of them calibration's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmq_ao.api.arguments import denoiser_names
from dmq_ao.benchmarks.measure import (
    GRID_IMAGES,
    STATES_PER_TIMESTEP,
    images_of,
    states_of_denoisers,
    variant_report,
)
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import folder_bytes, machine
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.evaluation.table import FLOAT_ROW
from dmq_ao.pipelines.adapter import load_pipeline
from dmq_ao.pipelines.denoisers import denoiser_folders, load_denoisers
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.pipelines.seeds import calibration_seeds, check_seeds, fresh_seeds, span

FIRST_SEED = 1_000_000  # of images, where none is asked for: far from the seeds that calibration counts up from
STATES_OFFSET = 1_000_000  # from the seeds of images to those of states


def compare(
    model: str | Path,
    folders: Sequence[str | Path],
    *,
    images: int = 16,
    steps: int = 20,
    seed: int | None = None,
    allow_calibration_seeds: bool = False,
    prompt: Prompts = None,
    lora: str | Path | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure one-step errors on held-out states, and images drawn from the same seeds.

    Args:
        model: the float pipeline, as ``load_pipeline`` takes it.
        folders: quantized pipelines or denoisers made from it.
        images: same-seed images.
        steps: of the sampler.
        seed: first seed of the images; None for the first from a million on that no calibration took.
        allow_calibration_seeds: compare on seeds that a calibration took, too.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn.
        lora: weights fused into the float pipeline, those of the quantized ones.
        backend: runs the quantized denoisers.
        device: of all of them.
        say: told what is going on.

    Returns:
        The report that ``dmq_ao.evaluation`` renders, and its pictures, rows [N, C, H, W] in 0..1.

    Raises:
        InvalidFile: for a folder that is not there or not quantized; before anything is sampled.
        OverlappingSeeds: for a ``seed`` whose images start from noise that one of the folders was calibrated on.
        ValueError: when there is no such device; for denoisers of different dtypes, or of another pipeline.
        TypeError: when ``model`` is quantized itself.
    """
    names = _names(folders)
    seeds, state_seeds, calibrations = _seeds(names, images, seed, allow_calibration_seeds)
    quantized = {name: load_denoisers(folder, backend=backend, device=device) for name, folder in names.items()}
    pipeline = load_pipeline(model, device=device, dtype=_common_dtype(quantized), lora=lora)
    quantized = {name: _as_in(pipeline, parts, names[name]) for name, parts in quantized.items()}
    teachers = {name: getattr(pipeline, name) for name in denoiser_names(pipeline)}
    float_size = sum(map(float_bytes, teachers.values()))
    say(f"float: {steps}-step trajectories for one-step errors, and {images} images")
    states = states_of_denoisers(pipeline, steps=steps, seed=state_seeds.start, prompt=prompt)
    expected = images_of(pipeline, teachers, seeds, steps=steps, prompt=prompt)
    pictures, variants = {FLOAT_ROW: expected[:GRID_IMAGES]}, []
    for name, parts in quantized.items():
        say(f"{name}: one-step errors and {images} images")
        student_images = images_of(pipeline, parts, seeds, steps=steps, prompt=prompt)
        size = sum(map(folder_bytes, denoiser_folders(names[name]).values()))
        size += sum(float_bytes(teacher) for part, teacher in teachers.items() if part not in parts)
        pictures[name] = student_images[:GRID_IMAGES]
        variants.append(variant_report(name, parts, teachers, states, student_images, expected, size, float_size))
    rows = sum(map(len, states.values()))
    report = {
        "title": f"{model}: float against quantized",
        "model": str(model),
        "machine": machine(),
        "protocol": {
            "scheduler": f"{type(pipeline.scheduler).__name__}, {steps} steps",
            "one-step error": f"{rows} states of float trajectories, seeds {span(state_seeds)}",
            "images": f"{images}, seeds {span(seeds)}",
            "calibration seeds": calibrations,
            "backend": backend,
        },
        "float": {"file_bytes": float_size, "latency_ms": None},
        "variants": variants,
    }
    return report, pictures


def _seeds(names: Mapping[str, str | Path], images: int, seed: int | None, allow: bool) -> tuple[range, range, str]:
    """Seeds of images, those of states, and what is known of those that calibrations took, as text."""
    calibrations = {name: calibration_seeds(folder) for name, folder in names.items()}
    spans = [seeds for ranges in calibrations.values() for seeds in ranges or ()]
    image_seeds = fresh_seeds(images, spans, FIRST_SEED) if seed is None else range(seed, seed + images)
    if not allow:
        check_seeds("images are drawn", image_seeds, calibrations)
    state_seeds = fresh_seeds(STATES_PER_TIMESTEP, [*spans, image_seeds], image_seeds.start + STATES_OFFSET)
    lines = (
        f"{name}: {'unknown' if seeds is None else ', '.join(map(span, seeds))}"
        for name, seeds in calibrations.items()
    )
    return image_seeds, state_seeds, "; ".join(lines)


def _as_in(
    pipeline: Any, quantized: Mapping[str, QuantizedDenoiser], folder: str | Path
) -> dict[str, QuantizedDenoiser]:
    """Denoisers of a folder by their names in a pipeline; one that stands alone takes the place of the only one.

    Raises:
        ValueError: where it is not clear which is which.
    """
    names = denoiser_names(pipeline)
    if quantized.keys() <= set(names):
        return dict(quantized)
    if len(quantized) == len(names) == 1:
        return {names[0]: next(iter(quantized.values()))}
    raise ValueError(
        f"{folder} holds {' and '.join(quantized)}, and {type(pipeline).__name__} has {' and '.join(names)}; give the"
        " whole quantized pipeline, or a folder called as the denoiser that it holds"
    )


def _common_dtype(quantized: Mapping[str, Mapping[str, QuantizedDenoiser]]) -> torch.dtype:
    dtypes = {name: next(iter(parts.values())).dtype for name, parts in quantized.items()}
    if len({denoiser.dtype for parts in quantized.values() for denoiser in parts.values()}) > 1:
        raise ValueError(
            f"the denoisers must have the same dtype, got {dtypes}; compare those of each dtype separately"
        )
    return next(iter(dtypes.values()), torch.float32)


def _names(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    """A distinct row name for each folder: its last part where that is enough, else all of it."""
    last = [Path(folder).resolve().name for folder in folders]
    distinct = len({FLOAT_ROW, *last}) == len(last) + 1
    return dict(zip(last if distinct else map(str, folders), folders, strict=True))
