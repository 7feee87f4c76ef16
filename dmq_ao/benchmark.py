"""Integer kernels against float32, both compiled, timed in turns on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmq_ao import recipes
from dmq_ao.calibrate import calibrate
from dmq_ao.calibration import CalibrationSet
from dmq_ao.compile import Mode
from dmq_ao.config import Recipe
from dmq_ao.diffusers_adapter import denoiser_folder, is_quantized, load_denoiser, load_pipeline, record_pipeline
from dmq_ao.evaluation import latency, machine, speedup
from dmq_ao.graph import Signature, unflatten_inputs
from dmq_ao.measure import compiled_calls
from dmq_ao.module import QuantizedDenoiser
from dmq_ao.quantize import convert, denoiser_name, prepare

SAMPLES, STEPS, SEED = 16, 4, 0

Timed = tuple[nn.Module, QuantizedDenoiser, Mapping[str, Any]]  # float, quantized, keyword arguments of a call


def cifar_unet() -> nn.Module:
    """The UNet of DDPM on CIFAR-10 (36M parameters, 32x32), with random weights: speed does not depend on them."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built: nn.Module = diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            attention_head_dim=64,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    return built.eval()


NAMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"cifar-unet": (cifar_unet, (3, 32, 32))}


def named_denoiser(name: str) -> tuple[nn.Module, CalibrationSet]:
    """A denoiser that needs no files, with noise to calibrate on.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMED:
        raise ValueError(f"no denoiser is called {name!r}; there are {sorted(NAMED)}")
    build, shape = NAMED[name]
    generator = torch.Generator().manual_seed(SEED)
    step = torch.arange(STEPS).repeat_interleave(SAMPLES // STEPS)
    timestep = torch.linspace(999, 0, STEPS).long()[step]
    return build(), CalibrationSet({"sample": torch.randn(SAMPLES, *shape, generator=generator)}, {}, timestep, step)


def run_benchmark(
    model: str,
    bits: str = "w4a8",
    *,
    power_of_two: bool = False,
    batch_size: int = 4,
    repeats: int = 15,
    threads: int | None = None,
    backend: str = "auto",
    mode: Mode = "default",
    prompt: str | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time a denoiser in float32 and quantized, both compiled.

    Args:
        model: a pipeline folder (float or quantized), a Hub id, ``"demo"`` or a name in ``NAMED``. A quantized folder
            is timed as it is, against its architecture with random weights.
        bits: as for ``recipes.minmax``; and so is the next.
        power_of_two: see there.
        batch_size: rows of a call.
        repeats: timed calls of each.
        threads: of torch, while this runs; None leaves them as they are.
        backend: as for ``dmq_ao.convert``.
        mode: as for ``dmq_ao.compile``.
        prompt: for pipelines that want one.
        progress: show progress bars.
        say: told what is going on.

    Returns:
        Medians and percentiles in ms, the ratio of medians, seconds of compilation, kernels and the machine.
    """
    recipe = recipes.minmax(bits, power_of_two=power_of_two)
    with _threads(threads):
        if _is_quantized_folder(model):
            teacher, quantized, inputs = _stored(model, batch_size, backend)
        else:
            teacher, samples = _float(model, prompt)
            say(f"{model}: prepare, calibrate, convert")
            quantized = _convert(teacher, samples, recipe, backend)
            inputs = first_rows(samples, batch_size)
        say("compile float32 and quantized")
        calls, compile_seconds = compiled_calls({"float": teacher, "quantized": quantized}, inputs, mode)
        times = latency(calls, repeats=repeats, progress=progress)
        return {
            "model": model,
            "recipe": quantized.recipe.to_dict(),
            "backend": quantized.backend,
            "mode": mode,
            "batch_size": batch_size,
            "latency_ms": {name: vars(timed) for name, timed in times.items()},
            "speedup": speedup(times, "float")["quantized"],
            "compile_seconds": compile_seconds,
            "kernels": quantized.kernel_counts,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
        }


def _is_quantized_folder(model: str) -> bool:
    return Path(model).is_dir() and is_quantized(denoiser_folder(model))


def _float(model: str, prompt: str | None) -> tuple[nn.Module, CalibrationSet]:
    if model in NAMED:
        return named_denoiser(model)
    pipeline = load_pipeline(model)
    samples = record_pipeline(pipeline, num_samples=SAMPLES, steps=STEPS, seed=SEED, prompt=prompt)
    denoiser: nn.Module = getattr(pipeline, denoiser_name(pipeline))
    return denoiser, samples


def _convert(teacher: nn.Module, samples: CalibrationSet, recipe: Recipe, backend: str) -> QuantizedDenoiser:
    prepared = prepare(teacher, recipe, samples.example(), timestep_arg=samples.timestep_arg, backend=backend)
    calibrate(prepared, samples, progress=False)
    return convert(prepared, backend)


def first_rows(samples: CalibrationSet, batch_size: int) -> Mapping[str, Any]:
    """A call of exactly ``batch_size`` rows of one timestep, as a sampler makes it."""
    rows = torch.nonzero(samples.step == samples.step[0])[:, 0]
    chosen = samples.select(rows[torch.arange(batch_size) % len(rows)])
    return next(chosen.batches(batch_size))


def _stored(folder: str, batch_size: int, backend: str) -> Timed:
    """A saved denoiser, a float one of its architecture with random weights, and noise for a call."""
    quantized = load_denoiser(folder, backend=backend)
    architecture = quantized.skeleton
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        teacher = type(architecture).from_config(dict(architecture.config)).to(quantized.dtype).eval()
    return teacher, quantized, noise(quantized.signature, batch_size)


def noise(signature: Signature, batch_size: int) -> Mapping[str, Any]:
    """Normal noise in the shapes of the example inputs; ones for whole numbers (labels, masks) and the timestep."""
    generator = torch.Generator().manual_seed(SEED)
    rows = signature.example[signature.batch][0][0]
    inputs: dict[str, Any] = dict(signature.constants)
    for name, (shape, dtype) in signature.example.items():
        if shape and shape[0] == rows:
            shape = (batch_size, *shape[1:])
        value = torch.ones(shape)
        if dtype.is_floating_point and name != signature.timestep:
            value = torch.randn(shape, generator=generator)
        inputs[name] = value.to(dtype)
    return unflatten_inputs(inputs)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch on ``count`` threads, and then on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
