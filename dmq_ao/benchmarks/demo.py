"""The demonstration: the bundled denoiser rounded to nearest and by the default recipe, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dmq_ao import recipes
from dmq_ao.api.calibrate import calibrate
from dmq_ao.api.compile import Mode
from dmq_ao.api.quantize import convert, prepare
from dmq_ao.api.saving import save
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.benchmarks.measure import (
    GRID_IMAGES,
    STATES_PER_TIMESTEP,
    compiled_latency,
    held_out_states,
    images_of,
    variant_report,
)
from dmq_ao.evaluation import folder_bytes, machine, write_report
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.evaluation.table import FLOAT_ROW
from dmq_ao.pipelines.adapter import DEMO, load_pipeline, record_pipeline
from dmq_ao.pipelines.seeds import fresh_seeds, span

DEMO_STEPS = 20
CALIBRATION_SEED, HELD_OUT_SEED, IMAGE_SEED = 1000, 2000, 0
VARIANTS = (("w8a8", "minmax"), ("w4a8", "minmax"), ("w4a8", "default"), ("w4a6", "default"))
TRAJECTORIES = 80
LATENCY_BATCH = 8


def run_demo(
    folder: str | Path,
    *,
    backend: str = "auto",
    mode: Mode | None = None,
    images: int = 16,
    num_samples: int = 160,
    with_latency: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Quantize the demo pipeline in every variant, measure, and write ``report.json``, ``report.html`` and pictures.

    Args:
        folder: where the report goes.
        backend: as for ``dmq_ao.convert``.
        mode: as for ``dmq_ao.compile``; None takes ``"max"`` where the backend has such a plan.
        images: same-seed images to compare.
        num_samples: calibration samples.
        with_latency: compile float and integer denoisers and time them, which is most of the run.
        say: told what is going on.

    Returns:
        The report that ``dmq_ao.evaluation`` renders.
    """
    pipeline = load_pipeline(DEMO)
    teacher = pipeline.unet
    say(f"recording {num_samples} calibration samples from {DEMO_STEPS}-step trajectories")
    samples = record_pipeline(
        pipeline, num_samples=num_samples, steps=DEMO_STEPS, seed=CALIBRATION_SEED, trajectories=TRAJECTORIES
    )
    states = held_out_states(pipeline, steps=DEMO_STEPS, seed=HELD_OUT_SEED)
    calibration_seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + TRAJECTORIES)
    state_seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + STATES_PER_TIMESTEP)
    seeds = fresh_seeds(images, (calibration_seeds, state_seeds), IMAGE_SEED)
    image_rows = {FLOAT_ROW: images_of(pipeline, teacher, seeds, steps=DEMO_STEPS)}
    denoisers: dict[str, nn.Module] = {FLOAT_ROW: teacher}
    variants = []
    for bits, recipe in VARIANTS:
        name = f"{bits.upper()} {recipe}"
        say(f"{name}: calibrate, quantize, sample")
        prepared = prepare(teacher, recipes.ALL_RECIPES[recipe](bits), samples.example(), backend=backend)
        calibration = calibrate(prepared, samples, progress=False)
        denoisers[name] = quantized = convert(prepared, backend)
        image_rows[name] = images_of(pipeline, quantized, seeds, steps=DEMO_STEPS)
        with tempfile.TemporaryDirectory() as temporary:
            save(quantized, temporary)
            size = float_bytes(teacher)
            parts = {"unet": quantized}, {"unet": teacher}, {"unet": states}
            pair = image_rows[name], image_rows[FLOAT_ROW]
            row = variant_report(name, *parts, *pair, folder_bytes(temporary), size)
            variants.append({**row, "calibration_seconds": calibration.seconds})
    float_ms = None
    if with_latency:
        mode = mode or ("default" if ALL_BACKENDS[quantized.backend].max_plan is None else "max")
        say(f"compile {len(denoisers)} denoisers (mode {mode}) and time them in turns")
        times = compiled_latency(denoisers, samples.example(LATENCY_BATCH), mode=mode)
        float_ms = times[FLOAT_ROW].median_ms
        for row in variants:
            row["latency_ms"] = times[row["name"]].median_ms
            row["speedup"] = float_ms / row["latency_ms"]
    report = {
        "title": "dmq_ao demo",
        "model": "bundled DDIM denoiser, Fashion-MNIST 28x28",
        "machine": machine(),
        "protocol": {
            "scheduler": f"{type(pipeline.scheduler).__name__}, {DEMO_STEPS} steps",
            "calibration": f"{len(samples)} samples of {TRAJECTORIES} trajectories, seeds from {CALIBRATION_SEED}",
            "one-step error": f"{len(states)} states of float trajectories, seeds from {HELD_OUT_SEED}",
            "images": f"{images}, seeds {span(seeds)}",
            "latency": f"batch {LATENCY_BATCH}, compiled, float32 and integers in turns; integers in mode {mode},"
            " errors and images without it",
            "backend": backend,
        },
        "float": {"file_bytes": float_bytes(teacher), "latency_ms": float_ms},
        "variants": variants,
    }
    write_report(report, {name: pictures[:GRID_IMAGES] for name, pictures in image_rows.items()}, folder)
    return report
