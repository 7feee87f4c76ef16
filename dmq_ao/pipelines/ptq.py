"""Post-training quantization of a pipeline from end to end, and a forecast of it that calibrates nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.api.arguments import denoiser_names
from dmq_ao.api.calibrate import calibrate
from dmq_ao.api.quantize import convert, prepare
from dmq_ao.config import MissingStatistics, Recipe
from dmq_ao.evaluation import folder_bytes
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.numerics import packed_bytes
from dmq_ao.pipelines.adapter import check_free, record_denoisers, save_pipeline
from dmq_ao.pipelines.conditions import Conditions
from dmq_ao.pipelines.denoisers import denoiser_folders, load_denoisers
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.pipelines.report import describe_denoiser, in_one, status_counts
from dmq_ao.pipelines.seeds import note_seeds, trajectory_seeds
from dmq_ao.quantizer.prepared import float_weight, state_of, weight_observers
from dmq_ao.records import LayerPlan, overhead_bits
from dmq_ao.samples import CalibrationSet

BIT_PLAN = "bit_plan.json"
EXAMPLE_STEPS = 2  # fewer are too few for some samplers


def prepare_pipeline(
    pipeline: Any,
    recipe: Recipe,
    *,
    prompt: Prompts = None,
    seed: int = 0,
    backend: str = "auto",
    steps: int = 20,
    denoisers: Collection[str] = (),
) -> dict[str, GraphModule]:
    """``dmq_ao.prepare`` for a pipeline's denoisers: example inputs come from two steps of its own sampler.

    What is wrong with a recipe shows here, before anything long begins.

    Args:
        pipeline: with float denoisers.
        recipe: of all of them.
        prompt: as for ``record_denoisers``, and so is the next.
        seed: see there.
        backend: as for ``dmq_ao.prepare``.
        steps: of the sampler, for pipelines that do not call each of their denoisers in two.
        denoisers: names of those to quantize; all when empty.

    Returns:
        Graphs by the denoiser's name in the pipeline.

    Raises:
        TypeError: when the denoiser is missing, or quantized already.
        ValueError: as ``prepare``; for a name that is no denoiser's.
        UnsupportedByBackend: as ``prepare``.
        MissingStatistics: when the pipeline does not call one of them.
    """
    check_denoisers(pipeline, denoisers)
    samples = _examples(pipeline, EXAMPLE_STEPS, steps, {"seed": seed, "prompt": prompt})
    return {
        name: prepare(
            getattr(pipeline, name),
            recipe,
            samples[name].example(),
            timestep_arg=samples[name].timestep_arg,
            backend=backend,
        )
        for name in denoisers or samples
    }


def check_denoisers(pipeline: Any, denoisers: Collection[str]) -> None:
    """Refuse names that are no denoisers of a pipeline.

    Raises:
        ValueError: naming those that are.
    """
    names = denoiser_names(pipeline)
    unknown = sorted(set(denoisers) - set(names))
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} has no denoiser {unknown[0]!r}; its denoisers are {list(names)}")


def _examples(pipeline: Any, few: int, steps: int, how: Mapping[str, Any]) -> dict[str, CalibrationSet]:
    """Samples for ``prepare``, of few steps if each denoiser is called in these."""
    try:
        return record_denoisers(pipeline, num_samples=2, steps=few, batch_size=2, trajectories=2, **how)
    except MissingStatistics:
        if few >= steps:
            raise
    return _examples(pipeline, steps, steps, how)


@dataclass(frozen=True)
class Recording:
    """How calibration samples are recorded from a pipeline's own sampler.

    Attributes:
        steps: of the sampler.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn.
        seed: first seed of the trajectories, and that of calibration.
        trajectories: as for ``record_denoisers``.
    """

    steps: int = 20
    prompt: Prompts = None
    seed: int = 0
    trajectories: int | None = None

    def seeds(self, recipe: Recipe, denoisers: int = 1) -> range:
        """Of the trajectories that a recipe's samples come from; of a pipeline with so many denoisers."""
        return trajectory_seeds(
            recipe.num_samples,
            steps=self.steps,
            seed=self.seed,
            trajectories=self.trajectories,
            select=recipe.select,
            denoisers=denoisers,
        )

    def describe(self, recipe: Recipe, denoisers: int = 1) -> dict[str, Any]:
        """In plain values, for a report."""
        return {
            "steps": self.steps,
            "prompt": self.prompt.describe() if isinstance(self.prompt, Conditions) else self.prompt,
            "seed": self.seed,
            "trajectories": len(self.seeds(recipe, denoisers)),
            "select": recipe.select.method.value,
        }


def quantize_pipeline(
    pipeline: Any,
    prepared: Mapping[str, GraphModule],
    recipe: Recipe,
    folder: str | Path,
    *,
    recording: Recording,
    backend: str = "auto",
    batch_size: int = 8,
    state_dir: str | Path | None = None,
    max_memory: int | None = None,
    bits: BitPlan | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Record as the recipe says, calibrate, convert, and write a pipeline folder with a ``report.json``.

    Args:
        pipeline: its denoisers become the quantized ones, those of ``prepared``.
        prepared: from ``prepare_pipeline``.
        recipe: that they were prepared with.
        folder: absent or empty.
        recording: where the calibration samples come from.
        backend: as for ``dmq_ao.convert``.
        batch_size: rows per forward pass.
        state_dir: as for ``dmq_ao.calibrate``; of two denoisers each has a folder of its name in it.
        max_memory: as for ``dmq_ao.calibrate``.
        bits: as for ``dmq_ao.calibrate``; where there are any, the folder gets a ``bit_plan.json`` to edit, of two
            denoisers one each.
        progress: show progress bars.

    Returns:
        The report: options, results of calibration, every layer, and the totals; of two denoisers, those of each are
        under ``denoisers``.

    Raises:
        ValueError: when ``folder`` is taken, or ``bits`` are one plan for two denoisers; before anything is recorded.
    """
    check_free(Path(folder))
    if bits is not None:
        _check_one_plan(list(prepared))
    Path(folder).parent.mkdir(parents=True, exist_ok=True)  # where that is refused, it is better known now
    original_bytes = {name: float_bytes(getattr(pipeline, name)) for name in prepared}
    count = len(denoiser_names(pipeline))
    samples = record_denoisers(
        pipeline,
        num_samples=recipe.num_samples,
        steps=recording.steps,
        seed=recording.seed,
        prompt=recording.prompt,
        batch_size=batch_size,
        trajectories=recording.trajectories,
        select=recipe.select,
        progress=progress,
    )
    folders = _state_folders(state_dir, list(prepared))
    calibrations = {
        name: calibrate(
            gm,
            samples[name],
            state_dir=folders[name],
            seed=recording.seed,
            progress=progress,
            batch_size=batch_size,
            max_memory=max_memory,
            bits=bits,
        )
        for name, gm in prepared.items()
    }
    quantized = {name: convert(gm, backend) for name, gm in prepared.items()}
    reports: dict[str, dict[str, Any]] = {}
    for name, denoiser in quantized.items():
        setattr(pipeline, name, denoiser)
        reports[name] = {"calibration": calibrations[name].to_dict(), **describe_denoiser(denoiser)}
    note_seeds(pipeline, [recording.seeds(recipe, count)])
    head = {"pipeline": type(pipeline).__name__, "sampling": recording.describe(recipe, count)}
    save_pipeline(pipeline, folder, {**head, **in_one(reports, quantized)})
    _save_plans({name: one.bits for name, one in calibrations.items()}, Path(folder))
    for name, report in reports.items():
        report |= {"file_bytes": folder_bytes(Path(folder) / name), "float_bytes": original_bytes[name]}
    return {**head, **in_one(reports, quantized), "folder": str(folder)}


def _state_folders(state_dir: str | Path | None, names: Sequence[str]) -> dict[str, str | Path | None]:
    """Where each denoiser's calibration saves its progress; of several, in a folder of its name."""
    several = state_dir is not None and len(names) > 1
    return {name: Path(str(state_dir)) / name if several else state_dir for name in names}


def _check_one_plan(names: Sequence[str]) -> None:
    if len(names) > 1:
        raise ValueError(
            f"one plan of bits is for one denoiser, got {' and '.join(names)}; name it (prepare_pipeline(...,"
            f" denoisers=[{names[0]!r}]), --denoiser {names[0]})"
        )


def _save_plans(plans: Mapping[str, BitPlan | None], folder: Path) -> None:
    """Beside the pipeline, each where there is one."""
    for name, plan in plans.items():
        if plan:
            plan.save(folder / (f"bit_plan_{name}.json" if len(plans) > 1 else BIT_PLAN))


def describe_folder(folder: str | Path, backend: str = "auto") -> dict[str, Any]:
    """``describe`` for a quantized pipeline or denoiser on disk, with its bytes.

    Raises:
        InvalidFile: when it is not there, not quantized, or damaged.
    """
    quantized = load_denoisers(folder, backend=backend)
    folders = denoiser_folders(folder)
    reports = {
        name: {
            **describe_denoiser(denoiser),
            "file_bytes": folder_bytes(folders[name]),
            "float_bytes": float_bytes(denoiser.skeleton),
        }
        for name, denoiser in quantized.items()
    }
    return {"folder": str(folder), **in_one(reports, quantized)}


def forecast(pipeline: Any, prepared: Mapping[str, GraphModule], recipe: Recipe, steps: int = 20) -> dict[str, Any]:
    """What ``quantize_pipeline`` would make: which layers, and about how many bits and bytes.

    Args:
        pipeline: with the float denoisers.
        prepared: from ``prepare_pipeline``.
        recipe: that they were prepared with.
        steps: of the sampler: rows of per-step ranges.
    """
    denoisers = {name: getattr(pipeline, name) for name in prepared}
    reports = {name: _forecast_one(denoisers[name], gm, recipe, steps) for name, gm in prepared.items()}
    return in_one(reports, denoisers)


def _forecast_one(denoiser: nn.Module, prepared: GraphModule, recipe: Recipe, steps: int) -> dict[str, Any]:
    width = 8 * next(parameter.element_size() for parameter in denoiser.parameters())
    plan = state_of(prepared).plan
    shapes = _weight_shapes(prepared)
    layers = [
        {
            "name": item.name,
            "kind": item.kind,
            "status": "float" if item.weight is None else "quantized",
            "weight_bits": width if item.weight is None else item.weight.bits,
            "activation_bits": width if item.activation is None else item.activation.bits,
            "why": item.why,
        }
        for item in plan.values()
    ]
    numel = sum(tensor.numel() for tensor in denoiser.state_dict().values())
    reads = {str(node.target): node for node in prepared.graph.nodes if node.op == "get_attr"}
    stored = sum(graph.attribute(prepared, node).numel() for node in reads.values())
    rest = stored - sum(math.prod(shape) for shape in shapes.values())
    bits = rest * width + sum(_stored_bits(plan[name], shape, steps, recipe) for name, shape in shapes.items())
    return {
        "recipe": recipe.to_dict(),
        "mean_bits": bits / numel,
        "file_bytes": bits // 8,
        "float_bytes": float_bytes(denoiser),
        **status_counts(layers),
        "layers": layers,
    }


def _weight_shapes(prepared: GraphModule) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that will be codes, by layer."""
    nodes = graph.layer_nodes(prepared)
    return {name: tuple(float_weight(prepared, nodes[name]).shape) for name in weight_observers(prepared)}


def _stored_bits(item: LayerPlan, shape: tuple[int, ...], steps: int, recipe: Recipe) -> int:
    """As ``LayerRecord.stored_bits`` will count, before there is a record: at most, where something may be refused."""
    assert item.weight is not None
    rest = overhead_bits(item, shape, steps, recipe)
    allocation = recipe.allocation
    if allocation is None or item.kind == graph.TABLE or allocation.leaves(item.weight.bits):
        return 8 * packed_bytes(math.prod(shape), item.weight.bits) + rest
    mean = item.weight.bits if allocation.mean_bits is None else allocation.mean_bits
    return math.ceil(mean * math.prod(shape)) + 8 * shape[0] + rest
