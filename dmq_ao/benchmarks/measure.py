"""Float and quantized side by side: same seeds, same states, same machine.

One-step error is measured on states of float trajectories whose seeds calibration did not see; images are drawn from
the same seeds; latency is taken interleaved, compiled against compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.api.arguments import denoiser_name
from dmq_ao.api.compile import Mode, compile
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import Latency, OneStep, image_fidelity, latency, one_step_error
from dmq_ao.graph.arguments import moved_inputs
from dmq_ao.pipelines.adapter import record_denoisers, sample
from dmq_ao.pipelines.denoisers import the_only
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.pipelines.report import describe_denoiser, in_one
from dmq_ao.samples import CalibrationSet

STATES_PER_TIMESTEP = 8
GRID_IMAGES = 8  # of a row of pictures


def held_out_states(
    pipeline: Any, *, steps: int, seed: int, prompt: Prompts = None, timesteps: int = 20
) -> CalibrationSet:
    """``states_of_denoisers`` for a pipeline of one denoiser.

    Raises:
        ValueError: for a pipeline of several.
    """
    states = states_of_denoisers(pipeline, steps=steps, seed=seed, prompt=prompt, timesteps=timesteps)
    return the_only(states, type(pipeline).__name__)


def states_of_denoisers(
    pipeline: Any, *, steps: int, seed: int, prompt: Prompts = None, timesteps: int = 20
) -> dict[str, CalibrationSet]:
    """States of float trajectories with seeds of their own, for one-step errors: up to ``timesteps`` spread steps.

    Returns:
        Those of each denoiser, by its name in the pipeline.
    """
    recorded = record_denoisers(
        pipeline,
        num_samples=steps * STATES_PER_TIMESTEP,
        steps=steps,
        seed=seed,
        prompt=prompt,
        trajectories=STATES_PER_TIMESTEP,
    )
    return {name: _spread(states, timesteps) for name, states in recorded.items()}


def _spread(states: CalibrationSet, timesteps: int) -> CalibrationSet:
    """All rows of up to ``timesteps`` steps, from the first to the last."""
    count = min(timesteps, len(states.timesteps))
    steps = torch.linspace(0, len(states.timesteps) - 1, count).round().long().unique()
    return states.select(torch.nonzero(torch.isin(states.step, steps))[:, 0])


def by_timestep(states: CalibrationSet) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each timestep with the keyword arguments of a call on its states."""
    for step in states.step.unique():
        rows = states.select(torch.nonzero(states.step == step)[:, 0])
        yield float(rows.timestep[0]), next(iter(rows.batches(len(rows))))


def images_of(
    pipeline: Any,
    denoisers: nn.Module | Mapping[str, nn.Module],
    seeds: Sequence[int],
    *,
    steps: int,
    prompt: Prompts = None,
) -> Tensor:
    """Images [N, C, H, W] in 0..1 with other denoisers in the pipeline, one a seed, of videos one a frame.

    Args:
        pipeline: as it was afterwards.
        denoisers: by name in the pipeline, or one, which takes the place of the first.
        seeds: one an image.
        steps: of the sampler.
        prompt: as for ``sample``.
    """
    parts = {denoiser_name(pipeline): denoisers} if isinstance(denoisers, nn.Module) else denoisers
    before = {name: getattr(pipeline, name) for name in parts}
    try:
        for name, denoiser in parts.items():
            setattr(pipeline, name, denoiser)
        images = sample(pipeline, seeds, steps=steps, prompt=prompt)
        return images.flatten(0, -4)
    finally:
        for name, denoiser in before.items():
            setattr(pipeline, name, denoiser)


def variant_report(
    name: str,
    quantized: Mapping[str, QuantizedDenoiser],
    teachers: Mapping[str, nn.Module],
    states: Mapping[str, CalibrationSet],
    images: Tensor,
    expected: Tensor,
    file_bytes: int | None = None,
    float_bytes: int | None = None,
) -> dict[str, Any]:
    """What the quantized denoisers of a pipeline cost and keep, as a row of ``dmq_ao.evaluation``'s report.

    Args:
        name: of the row.
        quantized: the denoisers, by name in the pipeline, as the next two.
        teachers: the float ones that they were made from.
        states: inputs for one-step errors.
        images: [N, C, H, W] in 0..1, drawn with ``quantized``.
        expected: [N, C, H, W], drawn with ``teachers`` from the same seeds.
        file_bytes: where ``quantized`` is stored; None where it is not.
        float_bytes: what ``teachers`` take; None where that is not compared.

    Raises:
        ValueError: for images of different shapes, or outputs that are not finite.
    """
    errors = [step_errors(teachers[part], denoiser, states[part]) for part, denoiser in quantized.items()]
    steps = OneStep([t for one in errors for t in one.timesteps], [e for one in errors for e in one.errors])
    report = in_one({part: describe_denoiser(denoiser) for part, denoiser in quantized.items()}, quantized)
    return {
        "name": name,
        "file_bytes": file_bytes,
        "size_ratio": None if file_bytes is None or float_bytes is None else float_bytes / file_bytes,
        "mean_bits": report["mean_bits"],
        "one_step_error": steps.mean,
        "errors_by_timestep": steps.to_dict(),
        **image_fidelity(images, expected, data_range=1.0),
        "latency_ms": None,
        "speedup": None,
        "kernels": report["kernels"],
        "layers": report["layers"],
        "kept_float": [
            {"name": row["name"], "why": row["why"]} for row in report["layers"] if row["status"] == "float"
        ],
    }


def step_errors(teacher: nn.Module, quantized: QuantizedDenoiser, states: CalibrationSet) -> OneStep:
    """One-step errors of a quantized denoiser at each timestep of its states.

    Raises:
        ValueError: for answers that are not finite.
    """
    batches = ((timestep, moved_inputs(inputs, quantized.device)) for timestep, inputs in by_timestep(states))
    return one_step_error(teacher, quantized, batches)


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
