"""What is decided of a layer's weight: its codes, by held-out error, and its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao.algorithms.bias_correction import correction, own_correction
from dmq_ao.algorithms.layer_rows import Draw, LayerRows
from dmq_ao.algorithms.moments import Moments
from dmq_ao.algorithms.rounding import round_by_feedback, round_by_learning
from dmq_ao.algorithms.sampled_rows import held_out_error, product
from dmq_ao.config import Recipe, Rounding, RoundingMethod
from dmq_ao.graph.geometry import Geometry, geometry
from dmq_ao.quantizer.prepared import float_bias, observers, scaled_weight
from dmq_ao.records import WeightRecord


@dataclass(frozen=True)
class RoundingErrors:
    """Held-out error of a layer's output, relative, rounded to nearest and with the codes that were kept."""

    nearest: float
    best: float


class WeightLearning:
    """Decides the weight of one layer after another."""

    def __init__(self, prepared: GraphModule, recipe: Recipe, rows: LayerRows, count: int) -> None:
        """Of one run.

        Args:
            prepared: the graph; its observers of weights are decided in place.
            recipe: rounding and bias correction.
            rows: what layers are shown of the samples.
            count: steps of the sampler.
        """
        self.prepared, self.rows, self.count = prepared, rows, count
        self.rounding, self.corrects = recipe.rounding, recipe.bias_correction
        self.watchers = observers(prepared)

    def decide(self, name: str, node: Node) -> RoundingErrors:
        """Decide codes and bias of a layer whose input is decided."""
        observer, activation = self.watchers[name]
        weight = scaled_weight(self.prepared, node, activation)
        shape = geometry(node, weight)
        nearest = observer.round(weight)
        rounding = self.rounding or Rounding()
        learns = self.rounding is not None and self.rows.layout(name) is not None
        second = learns and rounding.method is RoundingMethod.FEEDBACK
        moments, holdout = self.rows.moments(name, node, shape, weight, nearest, rounding, second=second)

        def error_of(record: WeightRecord) -> float:
            shift = None
            if self.corrects:
                shift = (correction if rounding.compensate else own_correction)(weight, record, moments)
            return held_out_error(holdout, record.dequantize(), shift)

        before = error_of(nearest)
        best, after = nearest, before
        if learns:
            learned = self._round(name, node, shape, weight, moments, rounding)
            error = error_of(learned)
            if error < before:
                best, after = learned, error
        bias = None
        if self.corrects:
            own, shift = float_bias(self.prepared, node), correction(weight, best, moments)
            bias = (shift if own is None else own.float() + shift).contiguous()
        observer.restore(best, bias)
        return RoundingErrors(before, after)

    def _round(
        self,
        name: str,
        node: Node,
        shape: Geometry,
        weight: Tensor,
        moments: Sequence[Moments],
        rounding: Rounding,
    ) -> WeightRecord:
        observer, _ = self.watchers[name]
        if rounding.method is RoundingMethod.FEEDBACK:
            return round_by_feedback(
                weight, observer.config, observer.estimator, moments, rounding, observer.channel_bits
            )
        data = self.rows.student(name, node, shape, rounding)
        with torch.enable_grad():
            if not rounding.compensate:
                data = replace(data, y=product(data.x, weight))
            return round_by_learning(
                weight,
                observer.config,
                observer.estimator,
                data,
                rounding,
                self.count,
                self.rows.generator(self.rows.places[name], Draw.ROUNDING),
            )
