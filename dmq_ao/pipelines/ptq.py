"""Post-training quantization of a pipeline from end to end, and a forecast of it that calibrates nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.api.calibrate import calibrate
from dmq_ao.api.quantize import convert, denoiser_name, prepare
from dmq_ao.config import Recipe
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import folder_bytes
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.numerics import packed_bytes
from dmq_ao.pipelines.adapter import check_free, denoiser_folder, load_denoiser, record_pipeline, save_pipeline
from dmq_ao.pipelines.conditions import Conditions
from dmq_ao.pipelines.prompts import Prompts
from dmq_ao.pipelines.seeds import note_seeds, trajectory_seeds
from dmq_ao.quantizer.prepared import float_weight, state_of, weight_observers
from dmq_ao.records import LayerPlan, overhead_bits

BIT_PLAN = "bit_plan.json"
EXAMPLE_STEPS = 2  # fewer are too few for some samplers


def prepare_pipeline(
    pipeline: Any, recipe: Recipe, *, prompt: Prompts = None, seed: int = 0, backend: str = "auto"
) -> GraphModule:
    """``dmq_ao.prepare`` for a pipeline's denoiser: example inputs come from two steps of its own sampler.

    What is wrong with a recipe shows here, before anything long begins.

    Raises:
        TypeError: when the denoiser is missing, or quantized already.
        ValueError: as ``prepare``.
        UnsupportedByBackend: as ``prepare``.
    """
    samples = record_pipeline(
        pipeline, num_samples=2, steps=EXAMPLE_STEPS, seed=seed, prompt=prompt, batch_size=2, trajectories=2
    )
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    return prepare(denoiser, recipe, samples.example(), timestep_arg=samples.timestep_arg, backend=backend)


@dataclass(frozen=True)
class Recording:
    """How calibration samples are recorded from a pipeline's own sampler.

    Attributes:
        steps: of the sampler.
        prompt: for pipelines that want one: a text, or several that the seeds take in turn.
        seed: first seed of the trajectories, and that of calibration.
        trajectories: as for ``record_pipeline``.
    """

    steps: int = 20
    prompt: Prompts = None
    seed: int = 0
    trajectories: int | None = None

    def seeds(self, recipe: Recipe) -> range:
        """Of the trajectories that a recipe's samples come from."""
        return trajectory_seeds(
            recipe.num_samples,
            steps=self.steps,
            seed=self.seed,
            trajectories=self.trajectories,
            select=recipe.select,
        )

    def describe(self, recipe: Recipe) -> dict[str, Any]:
        """In plain values, for a report."""
        return {
            "steps": self.steps,
            "prompt": self.prompt.describe() if isinstance(self.prompt, Conditions) else self.prompt,
            "seed": self.seed,
            "trajectories": len(self.seeds(recipe)),
            "select": recipe.select.method.value,
        }


def quantize_pipeline(
    pipeline: Any,
    prepared: GraphModule,
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
        pipeline: its denoiser becomes the quantized one.
        prepared: from ``prepare_pipeline``.
        recipe: that it was prepared with.
        folder: absent or empty.
        recording: where the calibration samples come from.
        backend: as for ``dmq_ao.convert``.
        batch_size: rows per forward pass.
        state_dir: as for ``dmq_ao.calibrate``.
        max_memory: as for ``dmq_ao.calibrate``.
        bits: as for ``dmq_ao.calibrate``; where there are any, the folder gets a ``bit_plan.json`` to edit.
        progress: show progress bars.

    Returns:
        The report: options, results of calibration, every layer, and the totals.

    Raises:
        ValueError: when ``folder`` is taken; nothing was recorded then.
    """
    check_free(Path(folder))
    Path(folder).parent.mkdir(parents=True, exist_ok=True)  # where that is refused, it is better known now
    name = denoiser_name(pipeline)
    original_bytes = float_bytes(getattr(pipeline, name))
    samples = record_pipeline(
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
    calibration = calibrate(
        prepared,
        samples,
        state_dir=state_dir,
        seed=recording.seed,
        progress=progress,
        batch_size=batch_size,
        max_memory=max_memory,
        bits=bits,
    )
    quantized = convert(prepared, backend)
    setattr(pipeline, name, quantized)
    note_seeds(pipeline, [recording.seeds(recipe)])
    report = {
        "pipeline": type(pipeline).__name__,
        "sampling": recording.describe(recipe),
        "calibration": calibration.to_dict(),
        **describe_denoiser(quantized),
    }
    save_pipeline(pipeline, folder, report)
    if calibration.bits:
        calibration.bits.save(Path(folder) / BIT_PLAN)
    size = folder_bytes(Path(folder) / name)
    return {**report, "folder": str(folder), "file_bytes": size, "float_bytes": original_bytes}


def describe_denoiser(quantized: QuantizedDenoiser) -> dict[str, Any]:
    """A quantized denoiser in plain values: recipe, every layer, and the totals over them."""
    layers = quantized.layer_reports()
    return {
        "recipe": quantized.recipe.to_dict(),
        "backend": quantized.backend,
        "mean_bits": quantized.mean_bits,
        "kernels": quantized.kernel_counts,
        **_counts(layers),
        "layers": layers,
    }


def describe_folder(folder: str | Path, backend: str = "auto") -> dict[str, Any]:
    """``describe`` for a quantized pipeline or denoiser on disk, with its bytes.

    Raises:
        InvalidFile: when it is not there, not quantized, or damaged.
    """
    quantized = load_denoiser(folder, backend=backend)
    return {
        "folder": str(folder),
        **describe_denoiser(quantized),
        "file_bytes": folder_bytes(denoiser_folder(folder)),
        "float_bytes": float_bytes(quantized.skeleton),
    }


def _counts(layers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(layer["status"] for layer in layers)
    return {"quantized_layers": counts["quantized"], "kept_layers": counts["float"]}


def forecast(pipeline: Any, prepared: GraphModule, recipe: Recipe, steps: int = 20) -> dict[str, Any]:
    """What ``quantize_pipeline`` would make: which layers, and about how many bits and bytes.

    Args:
        pipeline: with the float denoiser.
        prepared: from ``prepare_pipeline``.
        recipe: that it was prepared with.
        steps: of the sampler: rows of per-step ranges.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
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
        **_counts(layers),
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
