"""Whether a stored graph says of its layers what their records say: kernels read both, and must find one meaning.

The q/dq graph reads a record's tensors, and the integer kernels read the record; what the graph itself adds are the
operators between them, their axes and their limits, and which layer's tensors each reads.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph
from dmq_ao.config import Ranges
from dmq_ao.graph import aten
from dmq_ao.graph.values import VAL, Value
from dmq_ao.numerics import ops
from dmq_ao.records import ActivationRecord, LayerPlan, LayerRecord

_KINDS: dict[Any, str] = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
}
_KINDS |= {graph.LINEAR: "linear", graph.LOOKUP: graph.TABLE}
_WEIGHT_FIELDS = ("codes", "weight_scale", "weight_zero_point")


class Disagreement(ValueError):
    """A graph and its records say different things; the message names the layer."""


def check_agreement(
    gm: GraphModule, outlines: Mapping[str, LayerRecord], plan: Mapping[str, LayerPlan], timestep: Node | None
) -> None:
    """Refuse a graph that contradicts the records.

    Args:
        gm: a graph whose reads of records are marked (``graph.SOURCE``).
        outlines: the records; their codes are not looked at.
        plan: of all layers.
        timestep: the graph's input of that name, None without one.

    Raises:
        Disagreement: naming the layer and what differs.
    """
    _Check(gm, outlines, plan, timestep).run()


class _Check:
    def __init__(
        self,
        gm: GraphModule,
        outlines: Mapping[str, LayerRecord],
        plan: Mapping[str, LayerPlan],
        timestep: Node | None,
    ) -> None:
        self.gm, self.outlines, self.plan, self.timestep = gm, outlines, plan, timestep

    def run(self) -> None:
        self._check_names()
        for name, record in self.outlines.items():
            plan = self.plan.get(name)
            if plan is None or plan.weight is None or plan.kind != record.kind:
                raise Disagreement(f"{name} is quantized as {record.kind}, and the plan does not quantize it so")
            _check_plan(name, plan, record)
        nodes = graph.layer_nodes(self.gm)
        for name, record in self.outlines.items():
            if name not in nodes:
                raise Disagreement(f"the graph has no operator for layer {name!r}, which has codes")
            self._check_layer(name, record, nodes[name])
        self._check_readers(nodes)

    def _check_names(self) -> None:
        names = [node.meta[graph.LAYER] for node in self.gm.graph.nodes if graph.LAYER in node.meta]
        calls = [n for n in self.gm.graph.nodes if graph.LAYER in n.meta and n.op == "call_function"]
        if len(set(names)) != len(names) or len(calls) != len(names):
            raise Disagreement("each layer is one operator of the graph, and one only")
        unknown = sorted(set(names) - set(self.plan))
        if unknown:
            raise Disagreement(f"layers {unknown} are not in the plan")

    def _check_layer(self, name: str, record: LayerRecord, node: Node) -> None:
        if _KINDS.get(node.target) != record.kind:
            raise Disagreement(f"{name} is {node.target} in the graph, its record that of a {record.kind}")
        weight = node.args[0 if record.kind == graph.TABLE else 1]
        if not isinstance(weight, Node) or weight.target is not ops.dequantize_weight:
            raise Disagreement(f"{name}: its operator does not read its codes")
        if node.kwargs or any(not _is_integers(value) for value in node.args[3:]):
            raise Disagreement(f"{name}: its operator takes its arguments by position, and its geometry in numbers")
        self._check_axes(name, record, node)
        for argument, field in zip(weight.args[:3], _WEIGHT_FIELDS, strict=True):
            self._check_source(argument, name, field)
        if record.bias is not None:
            self._check_source(node.args[2] if len(node.args) > 2 else None, name, "corrected_bias")
        if record.activation is not None:
            self._check_input(name, record.activation, node.args[0])

    def _check_axes(self, name: str, record: LayerRecord, node: Node) -> None:
        """The channel axis is the last of a linear's input, and the second of a convolution's with all its axes."""
        value = node.meta.get(VAL)
        if not isinstance(value, Value) or not value.dtype.is_floating_point:
            raise Disagreement(f"{name}: the graph describes no floating value of it")
        weight = node.args[0 if record.kind == graph.TABLE else 1]
        assert isinstance(weight, Node)
        if weight.args[3] != value.dtype:
            raise Disagreement(f"{name}: its weight is {weight.args[3]}, its output {value.dtype}")
        if record.activation is None:
            return
        rank = value.dim()
        is_conv = record.kind != "linear"
        if record.activation.ch_axis != (1 if is_conv else rank - 1) or is_conv and rank != len(record.weight.shape):
            raise Disagreement(f"{name}: its channels are not on axis {record.activation.ch_axis} of {rank}")
        real = node.args[0]
        if isinstance(real, Node) and real.target is ops.dequantize and real.args[5] != value.dtype:
            raise Disagreement(f"{name}: its input is {real.args[5]}, its output {value.dtype}")

    def _check_input(self, name: str, record: ActivationRecord, real: Any) -> None:
        """``dequantize(quantize(x, ...), ...)``, both by the numbers of this input."""
        if not isinstance(real, Node) or real.target is not ops.dequantize or not isinstance(real.args[0], Node):
            raise Disagreement(f"{name}: its input is not quantized in the graph")
        codes, scale, zero_point, step, axis = real.args[:5]
        assert isinstance(codes, Node)
        limits = () if record.float8 else (0, 2**record.bits - 1)
        target = ops.quantize_float8 if record.float8 else ops.quantize
        numbers = (scale,) if record.float8 else (scale, zero_point)
        operands = codes.args[1 : 1 + len(numbers)]
        if codes.target is not target or operands != numbers or real.kwargs or codes.kwargs:
            raise Disagreement(f"{name}: its input is quantized by other numbers than it is dequantized by")
        finer, *rest = codes.args[1 + len(numbers) :]
        if axis != record.ch_axis or tuple(rest) != (record.ch_axis, *limits):
            raise Disagreement(
                f"{name}: axis and limits of its input are {rest}, its record says {record.ch_axis}, {limits}"
            )
        self._check_numbers(name, record, scale, zero_point, codes.args[0])
        self._check_step(name, record, finer, "quantize_step", record.quantize_step)
        field = "quantize_step" if record.channel_scale is None else "dequantize_step"
        self._check_step(name, record, step, field, record.channel_step)

    def _check_numbers(self, name: str, record: ActivationRecord, scale: Any, zero_point: Any, x: Any) -> None:
        if record.ranges is Ranges.DYNAMIC:
            pairs = [(number, place) for place, number in enumerate((scale, zero_point))]
            sources: list[Any] = [number.args[0] if _is_item(number, place) else None for number, place in pairs]
            source = sources[0]
            if not isinstance(source, Node) or source is not sources[1] or source.target is not ops.dynamic_qparams:
                raise Disagreement(f"{name}: its input has no dynamic range in the graph")
            if source.args[1:] != (record.bits,):
                raise Disagreement(f"{name}: its input has no dynamic range of {record.bits} bits in the graph")
            self._check_quotient(name, record, source.args[0], x)
            return
        by_step = record.timesteps is not None
        self._check_row(name, record, scale, "input_scale", record.scale, by_step)
        self._check_row(name, record, zero_point, "input_zero_point", record.zero_point, by_step)

    def _check_quotient(self, name: str, record: ActivationRecord, quotient: Any, x: Any) -> None:
        """A dynamic range is that of ``x``, over the channel scale where there is one."""
        if record.channel_scale is None:
            if quotient is not x:
                raise Disagreement(f"{name}: its dynamic range is of another tensor")
            return
        if not isinstance(quotient, Node) or quotient.target is not aten.div.Tensor or quotient.args[0] is not x:
            raise Disagreement(f"{name}: its dynamic range is of another tensor")
        self._check_same(name, quotient.args[1], "channel_scale", record.channel_scale)
        shape = graph.attribute(self.gm, quotient.args[1]).shape  # type: ignore[arg-type]
        if len(shape) <= record.ch_axis or shape[record.ch_axis] != record.channel_scale.numel():
            raise Disagreement(f"{name}: its channel scale lies along another axis")

    def _check_step(self, name: str, record: ActivationRecord, step: Any, field: str, expected: Tensor | None) -> None:
        if (step is None) != (expected is None):
            raise Disagreement(f"{name}: its {field} is in the graph or in the record, and not in both")
        if expected is not None:
            self._check_row(name, record, step, field, expected, expected.dim() == 2)

    def _check_row(
        self, name: str, record: ActivationRecord, number: Any, field: str, expected: Tensor, by_step: bool
    ) -> None:
        """A record's tensor, or the row of it that the timestep chooses."""
        if by_step:
            rows = self._row_of(number)
            if rows is None:
                raise Disagreement(f"{name}: its {field} is not looked up by the timestep")
            assert record.timesteps is not None
            self._check_same(name, rows.args[1], "timesteps", record.timesteps)
            number = number.args[0]
        self._check_same(name, number, field, expected)

    def _row_of(self, number: Any) -> Node | None:
        """The look-up behind ``index_select(table, 0, row(timestep, timesteps))``; None for anything else."""
        if not isinstance(number, Node) or number.target is not aten.index_select.default or number.args[1] != 0:
            return None
        rows = number.args[2]
        is_row = isinstance(rows, Node) and rows.target is ops.row and rows.args[0] is self.timestep
        return rows if is_row else None  # type: ignore[return-value]

    def _check_same(self, name: str, read: Any, field: str, expected: Tensor) -> None:
        """A read of this field: the layer's own, or that of another layer with the same numbers."""
        source = read.meta.get(graph.SOURCE) if isinstance(read, Node) else None
        if source is None or source[1] != field:
            raise Disagreement(f"{name}: its {field} is not what the graph reads")
        if source[0] != name:
            actual = graph.attribute(self.gm, read).reshape(-1)
            if actual.numel() != expected.numel() or not torch.equal(actual, expected.reshape(-1).to(actual)):
                raise Disagreement(f"{name}: the graph reads the {field} of {source[0]}, which is another")

    def _check_source(self, read: Any, name: str, field: str) -> None:
        source = read.meta.get(graph.SOURCE) if isinstance(read, Node) else None
        if source != (name, field):
            raise Disagreement(f"{name}: the graph reads {source} in the place of its {field}")

    def _check_readers(self, nodes: Mapping[str, Node]) -> None:
        """Codes of a weight are read by their layer alone."""
        for node in self.gm.graph.nodes:
            if node.target is not ops.dequantize_weight:
                continue
            source = _source(node.args[0])
            owner = nodes.get(source[0]) if source else None
            if owner is None or set(node.users) - {owner}:
                raise Disagreement(f"codes of {source and source[0]} are read by another layer")


def _check_plan(name: str, plan: LayerPlan, record: LayerRecord) -> None:
    """What backends decide by the plan, before they see a record, must be so."""
    assert plan.weight is not None
    weight, activation = record.weight, record.activation
    if (plan.weight.symmetric, plan.weight.float8) != (weight.symmetric, weight.float8):
        raise Disagreement(f"{name}: plan and record differ in whether its codes are symmetric, or float8")
    if not weight.symmetric and weight.bits > 7 >= plan.weight.bits:
        raise Disagreement(f"{name}: its codes have {weight.bits} bits, the plan says {plan.weight.bits}")
    if (plan.activation is None) != (activation is None):
        raise Disagreement(f"{name}: plan and record differ in whether its input is quantized")
    exponents = None if activation is None else activation.exponents
    votes = plan.power_of_two
    if exponents is not None and (votes is None or votes.per_step != (exponents.dim() == 2)):
        raise Disagreement(f"{name}: it has exponents that the plan does not have")


def _is_integers(value: Any) -> bool:
    return all(isinstance(one, int) for one in (value if isinstance(value, (tuple, list)) else [value]))


def _source(value: Any) -> tuple[str, str] | None:
    return value.meta.get(graph.SOURCE) if isinstance(value, Node) else None


def _is_item(value: Any, place: int) -> bool:
    return isinstance(value, Node) and value.target is operator.getitem and bool(value.args[1] == place)
