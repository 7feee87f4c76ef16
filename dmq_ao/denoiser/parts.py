"""What a quantized denoiser is made of, besides the graph that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from dmq_ao.config import Recipe
from dmq_ao.graph import Signature
from dmq_ao.records import Kernel, LayerPlan, LayerRecord
from dmq_ao.serialization.graph import StoredGraph


@dataclass(frozen=True, eq=False)
class DenoiserParts:
    """What is known of a lowered graph.

    Attributes:
        signature: how a call maps onto the graph.
        skeleton: module tree of the float model on the meta device: names, shapes and config.
        recipe: how it was quantized.
        plan: what the recipe did with each layer.
        records: integers by layer name.
        float_tensors: what stayed in float [...], by original name.
        sqnr_db: output noise per layer on calibration samples, dB.
        merged: layers that were copies, each with that which stands for it.
        stored_graph: the q/dq graph as ``save`` writes it; None where it cannot be stored.
        kernels: what multiplies each quantized layer; lowering tells.
        backend: name of what lowered it; likewise.
        roles: what each layer is for, ``@input`` and the like, by name.
    """

    signature: Signature
    skeleton: nn.Module
    recipe: Recipe
    plan: Mapping[str, LayerPlan]
    records: Mapping[str, LayerRecord]
    float_tensors: Mapping[str, Tensor]
    sqnr_db: Mapping[str, float]
    merged: Mapping[str, str]
    stored_graph: StoredGraph | None
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    backend: str = ""
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
