"""Float and quantized side by side: same seeds, same states, same machine.

One-step error is measured on states of float trajectories whose seeds calibration did not see; images are drawn from
the same seeds; latency is taken interleaved, compiled against compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.api.compile import Mode, compile
from dmq_ao.api.quantize import denoiser_name
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import Latency, folder_bytes, image_fidelity, latency, one_step_error
from dmq_ao.graph.arguments import moved_inputs
from dmq_ao.pipelines.adapter import record_pipeline, sample
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.samples import CalibrationSet

STATES_PER_TIMESTEP = 8
GRID_IMAGES = 8  # of a row of pictures


def held_out_states(
    pipeline: Any, *, steps: int, seed: int, prompt: Prompts = None, timesteps: int = 20
) -> CalibrationSet:
    """States of float trajectories with seeds of their own, for one-step errors: up to ``timesteps`` spread steps."""
    states = record_pipeline(
        pipeline,
        num_samples=steps * STATES_PER_TIMESTEP,
        steps=steps,
        seed=seed,
        prompt=prompt,
        trajectories=STATES_PER_TIMESTEP,
    )
    count = min(timesteps, len(states.timesteps))
    spread = torch.linspace(0, len(states.timesteps) - 1, count).round().long().unique()
    return states.select(torch.nonzero(torch.isin(states.step, spread))[:, 0])


def by_timestep(states: CalibrationSet) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each timestep with the keyword arguments of a call on its states."""
    for step in states.step.unique():
        rows = states.select(torch.nonzero(states.step == step)[:, 0])
        yield float(rows.timestep[0]), next(iter(rows.batches(len(rows))))


def images_of(
    pipeline: Any, denoiser: nn.Module, seeds: Sequence[int], *, steps: int, prompt: Prompts = None
) -> Tensor:
    """Images [N, C, H, W] in 0..1 with ``denoiser`` in the pipeline's place, one a seed, of videos one a frame."""
    name = denoiser_name(pipeline)
    before = getattr(pipeline, name)
    setattr(pipeline, name, denoiser)
    try:
        images = sample(pipeline, seeds, steps=steps, prompt=prompt)
        return images.flatten(0, -4)
    finally:
        setattr(pipeline, name, before)


def variant_report(
    name: str,
    quantized: QuantizedDenoiser,
    teacher: nn.Module,
    states: CalibrationSet,
    images: Tensor,
    expected: Tensor,
    folder: str | Path | None = None,
    float_bytes: int | None = None,
) -> dict[str, Any]:
    """What one quantized denoiser costs and keeps, as a row of ``dmq_ao.evaluation``'s report.

    Args:
        name: of the row.
        quantized: the denoiser.
        teacher: the float one that it was made from.
        states: inputs for one-step errors.
        images: [N, C, H, W] in 0..1, drawn with ``quantized``.
        expected: [N, C, H, W], drawn with ``teacher`` from the same seeds.
        folder: where ``quantized`` is stored; None where it is not.
        float_bytes: what ``teacher`` takes; None where that is not compared.

    Raises:
        ValueError: for images of different shapes, or outputs that are not finite.
    """
    batches = ((timestep, moved_inputs(inputs, quantized.device)) for timestep, inputs in by_timestep(states))
    errors = one_step_error(teacher, quantized, batches)
    rows = quantized.layer_reports()
    size = None if folder is None else folder_bytes(folder)
    return {
        "name": name,
        "file_bytes": size,
        "size_ratio": None if size is None or float_bytes is None else float_bytes / size,
        "mean_bits": quantized.mean_bits,
        "one_step_error": errors.mean,
        "errors_by_timestep": errors.to_dict(),
        **image_fidelity(images, expected, data_range=1.0),
        "latency_ms": None,
        "speedup": None,
        "kernels": quantized.kernel_counts,
        "layers": rows,
        "kept_float": [{"name": row["name"], "why": row["why"]} for row in rows if row["status"] == "float"],
    }


def compiled_calls(
    denoisers: Mapping[str, nn.Module], inputs: Mapping[str, Any], mode: Mode = "default"
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Compile denoisers for ``inputs``: calls without arguments by name, and the seconds that the first each took.

    Quantized ones by ``dmq_ao.compile`` in ``mode``, float ones by ``torch.compile``.
    """
    torch.compiler.reset()
    calls: dict[str, Callable[[], object]] = {}
    seconds = {}
    for name, denoiser in denoisers.items():
        integer = isinstance(denoiser, QuantizedDenoiser)
        compiled = compile(denoiser, mode) if integer else torch.compile(denoiser)  # type: ignore[arg-type]
        calls[name] = partial(torch.no_grad()(compiled), **inputs)
        start = time.perf_counter()
        calls[name]()
        seconds[name] = time.perf_counter() - start
    return calls, seconds


def compiled_latency(
    denoisers: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    *,
    mode: Mode = "default",
    repeats: int = 15,
    progress: bool = False,
) -> dict[str, Latency]:
    """Median times of compiled denoisers, float and quantized (in ``mode``), called in turns on the same inputs."""
    calls, _ = compiled_calls(denoisers, inputs, mode)
    return latency(calls, repeats=repeats, progress=progress)
