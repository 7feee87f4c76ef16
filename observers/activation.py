"""The observer of a layer's input: ranges first, then the power-of-two vote under those ranges, then integers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase

from dmq_ao import graph, numerics
from dmq_ao.config import MissingStatistics, PowerOfTwo, Ranges, TensorConfig
from dmq_ao.numerics import ops
from dmq_ao.observers.channel_scale import round_ste
from dmq_ao.observers.per_step import RangeEstimator, RangeTable
from dmq_ao.observers.power_of_two import Election, Vote, VoteTable, candidate_errors
from dmq_ao.records import ActivationRecord


class ActivationObserver(ObserverBase):
    """Watches the input of a layer (or of siblings that share it) and lowers itself to quantize and dequantize nodes.

    A calibration pass is started by ``start_ranges`` or ``start_votes`` and fed by ``forward``; the tensor itself goes
    through untouched. ``record`` says what was decided, ``decide`` freezes it.
    """

    def __init__(
        self,
        layer: str,
        config: TensorConfig,
        ch_axis: int,
        estimator: type[RangeEstimator],
        power_of_two: PowerOfTwo | None = None,
        **spec: Any,
    ) -> None:
        """``spec`` is what torchao passes to every observer; all of it follows from ``config``."""
        super().__init__(dtype=torch.uint8, is_dynamic=config.ranges is Ranges.DYNAMIC)
        del spec
        self.layer, self.config, self.ch_axis = layer, config, ch_axis
        self.estimator, self.power_of_two = estimator, power_of_two
        self.decided: ActivationRecord | None = None
        self.election: Election | None = None
        self.channel_scale: Tensor | None = None
        self.start_ranges()

    def start_ranges(self) -> None:
        """Forget what was observed and watch ranges; the channel scale stays."""
        self.ranges = RangeTable(self.estimator, self.config.ranges is Ranges.PER_STEP)
        self.vote: Vote | VoteTable | None = None
        self.decided = self.election = None

    def start_votes(self) -> None:
        """Freeze the ranges and hold the vote, if any was asked for, on what comes next."""
        self.decided = self._from_ranges()
        config = self.power_of_two
        self.vote = None if config is None else VoteTable(config) if config.per_step else Vote(config)

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Observe ``x`` [B, ...] at ``timestep`` [B]; returns ``x`` itself.

        Raises:
            ValueError: when ``x`` holds NaN or infinity, or ranges per step get no timestep or too few; it names the
                layer.
        """
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{self.layer}: its input holds NaN or infinity; check the samples and the float denoiser"
            )
        if self.config.ranges is Ranges.PER_STEP and timestep is None:
            raise ValueError(
                f"{self.layer}: per_step ranges need the timestep, which dmq_ao.prepare passes and prepare_pt2e alone"
                " does not; use dmq_ao.prepare, or static ranges"
            )
        if self.config.ranges is Ranges.PER_STEP and timestep is not None and timestep.numel() not in (1, len(x)):
            raise ValueError(
                f"{self.layer}: its input has {len(x)} rows and there are {timestep.numel()} timesteps; per_step"
                " ranges need one a row, use static or dynamic ranges for this layer"
            )
        quotient = _over_scale(x, self.channel_scale, self.ch_axis)
        if self.vote is not None and self.decided is not None:
            scale, zero_point = self._rows(x, timestep, self.decided)
            limit = self.vote.config.max_exponent
            errors = candidate_errors(quotient, scale, zero_point, self.config.bits, self.ch_axis, limit)
            self.vote.update(errors, timestep)
        elif self.decided is None and self.config.ranges is not Ranges.DYNAMIC:
            self.ranges.update(quotient, timestep)
        return x

    def _rows(self, x: Tensor, timestep: Tensor | None, record: ActivationRecord) -> tuple[Tensor, Tensor]:
        if record.ranges is Ranges.DYNAMIC:
            scale, zero_point = ops.dynamic_qparams(_over_scale(x, record.channel_scale, self.ch_axis), record.bits)
            return scale, zero_point
        scale, zero_point = record.scale.to(x.device), record.zero_point.to(x.device)
        if record.timesteps is None or timestep is None:
            return scale, zero_point
        rows = ops.row(timestep, record.timesteps.to(x.device))
        return scale[rows], zero_point[rows]

    def _steps(
        self, step: Tensor | None, x: Tensor, timestep: Tensor | None, record: ActivationRecord
    ) -> Tensor | None:
        """Channel steps [C], or [B, C] out of a table [rows, C]."""
        if step is None or step.dim() == 1:
            return None if step is None else step.to(x.device)
        assert record.timesteps is not None
        assert timestep is not None
        rows = ops.row(timestep, record.timesteps.to(x.device))
        return step.to(x.device)[rows.expand(len(x))]

    def record(self) -> ActivationRecord:
        """Ranges and exponents as decided by the passes so far.

        Raises:
            MissingStatistics: when nothing was observed.
        """
        return self._record(self._elect())

    def decide(self) -> None:
        """Freeze what ``record`` says, and keep the election that it comes from.

        Raises:
            MissingStatistics: when nothing was observed.
        """
        election = self._elect()
        self.restore(self._record(election))
        self.election = election or self.election

    def _elect(self) -> Election | None:
        return None if self.vote is None or not len(self.vote.counts) else self.vote.elect()

    def _record(self, election: Election | None) -> ActivationRecord:
        record = self.decided or self._from_ranges()
        return record if election is None else replace(record, exponents=election.exponents.cpu())

    def simulate(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """What the codes of ``x`` [B, ...] stand for, in the dtype of ``x``: ``x / channel_scale``, rounded."""
        record = self.record()
        scale, zero_point = self._rows(x, timestep, record)
        finer, step = (self._steps(s, x, timestep, record) for s in (record.quantize_step, record.channel_step))
        quantize, args = _quantize_call(record, x, scale, zero_point, finer)
        codes = quantize(*args)
        values: Tensor = ops.dequantize(codes, scale, zero_point, step, record.ch_axis, x.dtype)
        return values

    def scaled(self, x: Tensor) -> Tensor:
        """``x / channel_scale`` [B, ...], what is quantized."""
        return _over_scale(x, self.record().channel_scale, self.ch_axis)

    def straight_through(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """``simulate`` [B, ...] with a gradient: that of ``x / channel_scale`` inside the range, none beyond it."""
        record = self.record()
        with torch.no_grad():
            values = self.simulate(x, timestep)
            scale, zero_point = (numerics.along(t, 0, x.dim()) for t in self._rows(x, timestep, record))
            step = self._steps(record.channel_step, x, timestep, record)
            if step is not None:
                scale = scale * ops.channel_factor(step, record.ch_axis, x.dim())
            low, high = -zero_point * scale, (2**record.bits - 1 - zero_point) * scale
            quotient = self.scaled(x)
            inside = (quotient >= low) & (quotient <= high)
            divisor = None
            if record.channel_scale is not None:
                divisor = numerics.along(record.channel_scale.to(x), self.ch_axis, x.dim())
        result: Tensor = _Inside.apply(x, values, inside, divisor)  # type: ignore[no-untyped-call]
        return result

    def adjustable(self, x: Tensor, timestep: Tensor | None, factor: Tensor) -> Tensor:
        """``simulate`` with every step times ``factor`` [rows], one a row of the table; both get a gradient.

        Rounding passes it as if nothing had happened, clipping does not; zero points and exponents stay (LSQ, arXiv
        1902.08153, eq. 3). Not for dynamic ranges, which have no table.
        """
        record = self.record()
        scale, zero_point = self._rows(x, timestep, replace(record, scale=record.scale.to(x.device) * factor))
        step = numerics.along(scale, 0, x.dim())
        zero_point = numerics.along(zero_point, 0, x.dim())
        finer, coarser = (self._steps(s, x, timestep, record) for s in (record.quantize_step, record.channel_step))
        divisor = step if finer is None else step * ops.channel_factor(finer, record.ch_axis, x.dim())
        multiplier = step if coarser is None else step * ops.channel_factor(coarser, record.ch_axis, x.dim())
        codes = torch.clamp(round_ste(x.float() / divisor) + zero_point, 0, 2**record.bits - 1)
        return ((codes - zero_point) * multiplier).to(x.dtype)

    def state(self) -> dict[str, Tensor]:
        """Statistics of the pass under way, and whether ranges are frozen: [rows, ...] by path."""
        tensors = {f"range/{key}": value for key, value in self.ranges.state().items()}
        tensors["frozen"] = torch.tensor(self.decided is not None)
        if self.vote is not None:
            tensors |= {f"vote/{key}": value for key, value in self.vote.state().items()}
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned, [rows, ...] by path."""
        self.start_ranges()
        parts = {
            kind: {k.removeprefix(kind): v for k, v in state.items() if k.startswith(kind)}
            for kind in ("range/", "vote/")
        }
        self.ranges.load_state(parts["range/"])
        if state["frozen"]:
            self.start_votes()
        if self.vote is not None:
            self.vote.load_state(parts["vote/"])

    def restore(self, record: ActivationRecord) -> None:
        """Take a record as decided, from a file or from ``record``."""
        self.decided, self.vote = record, None

    def _from_ranges(self) -> ActivationRecord:
        if self.config.ranges is Ranges.DYNAMIC:
            scale, zero_point = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
        elif not self.ranges.rows:
            raise MissingStatistics(
                f"{self.layer}: its input was never observed; run calibrate(prepared, samples) before convert"
            )
        else:
            scale, zero_point = self.ranges.qparams(self.config.bits, self.config.float8)
        return ActivationRecord(
            self.config.bits,
            self.ch_axis,
            self.config.ranges,
            scale,
            zero_point,
            self.ranges.timesteps(),
            channel_scale=self.channel_scale,
            float8=self.config.float8,
        )

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``scale`` [rows] and ``zero_point`` [rows], as torchao observers give them."""
        record = self.record()
        return record.scale, record.zero_point

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace this observer's node by quantize and dequantize nodes; torchao's convert calls it."""
        record = self.record()
        source = node.args[0]
        assert isinstance(source, Node)
        with model.graph.inserting_before(node):
            scale, zero_point = self._emit_qparams(model, node, source, record)
            finer = self._emit_step(model, node, "quantize_step", record.quantize_step, record)
            step = finer
            if record.channel_scale is not None:
                step = self._emit_step(model, node, "dequantize_step", record.channel_step, record)
            codes = model.graph.call_function(*_quantize_call(record, source, scale, zero_point, finer))
            dtype = source.meta["val"].dtype
            real = model.graph.call_function(ops.dequantize, (codes, scale, zero_point, step, record.ch_axis, dtype))
        node.replace_all_uses_with(real)
        model.graph.erase_node(node)

    def _emit_step(
        self, model: GraphModule, node: Node, name: str, step: Tensor | None, record: ActivationRecord
    ) -> Node | None:
        if step is None:
            return None
        read = graph.add_record_tensor(model, self.layer, name, step)
        if step.dim() == 1:
            return read
        assert isinstance(node.args[1], Node)
        assert record.timesteps is not None
        rows = _row_node(model, node.args[1], self.layer, record.timesteps)
        return model.graph.call_function(graph.aten.index_select.default, (read, 0, rows))

    def _emit_qparams(
        self, model: GraphModule, node: Node, source: Node, record: ActivationRecord
    ) -> tuple[Node, Node]:
        call = model.graph.call_function
        if record.ranges is Ranges.DYNAMIC:
            if record.channel_scale is not None:
                divisor = numerics.along(record.channel_scale, record.ch_axis, source.meta["val"].dim())
                divisor_node = graph.add_record_tensor(model, self.layer, "channel_scale", divisor)
                source = call(graph.aten.div.Tensor, (source, divisor_node))
            both = call(ops.dynamic_qparams, (source, record.bits))
            return call(operator.getitem, (both, 0)), call(operator.getitem, (both, 1))
        scale = graph.add_record_tensor(model, self.layer, "input_scale", record.scale)
        zero_point = graph.add_record_tensor(model, self.layer, "input_zero_point", record.zero_point)
        if record.timesteps is None:
            return scale, zero_point
        timestep = node.args[1]
        assert isinstance(timestep, Node)
        rows = _row_node(model, timestep, self.layer, record.timesteps)
        select = torch.ops.aten.index_select.default
        return call(select, (scale, 0, rows)), call(select, (zero_point, 0, rows))


class _Inside(torch.autograd.Function):
    """``values`` in place of ``x``; the gradient passes where ``inside``, over ``divisor``. Keeps a byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, inside: Tensor, divisor: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside, divisor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inside, divisor = ctx.saved_tensors
        gradient = gradients[0] * inside
        return gradient if divisor is None else gradient / divisor, None, None, None


def _quantize_call(
    record: ActivationRecord, x: Any, scale: Any, zero_point: Any, step: Any
) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """The operator that makes an input's codes, and its arguments: tensors, or the nodes that stand for them."""
    if record.float8:
        return ops.quantize_float8, (x, scale, step, record.ch_axis)
    return ops.quantize, (x, scale, zero_point, step, record.ch_axis, 0, 2**record.bits - 1)


def _over_scale(x: Tensor, channel_scale: Tensor | None, ch_axis: int) -> Tensor:
    return x if channel_scale is None else x / numerics.along(channel_scale.to(x.device), ch_axis, x.dim())


def _row_node(model: GraphModule, timestep: Node, layer: str, timesteps: Tensor) -> Node:
    """The look-up of table rows by timestep, one node for all layers that share the table's timesteps."""
    for user in timestep.users:
        if user.target != ops.row:
            continue
        others = graph.attribute(model, user.args[1])  # type: ignore[arg-type]
        if torch.equal(others, timesteps.to(others.device)):
            return user
    with model.graph.inserting_after(timestep):
        table = graph.add_record_tensor(model, layer, "timesteps", timesteps)
    with model.graph.inserting_after(table):
        return model.graph.call_function(ops.row, (timestep, table))
