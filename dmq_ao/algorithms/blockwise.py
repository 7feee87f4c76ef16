"""What one block learns: all its roundings and activation steps together (EDA-DM, arXiv 2401.04585; BRECQ, QDrop).

One forward pass of the quantized block gives its output and those of the layers inside; the loss is the fine-grained
error against the float block on float inputs. A part of the samples is held out and decides, with hard codes, whether
anything is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph, numerics
from dmq_ao.algorithms.blocks import Block, run_block
from dmq_ao.algorithms.holdout import CHECK_EVERY, fitted
from dmq_ao.algorithms.row_layout import Layout, RowLayout, SharedValue, is_known
from dmq_ao.algorithms.units import BlockLearning
from dmq_ao.config import BlockReconstruction, Ranges
from dmq_ao.objectives import Compared, StepWeighting, fine_grained_error, rounding_regularizer, temperature
from dmq_ao.observers.adaround import hard_codes, initial_logits, soft_codes, soft_round
from dmq_ao.quantizer.prepared import attention_observers, float_bias, observers, scaled_weight
from dmq_ao.records import WeightRecord

# A weight starts no closer to a rounding border than this, in steps: its nearest code is the one decided.
_NEAREST = 0.49
BlockInputs = Mapping[Node, Any]


@dataclass(frozen=True, eq=False)
class BlockData:
    """What a block is shown.

    Attributes:
        student: values of the block's inputs in the network as quantized so far, for chosen samples [M], ascending.
        teacher: likewise in the float network.
        layouts: whose the rows of the block's outputs and inner outputs are.
        step: [N] place of each sample on the sampler's list of steps.
        steps: length of that list.
        holdout: [N] bool, samples that nothing is fitted to.
    """

    student: Callable[[Tensor], dict[Node, Any]]
    teacher: Callable[[Tensor], dict[Node, Any]]
    layouts: Mapping[Node, Layout | SharedValue]
    step: Tensor
    steps: int
    holdout: Tensor


class _Weight:
    """Learned rounding of one weight, on the grid that was decided; starts at the codes that were decided."""

    def __init__(self, weight: Tensor, record: WeightRecord) -> None:
        self.record = record
        groups = record.scale.shape[1]
        scale, zero_point = (
            t.repeat_interleave(weight[0].numel() // groups, 1).float() for t in (record.scale, record.zero_point)
        )
        codes = record.codes.flatten(1).float()
        away = (weight.flatten(1) / scale + zero_point - codes).clamp(-_NEAREST, _NEAREST)
        self.weight = (codes + away - zero_point) * scale
        self.grid = (scale, zero_point, record.bits, record.symmetric)
        self.logits = initial_logits(self.weight, scale).requires_grad_()

    def soft(self) -> Tensor:
        scale, zero_point = self.grid[:2]
        codes = soft_codes(self.weight, self.logits, *self.grid)
        return numerics.dequantize_affine(codes, scale, zero_point).reshape(self.record.codes.shape)

    def hard(self) -> WeightRecord:
        codes = hard_codes(self.weight, self.logits.detach(), *self.grid)
        return replace(self.record, codes=codes.reshape(self.record.codes.shape).to(self.record.codes.dtype))


class BlockStudent:
    """A quantized block whose roundings and activation steps are free.

    Attributes:
        logits: by layer, in the shape of its flattened weight.
        log_factors: by the layer that an observer is named after, [rows]: logarithm of what its steps are times.
    """

    def __init__(self, prepared: GraphModule, block: Block, config: BlockReconstruction) -> None:
        """Free parameters start where calibration left them. Observers of layers before the block are not touched."""
        self.prepared, self.block, self.config = prepared, block, config
        nodes, watchers = graph.layer_nodes(prepared), observers(prepared)
        owners: dict[int, str] = {}
        for name, (_, activation) in watchers.items():
            owners.setdefault(id(activation), name)
        self.names = {nodes[name]: name for name in block.layers}
        self.watchers = {name: watchers[name][1] for name in block.layers}
        self._attention = attention_observers(prepared)
        self.bias = {}
        self._weights = {}
        self.log_factors: dict[str, Tensor] = {}
        self._factor_of: dict[str, Tensor] = {}
        for name in block.layers:
            weight, activation = watchers[name]
            assert weight.decided is not None
            self.bias[name] = float_bias(prepared, nodes[name]) if weight.bias is None else weight.bias
            self._weights[name] = _Weight(scaled_weight(prepared, nodes[name], activation), weight.decided)
            if activation is None or activation.config.ranges is Ranges.DYNAMIC or not config.lr_activation:
                continue
            owner = owners[id(activation)]
            if owner in block.layers:
                factor = torch.zeros_like(activation.record().scale, device=self._weights[name].weight.device)
                factor = self.log_factors.setdefault(owner, factor.requires_grad_())
                self._factor_of[name] = factor
        self.logits = {name: one.logits for name, one in self._weights.items()}

    def run(self, inputs: BlockInputs, generator: torch.Generator | None = None) -> dict[Node, Tensor]:
        """Outputs and inner outputs, [B, ...] each, with soft roundings.

        ``generator`` draws the elements of layers' inputs that stay in float.
        """
        return self._run(inputs, lambda name: self._weights[name].soft(), generator)

    def predict(self, inputs: BlockInputs, weights: Mapping[str, WeightRecord]) -> dict[Node, Tensor]:
        """Outputs and inner outputs, [B, ...] each, with the codes ``weights`` and activation steps as they stand."""
        return self._run(inputs, lambda name: weights[name].dequantize(), None)

    def _run(
        self, inputs: BlockInputs, weight_of: Callable[[str], Tensor], generator: torch.Generator | None
    ) -> dict[Node, Tensor]:
        def layer(node: Node, args: list[Any], block_inputs: BlockInputs) -> Any:
            if node in self._attention:
                return self._dropped(args[0], self._attention[node].simulate(args[0]), generator)
            name = self.names[node]
            x = self._input(name, node, args[0], block_inputs, generator)
            bias = self.bias[name]
            values = weight_of(name).to(args[1])
            return node.target(x, values, None if bias is None else bias.to(values), *args[3:])  # type: ignore[operator]

        return run_block(self.prepared, self.block, inputs, layer, _compared(self.block))

    def _input(
        self, name: str, node: Node, x: Tensor, block_inputs: BlockInputs, generator: torch.Generator | None
    ) -> Tensor:
        activation = self.watchers[name]
        if activation is None:
            return x
        timestep = _timestep(node, block_inputs)
        factor = self._factor_of.get(name)
        if factor is None:
            values = activation.straight_through(x, timestep)
        else:
            values = activation.adjustable(x, timestep, factor.exp())
        return self._dropped(activation.scaled(x), values, generator)

    def _dropped(self, x: Tensor, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """QDrop: a share of the elements stays in float while there is a generator to draw them."""
        if generator is None or not self.config.drop:
            return values
        dropped = torch.rand(x.shape, generator=generator).to(x.device) < self.config.drop
        return torch.where(dropped, x.to(values), values)

    def hard(self) -> dict[str, WeightRecord]:
        """The codes that the roundings stand for."""
        return {name: one.hard() for name, one in self._weights.items()}


def _timestep(node: Node, block_inputs: BlockInputs) -> Tensor | None:
    """What the observer of a layer's input is given beside it."""
    source = node.args[0]
    assert isinstance(source, Node)
    extra = source.args[1] if source.op == "call_module" and len(source.args) > 1 else None
    return block_inputs[extra] if isinstance(extra, Node) else None


def _compared(block: Block) -> list[Node]:
    """Outputs and inner outputs of a block, each once."""
    return list(dict.fromkeys(node for node, _ in (*block.outputs, *block.inner)))


def teacher_of(prepared: GraphModule, block: Block, inputs: BlockInputs) -> dict[Node, Tensor]:
    """Outputs and inner outputs of the float block, [B, ...] each; without gradient."""

    def layer(node: Node, args: list[Any], _inputs: BlockInputs) -> Any:
        return args[0] if node.op == "call_module" else node.target(*args)  # type: ignore[operator]

    with torch.no_grad():
        return run_block(prepared, block, inputs, layer, _compared(block))


def layouts_of(block: Block, layouts: Mapping[Node, RowLayout]) -> dict[Node, Layout | SharedValue] | None:
    """Whose the rows of a block's outputs and inner outputs are; None where some value cannot be had by sample."""
    if not all(is_known(layouts[node]) for node in block.inputs):
        return None
    compared = {}
    for node, ch_axis in (*block.outputs, *block.inner):
        layout = layouts[node]
        if not isinstance(layout, (Layout, SharedValue)) or (isinstance(layout, Layout) and layout.axis == ch_axis):
            return None
        compared[node] = layout
    return compared


def block_error(
    block: Block,
    student: Mapping[Node, Tensor],
    teacher: Mapping[Node, Tensor],
    layer_weight: float,
    layouts: Mapping[Node, Layout | SharedValue],
    count: int,
) -> Tensor:
    """Fine-grained error [count] of a block, one number a sample.

    Args:
        block: whose values are compared.
        student: by node, gradients flow.
        teacher: the same nodes; no gradient.
        layer_weight: of the inner outputs.
        layouts: whose the values' rows are.
        count: samples that the values are of.
    """

    def compared(node: Node, ch_axis: int) -> Compared:
        output, target = (layouts[node].by_sample(values[node].float(), count) for values in (student, teacher))
        axis = layouts[node].channel(ch_axis)
        if output.shape[1] == 1:  # fewer axes, and sums in the order that they always had
            return Compared(output.flatten(0, 1), target.flatten(0, 1), axis)
        return Compared(output, target, axis + 1)

    outputs, inner = ([compared(node, axis) for node, axis in nodes] for nodes in (block.outputs, block.inner))
    return fine_grained_error(outputs, inner, layer_weight)


def learn_block(
    prepared: GraphModule, block: Block, data: BlockData, config: BlockReconstruction, generator: torch.Generator
) -> tuple[BlockLearning, dict[str, WeightRecord], dict[str, Tensor]]:
    """Learn a block.

    Args:
        prepared: the graph; nothing of it is changed.
        block: whose layers have been decided.
        data: its samples.
        config: of the learning.
        generator: draws batches and dropped elements.

    Returns:
        What came of it; the codes by layer, and the factors [rows] of the activation steps by the layer that their
        observer is named after: both empty where what was there is no worse on held-out samples.
    """
    student = BlockStudent(prepared, block, config)
    logits, factors = list(student.logits.values()), list(student.log_factors.values())
    groups = [{"params": logits, "lr": config.lr}]
    if factors:
        groups.append({"params": factors, "lr": config.lr_activation})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps)
    weighting = StepWeighting(config.step_weights, data.steps)
    fit = fitted(data.holdout)
    before = best = _held_out_error(student, data, student.hard())
    best_codes: dict[str, WeightRecord] = {}
    best_factors: dict[str, Tensor] = {}
    patience, step = config.patience, 0
    for step in range(1, config.steps + 1):
        batch = fit[torch.randperm(len(fit), generator=generator)[: config.batch_size]].sort().values
        teacher_inputs = data.teacher(batch)
        teacher = teacher_of(prepared, block, teacher_inputs)
        inputs = _mixed(data.student(batch), teacher_inputs, config.mix, generator)
        outputs = student.run(inputs, generator)
        error = block_error(block, outputs, teacher, config.layer_weight, data.layouts, len(batch))
        loss = (weighting(error, data.step[batch]) * error).mean()
        if config.regularizer and step > config.warmup * config.steps:
            beta = temperature(step, config.steps, config.warmup)
            loss = loss + config.regularizer * sum(rounding_regularizer(soft_round(one), beta) for one in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0 or step == config.steps:
            codes = student.hard()
            now = _held_out_error(student, data, codes)
            patience = config.patience if now < best else patience - 1
            if now < best:
                best, best_codes = now, codes
                best_factors = {name: one.detach().exp() for name, one in student.log_factors.items()}
            if patience == 0:
                break
    return BlockLearning(before, best, step), best_codes, best_factors


def _mixed(student: BlockInputs, teacher: BlockInputs, share: float, generator: torch.Generator) -> dict[Node, Any]:
    """The student's inputs with a ``share`` of their elements from the teacher's, wherever the two differ."""
    mixed = dict(student)
    for node, value in student.items():
        other = teacher[node]
        if not share or not isinstance(value, Tensor) or not value.is_floating_point() or torch.equal(value, other):
            continue
        floats = torch.rand(value.shape, generator=generator).to(value.device) < share
        mixed[node] = torch.where(floats, other, value)
    return mixed


def _held_out_error(student: BlockStudent, data: BlockData, weights: Mapping[str, WeightRecord]) -> float:
    """Mean error of the block's output relative to the teacher's; hard codes, nothing dropped or mixed."""
    block, errors = student.block, []
    with torch.no_grad():
        for batch in torch.nonzero(data.holdout)[:, 0].split(student.config.batch_size):
            teacher = teacher_of(student.prepared, block, data.teacher(batch))
            outputs = student.predict(data.student(batch), weights)
            nothing = {node: torch.zeros_like(value) for node, value in teacher.items()}
            error, size = (
                block_error(block, values, teacher, 0.0, data.layouts, len(batch)) for values in (outputs, nothing)
            )
            errors.append(error / size.clamp_min(1e-20))
    mean = float(torch.cat(errors).mean())
    return mean if math.isfinite(mean) else math.inf
