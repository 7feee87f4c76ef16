"""Decide every range, exponent, scale and code of a prepared denoiser, by what its recipe asks for.

A recipe that learns goes layer by layer, each seeing the layers before it quantized; one that does not watches the
float network. Both save progress in ``state_dir`` and resume to the same bytes. ``stages`` lists what is done.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.algorithms.layer_noise import layer_noise
from dmq_ao.api import arguments
from dmq_ao.api.report import CalibrationReport as CalibrationReport
from dmq_ao.api.stages import Run, run_stages
from dmq_ao.config import Recipe
from dmq_ao.evaluation import peak_rss_bytes
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.quantizer.prepared import float_weight, observers, require_prepared, reset, state_of
from dmq_ao.samples import CalibrationSet
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization.checkpoint import Checkpoint

MEASURED_ROWS = 8
MAX_MEMORY = 3 << 29


def calibrate(
    prepared: GraphModule,
    samples: CalibrationSet,
    *,
    state_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 8,
    max_memory: int | None = None,
    bits: BitPlan | None = None,
) -> CalibrationReport:
    """Decide every range, exponent and code of a prepared denoiser. Every call starts clean.

    Args:
        prepared: from ``dmq_ao.prepare``.
        samples: from ``dmq_ao.record``. Where they hold several sizes, ranges and votes are taken from all of them;
            sensitivity, bits and noise are measured on those of most rows.
        state_dir: folder to save progress in, so that an interrupted call resumes.
        seed: of all that is drawn: batches and positions to learn from, samples held out and measured.
        progress: show a progress bar.
        batch_size: rows per forward pass; bounds the memory.
        max_memory: bytes of intermediate values a learning recipe may hold, 1.5 GiB by default; the rest goes to
            disk. One layer's own work comes on top.
        bits: a width for each output channel, from ``dmq_ao.search_bits`` or by hand; where it is None and the
            recipe allocates bits, they are searched first.

    Raises:
        TypeError: when ``prepared`` is not prepared, ``samples`` are no calibration set, or ``bits`` no plan.
        ValueError: for non-finite activations, naming the layer; for samples that lack an argument, are of other
            sizes, or lack windows that the recipe's distillation relates; for a ``state_dir`` of another run; for
            samples of several sizes and a recipe that learns.
        InvalidFile: for a damaged file in ``state_dir``.
    """
    state = require_prepared(prepared, "calibrate")
    arguments.check_samples(samples, "calibrate")
    if bits is not None and not isinstance(bits, BitPlan):
        raise TypeError(f"bits must be a BitPlan, got {type(bits).__name__}; dmq_ao.search_bits makes one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    graph_samples, *others = [GraphSamples.of(prepared, bucket) for bucket in samples.buckets]
    for one in (graph_samples, *others):
        one.check_batches(batch_size)
    _check_one_size(state.recipe, samples)
    started = time.monotonic()
    folder = None if state_dir is None else Path(state_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    reset(prepared)
    recipe, state.incomplete = state.recipe, True
    seed_of_run = seed if recipe.learns else 0
    run = Run(
        prepared,
        samples,
        graph_samples,
        recipe,
        Checkpoint(folder, _digest(prepared, samples, batch_size, seed_of_run, bits)),
        seed_of_run,
        batch_size,
        MAX_MEMORY if max_memory is None else max_memory,
        bits,
        tuple(others),
    )
    report = run_stages(
        run, CalibrationReport(len(graph_samples) + sum(map(len, others)), 0.0, resumed=False), progress
    )
    _decide(prepared)
    sqnr_db = _measure(prepared, graph_samples, seed)
    state.sqnr_db, state.incomplete = sqnr_db, False
    seconds = time.monotonic() - started
    return replace(report, seconds=seconds, sqnr_db=sqnr_db, peak_bytes=peak_rss_bytes())


def _check_one_size(recipe: Recipe, samples: CalibrationSet) -> None:
    """Refuse samples of several sizes where a recipe learns: it fits all rows of an input at once."""
    if recipe.learns and samples.others:
        sizes = "; ".join(f"{len(one)} rows of {_sizes_of_rows(one)}" for one in samples.buckets)
        stages = ", ".join(name for name in recipe.stages if recipe.asks_for(name))
        raise ValueError(
            f"recipe {recipe.name!r} learns ({stages}) from samples of one size, and these are of"
            f" {len(samples.buckets)}: {sizes}. Calibrate on the largest bucket, calibrate(prepared,"
            " samples.buckets[0]), which fits the other sizes less well; record one size; or take a recipe that does"
            " not learn, such as recipes.minmax, for which all buckets are watched"
        )


def _sizes_of_rows(samples: CalibrationSet) -> str:
    return ", ".join(f"{name} {list(value.shape[1:])}" for name, value in samples.inputs.items() if value.dim() > 1)


def _decide(prepared: GraphModule) -> None:
    """Freeze every record."""
    nodes = graph.layer_nodes(prepared)
    for name, (weight, activation) in observers(prepared).items():
        weight.restore(weight.record(float_weight(prepared, nodes[name])), weight.bias)
        if activation is not None:
            activation.decide()


def _measure(prepared: GraphModule, samples: GraphSamples, seed: int) -> dict[str, float]:
    """Output noise of each layer, dB, on a few samples."""
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:MEASURED_ROWS]
    return layer_noise(prepared, samples.batch(rows).arguments)


def _digest(prepared: GraphModule, samples: CalibrationSet, batch_size: int, seed: int, bits: BitPlan | None) -> str:
    """Of everything that the result depends on."""
    state = state_of(prepared)
    learning = [*map(str, state.recipe.stages.values()), None if bits is None else bits.to_dict()]
    text = json.dumps([samples.digest(), batch_size, [str(item) for item in state.plan.values()], learning, seed])
    digest = hashlib.sha256(text.encode())
    for _, parameter in sorted(prepared.named_parameters()):
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
