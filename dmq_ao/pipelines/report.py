"""What was done to the denoisers of a pipeline, in plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dmq_ao.denoiser import QuantizedDenoiser


def describe_denoiser(quantized: QuantizedDenoiser) -> dict[str, Any]:
    """A quantized denoiser in plain values: recipe, every layer, and the totals over them."""
    layers = quantized.layer_reports()
    return {
        "recipe": quantized.recipe.to_dict(),
        "backend": quantized.backend,
        "mean_bits": quantized.mean_bits,
        "kernels": quantized.kernel_counts,
        **status_counts(layers),
        "layers": layers,
    }


def in_one(reports: Mapping[str, Mapping[str, Any]], denoisers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The report of one denoiser as it is; of several their totals, all layers, and each under ``denoisers``.

    Args:
        reports: by the denoiser's name in the pipeline.
        denoisers: float or quantized, which weigh in the mean of bits by their parameters.
    """
    if len(reports) == 1:
        return dict(next(iter(reports.values())))
    parameters = {name: parameter_count(denoisers[name]) for name in reports}
    total: dict[str, Any] = {
        "recipe": next(iter(reports.values()))["recipe"],
        "mean_bits": sum(reports[name]["mean_bits"] * count for name, count in parameters.items())
        / sum(parameters.values()),
        "layers": [
            {**layer, "name": f"{name}.{layer['name']}"}
            for name, report in reports.items()
            for layer in report["layers"]
        ],
    }
    for key in ("quantized_layers", "kept_layers", "file_bytes", "float_bytes"):
        if all(key in report for report in reports.values()):
            total[key] = sum(report[key] for report in reports.values())
    if all("kernels" in report for report in reports.values()):
        total["backend"] = " and ".join(dict.fromkeys(report["backend"] for report in reports.values()))
        total["kernels"] = dict(sum((Counter(report["kernels"]) for report in reports.values()), Counter[str]()))
    return {**total, "denoisers": {name: dict(report) for name, report in reports.items()}}


def parameter_count(denoiser: nn.Module) -> int:
    """Numbers in the float model, which mean bits are shared out over."""
    model = denoiser.skeleton if isinstance(denoiser, QuantizedDenoiser) else denoiser
    return sum(tensor.numel() for tensor in model.state_dict().values())


def status_counts(layers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many layers are quantized and how many are float, by their rows."""
    counts = Counter(layer["status"] for layer in layers)
    return {"quantized_layers": counts["quantized"], "kept_layers": counts["float"]}
