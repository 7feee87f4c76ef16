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
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dmq_ao.api.arguments import DENOISER_NAMES, denoiser_names
from dmq_ao.api.compile import compile
from dmq_ao.api.saving import load, save, usable_device
from dmq_ao.config import InvalidFile, MissingStatistics, Selection, SelectMethod, as_json
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation.report import json_ready
from dmq_ao.graph import private
from dmq_ao.pipelines.checkpoints import fuse_lora, pipeline_of_file
from dmq_ao.pipelines.denoisers import is_quantized, the_only
from dmq_ao.pipelines.prompts import Prompts, call_arguments
from dmq_ao.pipelines.seeds import INDEX, calibration_seeds, note_seeds, trajectory_seeds
from dmq_ao.samples import CalibrationSet, record

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
    """Load a pipeline; every denoiser that dmq_ao saved becomes a ``QuantizedDenoiser``.

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
    index = _check_parts(folder / INDEX)
    seeds = calibration_seeds(folder)
    names = [name for name in DENOISER_NAMES if is_quantized(folder / name)]
    if names and lora is not None:
        raise ValueError(f"{folder} is quantized; LoRA weights are fused into the float pipeline, before")
    quantized = {name: load(folder / name, backend=backend, packed=packed, device=device) for name in names}
    dtype = dtype or next((denoiser.dtype for denoiser in quantized.values()), torch.float32)
    # diffusers wants components of its own classes: it is given the weightless originals, and then the real ones.
    components = {name: denoiser.skeleton for name, denoiser in quantized.items()}
    components |= {name: None for name, part in index.items() if part == [None, None]}  # it was saved without
    try:
        # The class itself: of optional parts (Wan's denoisers) the base class takes none that are passed.
        pipeline = _class_in_index(index).from_pretrained(str(folder), dtype=dtype, **components)
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


def _class_in_index(parts: Mapping[str, Any]) -> Any:
    """The class that an index names, one of diffusers' pipelines, or else their base, which says what is wrong."""
    import diffusers

    named = getattr(diffusers, str(parts.get("_class_name")), None)
    base = diffusers.DiffusionPipeline
    return named if isinstance(named, type) and issubclass(named, base) else base


def _check_parts(index: Path) -> dict[str, Any]:
    """Refuse parts of other libraries: some versions of diffusers import whatever the index of a pipeline names.

    Returns:
        What the index holds, by name.

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
    return parts


def _placed(pipeline: Any, device: torch.device, lora: str | Path | None) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        fuse_lora(pipeline, lora)
    return pipeline.to(device)


def compile_denoiser(pipeline: Any) -> None:
    """Compile a pipeline's denoisers in place: ``torch.compile``, or ``dmq_ao.compile`` where they are quantized."""
    for name in denoiser_names(pipeline):
        denoiser = getattr(pipeline, name)
        quantized = isinstance(denoiser, QuantizedDenoiser)
        setattr(pipeline, name, compile(denoiser) if quantized else torch.compile(denoiser))


def save_pipeline(pipeline: Any, folder: str | Path, report: Mapping[str, Any] | None = None) -> None:
    """Write a pipeline whose denoiser is quantized, or whose denoisers are; nothing is left behind when it fails.

    Args:
        pipeline: with a quantized denoiser; of two, the other may be float.
        folder: where to.
        report: kept beside the pipeline as ``report.json``.

    Raises:
        ValueError: when ``folder`` exists and is not empty.
        TypeError: when no denoiser is quantized.
    """
    folder = Path(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    denoisers = {name: getattr(pipeline, name) for name in denoiser_names(pipeline)}
    quantized = {
        name: part for name, part in denoisers.items() if isinstance(private.uncompiled(part), QuantizedDenoiser)
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-partial-") as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        for name, denoiser in (quantized or denoisers).items():
            save(denoiser, partial / name)
        for name, component in pipeline.components.items():
            if name not in quantized and hasattr(component, "save_pretrained"):
                component.save_pretrained(partial / name)
        index = {key: value for key, value in pipeline.config.items() if key != "_name_or_path"}
        index |= {name: ["diffusers", type(part.skeleton).__name__] for name, part in quantized.items()}
        index["_class_name"] = type(pipeline).__name__
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
    """Record calibration samples of a pipeline's one denoiser; arguments as for ``record_denoisers``.

    Raises:
        TypeError: when the denoiser is already quantized.
        ValueError: as ``record_denoisers``; for a pipeline of two denoisers.
    """
    the_only(dict.fromkeys(denoiser_names(pipeline)), type(pipeline).__name__)
    [samples] = record_denoisers(
        pipeline,
        num_samples=num_samples,
        steps=steps,
        seed=seed,
        prompt=prompt,
        batch_size=batch_size,
        trajectories=trajectories,
        select=select,
        progress=progress,
    ).values()
    return samples


def record_denoisers(
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
) -> dict[str, CalibrationSet]:
    """Record calibration samples of each of a pipeline's denoisers from its own sampling loop, all in one run.

    Args:
        pipeline: with float denoisers.
        num_samples: rows to keep of each.
        steps: of the sampler.
        seed: first seed of the trajectories; one a trajectory.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn.
        batch_size: trajectories at a time.
        trajectories: how many to run; as for ``seeds.trajectory_seeds``. Twice as many by default where there are two
            denoisers, each of which has a part of the steps.
        select: how the rows are spread over the timesteps, as for ``dmq_ao.record``.
        progress: show a progress bar.

    Returns:
        Samples by the denoiser's name in the pipeline.

    Raises:
        TypeError: when a denoiser is already quantized.
        ValueError: when the pipeline wants a prompt and there is none, and the like, as ``prompts.call_arguments``.
        MissingStatistics: when the pipeline did not call one of them.
    """
    denoisers = {name: getattr(pipeline, name) for name in denoiser_names(pipeline)}
    if any(isinstance(denoiser, QuantizedDenoiser) for denoiser in denoisers.values()):
        raise TypeError("the denoiser is already quantized; record from the float pipeline it came from")
    call_arguments(pipeline, [seed], prompt)  # before anything is wrapped
    seeds = trajectory_seeds(
        num_samples, steps=steps, seed=seed, trajectories=trajectories, select=select, denoisers=len(denoisers)
    )
    with ExitStack() as stack:
        recorders = {
            name: stack.enter_context(record(denoiser, num_samples=num_samples, seed=seed, select=select))
            for name, denoiser in denoisers.items()
        }
        bar = stack.enter_context(tqdm(total=len(seeds), disable=not progress, unit="trajectory", desc="record"))
        for start in range(0, len(seeds), batch_size):
            chunk = seeds[start : start + batch_size]
            # A trajectory is left early where one denoiser has given enough; another might still be wanted.
            part = len(chunk) / (len(seeds) - start) if len(recorders) == 1 else None
            with ExitStack() as trajectories_of_all:
                for recorder in recorders.values():
                    trajectories_of_all.enter_context(recorder.trajectory(part=part))
                _run(pipeline, chunk, steps, prompt, "latent")  # nothing is decoded where the pipeline can leave it
            bar.update(len(chunk))
    for name, recorder in recorders.items():
        if len(recorders) > 1 and not recorder.num_calls:
            raise MissingStatistics(
                f"{type(pipeline).__name__} did not call its {name} in {steps} steps; take more steps, or set the"
                f" pipeline's {name} to None where it does without"
            )
    return {name: recorder.calibration_set() for name, recorder in recorders.items()}
