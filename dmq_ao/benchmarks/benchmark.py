"""Integer kernels against float32, and against other tools if wanted, timed in turns on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmq_ao import recipes
from dmq_ao.api.arguments import denoiser_name
from dmq_ao.api.calibrate import calibrate
from dmq_ao.api.compile import Mode
from dmq_ao.api.quantize import convert, prepare
from dmq_ao.api.saving import load
from dmq_ao.benchmarks.measure import compiled_calls, states_of_denoisers
from dmq_ao.benchmarks.named import NAMED, SEED, STEPS, named_denoiser
from dmq_ao.benchmarks.peer_benchmark import Case, Ours, side_by_side
from dmq_ao.benchmarks.peers import COMPILED_FP32, check_installed
from dmq_ao.config import Recipe
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import latency, machine, speedup
from dmq_ao.graph import Signature
from dmq_ao.graph.arguments import nested
from dmq_ao.graph.noise import noise_tensors
from dmq_ao.pipelines.adapter import load_pipeline, record_denoisers
from dmq_ao.pipelines.denoisers import Part, denoiser_folders, is_quantized
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.samples import CalibrationSet

BATCH_SIZE, SAMPLES = 4, 16
STATES_SEED = 1000  # of the trajectories for errors; calibration counts up from SEED and does not come so far

BenchmarkCase = tuple[nn.Module, QuantizedDenoiser, Mapping[str, Any]]  # float, quantized, keyword arguments of a call


@dataclass(frozen=True)
class _Settings:
    """What of the options both kinds of benchmark read."""

    recipe: Recipe
    batch_size: int
    repeats: int
    backend: str
    mode: Mode
    prompt: Prompts
    lora: str | Path | None
    progress: bool
    say: Callable[[str], None]


def run_benchmark(
    model: str,
    bits: str = "w4a8",
    *,
    power_of_two: bool = False,
    batch_size: int | None = None,
    repeats: int = 15,
    backend: str = "auto",
    mode: Mode = "default",
    prompt: Prompts = None,
    lora: str | Path | None = None,
    peers: Sequence[str] = (),
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time a denoiser in float32 and quantized, both compiled; and other tools with them, if asked for.

    Args:
        model: a pipeline folder (float or quantized), a Hub id, ``"demo"`` or a name in ``NAMED``. A quantized folder
            is timed as it is, against its architecture with random weights. Of two denoisers the first is timed.
        bits: as for ``recipes.minmax``; and so is the next.
        power_of_two: see there.
        batch_size: rows of a call; None for that of the named denoiser, and 4 for others.
        repeats: timed calls of each.
        backend: as for ``dmq_ao.convert``.
        mode: as for ``dmq_ao.compile``.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn; or ``Conditions``, of
            pictures, sizes and guidance, with which states are recorded and calls are made.
        lora: weights to fuse into the float pipeline.
        peers: names of ``dmq_ao.benchmarks.peers.PEERS``, timed in the same rounds as ours and compiled float32.
        progress: show progress bars.
        say: told what is going on.

    Returns:
        ``model``, ``recipe``, ``backend``, ``mode``, ``batch_size``, ``kernels``, ``machine`` and ``date``. Without
        peers also ``latency_ms`` (median and percentiles) and ``compile_seconds``, each of ``float`` and
        ``quantized``, and ``speedup``, the ratio of medians. With peers what ``side_by_side`` returns.

    Raises:
        ValueError: for peers of a quantized folder, which has no float weights to give them; for a prompt or LoRA of
            what is called with noise, a quantized folder or a named denoiser.
        MissingPackage: when the packages of no peer are installed; one that lacks its own has a row that says so.
    """
    recipe = recipes.minmax(bits, power_of_two=power_of_two)
    check_installed(peers)
    if peers and _is_quantized_folder(model):
        raise ValueError(f"{model} has no float weights, which the peers start from; give the float model instead")
    if (model in NAMED or _is_quantized_folder(model)) and not (prompt is None and lora is None):
        raise ValueError(
            f"{model} is called with noise, of its own sizes; leave out prompt, pictures, sizes, guidance and LoRA,"
            " which are for float pipelines"
        )
    rows = batch_size or (NAMED[model].batch_size if model in NAMED else BATCH_SIZE)
    settings = _Settings(recipe, rows, repeats, backend, mode, prompt, lora, progress, say)
    if peers:
        name = f"dmq_ao {bits.upper()}{'+PTS' if power_of_two else ''}{', max' if mode == 'max' else ''}"
        quantized, figures = _against_peers(model, settings, name, peers)
    else:
        quantized, figures = _against_float(model, settings)
    return {
        "model": model,
        "recipe": quantized.recipe.to_dict(),
        "backend": quantized.backend,
        "mode": mode,
        "batch_size": rows,
        **figures,
        "kernels": quantized.kernel_counts,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _against_float(model: str, settings: _Settings) -> tuple[QuantizedDenoiser, dict[str, Any]]:
    if _is_quantized_folder(model):
        folder = _first(denoiser_folders(model), settings.say)[1]
        teacher, quantized, inputs = _stored_denoiser(folder, settings.batch_size, settings.backend)
    else:
        teacher, samples, _ = _float_denoiser(model, settings)
        quantized = _convert(model, teacher, samples, settings)
        inputs = first_rows(samples, settings.batch_size)
    settings.say("compile float32 and quantized")
    calls, compile_seconds = compiled_calls({"float": teacher, "quantized": quantized}, inputs, settings.mode)
    latencies = latency(calls, repeats=settings.repeats, progress=settings.progress)
    return quantized, {
        "latency_ms": {name: vars(times) for name, times in latencies.items()},
        "speedup": speedup(latencies, "float")["quantized"],
        "compile_seconds": compile_seconds,
    }


def _against_peers(
    model: str, settings: _Settings, name: str, peers: Sequence[str]
) -> tuple[QuantizedDenoiser, dict[str, Any]]:
    teacher, samples, pipeline = _float_denoiser(model, settings)
    states = samples  # of a named denoiser: noise is noise
    if pipeline is not None:
        states = states_of_denoisers(pipeline, steps=STEPS, seed=STATES_SEED, prompt=settings.prompt)[
            denoiser_name(pipeline)
        ]
    start = time.perf_counter()
    quantized = _convert(model, teacher, samples, settings)
    ours = {name: Ours(quantized, settings.mode, time.perf_counter() - start)}
    case = Case(teacher, first_rows(samples, settings.batch_size), samples, states, settings.batch_size)
    names = list(dict.fromkeys((COMPILED_FP32, *peers)))
    figures = side_by_side(case, names, ours, repeats=settings.repeats, progress=settings.progress, say=settings.say)
    return quantized, figures


def _is_quantized_folder(model: str) -> bool:
    return Path(model).is_dir() and any(map(is_quantized, denoiser_folders(model).values()))


def _first(parts: Mapping[str, Part], say: Callable[[str], None]) -> tuple[str, Part]:
    """The denoiser that is timed; of two, it is said which."""
    name = next(iter(parts))
    if len(parts) > 1:
        say(f"{name} is timed, and not {' and '.join(other for other in parts if other != name)}")
    return name, parts[name]


def _float_denoiser(model: str, settings: _Settings) -> tuple[nn.Module, CalibrationSet, Any]:
    """A denoiser, samples to calibrate it on, and the pipeline that it stands in, if it does."""
    if model in NAMED:
        return *named_denoiser(model), None
    pipeline = load_pipeline(model, lora=settings.lora)
    recorded = record_denoisers(pipeline, num_samples=SAMPLES, steps=STEPS, seed=SEED, prompt=settings.prompt)
    name, samples = _first(recorded, settings.say)
    return getattr(pipeline, name), samples, pipeline


def _convert(model: str, teacher: nn.Module, samples: CalibrationSet, settings: _Settings) -> QuantizedDenoiser:
    settings.say(f"{model}: prepare, calibrate, convert")
    prepared = prepare(
        teacher, settings.recipe, samples.example(), timestep_arg=samples.timestep_arg, backend=settings.backend
    )
    calibrate(prepared, samples, progress=False, batch_size=min(settings.batch_size, 8))
    return convert(prepared, settings.backend)


def first_rows(samples: CalibrationSet, batch_size: int) -> Mapping[str, Any]:
    """A call of exactly ``batch_size`` rows of one timestep, as a sampler makes it."""
    rows = torch.nonzero(samples.step == samples.step[0])[:, 0]
    call_rows = samples.select(rows[torch.arange(batch_size) % len(rows)])
    return next(call_rows.batches(batch_size))


def _stored_denoiser(folder: str | Path, batch_size: int, backend: str) -> BenchmarkCase:
    """A saved denoiser, a float one of its architecture with random weights, and noise for a call."""
    quantized = load(folder, backend=backend)
    architecture = quantized.skeleton
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        teacher = type(architecture).from_config(dict(architecture.config)).to(quantized.dtype).eval()
    return teacher, quantized, noise(quantized.signature, batch_size)


def noise(signature: Signature, batch_size: int) -> Mapping[str, Any]:
    """Keyword arguments of a call of ``batch_size`` rows, noise where they are tensors."""
    return nested(signature.nesting, {**signature.constants, **noise_tensors(signature, batch_size, SEED)})


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch, and the peers, on ``count`` threads, and then on as many as before; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
