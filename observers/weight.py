"""The observer of a layer's weight: nothing to watch, so it goes straight to integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase

from dmq_ao import graph, numerics
from dmq_ao.config import Granularity, TensorConfig
from dmq_ao.numerics import ops
from dmq_ao.observers.per_step import RangeEstimator
from dmq_ao.records import WeightRecord


def quantize_weight(
    weight: Tensor, config: TensorConfig, estimator: type[RangeEstimator], channel_bits: Tensor | None = None
) -> WeightRecord:
    """Codes of a weight [out, ...] with one scale per tensor, per output channel or per group of inputs.

    Args:
        weight: float.
        config: width and granularity.
        estimator: of the range.
        channel_bits: [out], a width of its own for each output channel; None for ``config.bits``.

    Raises:
        ValueError: when ``group_size`` does not divide the inputs of an output channel, or widths differ where they
            share a scale.
    """
    out, inputs = weight.shape[0], weight[0].numel()
    size = {Granularity.PER_TENSOR: out * inputs, Granularity.PER_CHANNEL: inputs}.get(
        config.granularity, config.group_size
    )
    assert size is not None
    if config.granularity is Granularity.PER_GROUP and inputs % size:
        raise ValueError(f"group_size {size} does not divide the {inputs} inputs of an output channel")
    rows = weight.detach().float().reshape(-1, size)
    bits: int | Tensor = config.bits
    if config.float8:
        scale, zero_point = numerics.float8_qparams(*torch.aminmax(rows, dim=1))
    elif channel_bits is None:
        scale, zero_point = _qparams(rows, config.bits, config.symmetric, estimator)
    elif config.granularity is Granularity.PER_TENSOR:
        raise ValueError("channels of different widths cannot share one scale; use per_channel or per_group weights")
    else:
        bits = channel_bits.repeat_interleave(len(rows) // out)
        scale, zero_point = rows.new_empty(len(rows)), torch.empty(len(rows), dtype=torch.int32, device=rows.device)
        for width in bits.unique().tolist():
            where = bits == width
            scale[where], zero_point[where] = _qparams(rows[where], width, config.symmetric, estimator)
    if config.float8:
        codes = numerics.to_float8(rows, scale[:, None])
    else:
        limits = numerics.RowLimits.of(bits, config.symmetric, rows)
        codes = numerics.quantize_rows(rows, scale[:, None], zero_point[:, None], limits)
    if config.granularity is Granularity.PER_TENSOR:
        scale, zero_point = scale.expand(out).contiguous(), zero_point.expand(out).contiguous()
    return WeightRecord(
        bits=config.bits if channel_bits is None else int(channel_bits.max()),
        symmetric=config.symmetric,
        codes=codes.to(numerics.code_dtype(config.symmetric, config.float8)).reshape(weight.shape),
        scale=scale.reshape(out, -1),
        zero_point=zero_point.reshape(out, -1),
        channel_bits=channel_bits,
    )


def _qparams(rows: Tensor, bits: int, symmetric: bool, estimator: type[RangeEstimator]) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows] of rows [rows, n] of one width."""
    if bits == 1:
        return numerics.sign_qparams(rows, symmetric)
    return numerics.choose_qparams(*estimator.weight_range(rows, bits, symmetric), bits, symmetric)


class WeightObserver(ObserverBase):
    """Stands on a layer's weight and lowers itself to stored codes and a dequantize node."""

    def __init__(self, layer: str, config: TensorConfig, estimator: type[RangeEstimator], **spec: Any) -> None:
        """``spec`` is what torchao passes to every observer; all of it follows from ``config``."""
        super().__init__(dtype=numerics.code_dtype(config.symmetric, config.float8))
        del spec
        self.layer, self.config, self.estimator = layer, config, estimator
        self.start()

    def start(self) -> None:
        """Forget what was decided."""
        self.decided: WeightRecord | None = None
        self.bias: Tensor | None = None
        self.channel_bits: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight [out, ...] itself."""
        return weight

    def record(self, weight: Tensor) -> WeightRecord:
        """The restored record, or the codes of ``weight`` [out, ...].

        Raises:
            ValueError: naming the layer, when the weight is not finite or does not fit the configuration.
        """
        return self.round(weight) if self.decided is None else self.decided

    def round(self, weight: Tensor) -> WeightRecord:
        """The codes nearest to ``weight`` [out, ...], whatever was decided.

        Raises:
            ValueError: as ``record``.
        """
        self.check(weight)
        try:
            return quantize_weight(weight, self.config, self.estimator, self.channel_bits)
        except ValueError as error:
            raise ValueError(f"{self.layer}: {error}") from error

    def check(self, weight: Tensor) -> None:
        """Refuse a ``weight`` [out, ...] that is not finite.

        Raises:
            ValueError: naming the layer.
        """
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{self.layer}: its weight holds NaN or infinity; check the float checkpoint")

    def restore(self, record: WeightRecord, bias: Tensor | None = None) -> None:
        """Take a record as decided, from a file or from ``record``, and a ``bias`` [out] in place of the layer's."""
        self.decided, self.bias = record, bias

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``scale`` and ``zero_point`` [out, groups] of the decided record."""
        assert self.decided is not None, f"{self.layer}: record() comes first"
        return self.decided.scale, self.decided.zero_point

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace this observer's node by stored codes and a dequantize node."""
        source = node.args[0]
        assert isinstance(source, Node)
        weight = graph.attribute(model, source)
        record = self.record(weight)
        with model.graph.inserting_before(node):
            codes = graph.add_record_tensor(model, self.layer, "codes", record.codes)
            scale = graph.add_record_tensor(model, self.layer, "weight_scale", record.scale)
            zero_point = graph.add_record_tensor(model, self.layer, "weight_zero_point", record.zero_point)
            real = model.graph.call_function(ops.dequantize_weight, (codes, scale, zero_point, weight.dtype))
        node.replace_all_uses_with(real)
        model.graph.erase_node(node)
