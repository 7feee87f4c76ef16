"""The last stage, over the whole denoiser: what stays in float learns to make up for the codes.

Learned are the weights' scales, biases, norms, embeddings and layers kept in float: a few numbers, so a few samples
are enough; the loss is the error of the denoiser's output, so errors that layers hand on to each other cancel. Codes
may move too, by low-rank updates, and features count beside the output, over windows of a trajectory (MPQ-DM). None of
it costs anything at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph
from dmq_ao.algorithms.dequantized_codes import DequantizedCodes
from dmq_ao.algorithms.holdout import fitted
from dmq_ao.algorithms.low_rank import LowRankCodes
from dmq_ao.algorithms.relations import Relations, Watched
from dmq_ao.algorithms.row_layout import Layout, RowLayout
from dmq_ao.algorithms.teacher_outputs import TeacherOutputs
from dmq_ao.config import Distillation
from dmq_ao.objectives import relative_error
from dmq_ao.quantizer.prepared import attention_observers, float_bias, observers, scaled_weight, state_of, tables
from dmq_ao.records import with_positive_scale
from dmq_ao.samples.graph_samples import GraphSamples
from dmq_ao.serialization.checkpoint import Checkpoint

WARMUP_STEPS = 10
SAVE_EVERY = 10
_ADAM = ("exp_avg", "exp_avg_sq", "step")
CHECK_BATCH = 4
# A tensor of zeros would never move by steps in proportion to its size.
SMALLEST_SIZE = 1e-3


@dataclass(frozen=True)
class DistillationReport:
    """What distillation did.

    Attributes:
        before: held-out error of the denoiser's output, relative.
        after: the same at the end.
        steps: gradient steps taken.
        note: why there were none; empty where there were.
    """

    before: float
    after: float
    steps: int
    note: str = ""


class Student(Interpreter):
    """The quantized denoiser with its float numbers as free parameters.

    ``parameters`` holds ``<layer>|scale`` [out, groups], ``<layer>|bias`` [out], ``<layer>|up`` [out, rank] and
    ``<layer>|down`` [rank, K] of codes that move, and ``float|<target>`` for tensors of the graph itself, all float32.
    """

    def __init__(self, prepared: GraphModule, rank: int = 0, seed: int = 0) -> None:
        """Parameters start where calibration left them.

        Args:
            prepared: calibrated.
            rank: of the updates of the weights' codes; 0 fixes them.
            seed: of the updates' second factors.
        """
        super().__init__(prepared)
        self.prepared = prepared
        self.watchers, self.attention = observers(prepared), attention_observers(prepared)
        nodes = graph.layer_nodes(prepared)
        self.names = {nodes[name]: name for name in self.watchers}
        self.tables = {graph.weight_of(nodes[name]): table for name, table in tables(prepared).items()}
        signature = graph.signature_of(prepared)
        self.timestep = graph.placeholders(prepared).get(signature.timestep or "")
        # The timestep is read by every per-step range, at any place in the graph.
        self.garbage_collect_values = False
        self.parameters: dict[str, Tensor] = {}
        self.low_rank: dict[str, LowRankCodes] = {}
        generator = torch.Generator().manual_seed(seed)
        own = set()
        for node, name in self.names.items():
            weight, activation = self.watchers[name]
            assert weight.decided is not None
            self.parameters[f"{name}|scale"] = weight.decided.scale.clone()
            if rank:
                self.low_rank[name] = LowRankCodes(scaled_weight(prepared, node, activation), weight.decided)
                up, down = self.low_rank[name].factors(rank, generator)
                self.parameters |= {f"{name}|up": up, f"{name}|down": down}
            bias = float_bias(prepared, node) if weight.bias is None else weight.bias
            if bias is not None:
                self.parameters[f"{name}|bias"] = bias.float().clone()
            own |= {arg for arg in node.all_input_nodes if arg.op == "get_attr"}
            own |= {source for arg in node.all_input_nodes for source in arg.all_input_nodes if arg is node.args[1]}
        for node in prepared.graph.nodes:
            if node.op == "get_attr" and node not in own:
                tensor = graph.attribute(prepared, node)
                if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
                    self.parameters[f"float|{node.target}"] = tensor.detach().float().clone()
        self.sizes = {k: max(float(p.square().mean().sqrt()), SMALLEST_SIZE) for k, p in self.parameters.items()}
        self.sizes |= {f"{name}|up": 1.0 for name in self.low_rank}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def run_node(self, n: Node) -> Any:
        """One node; quantized layers and float parameters are ours."""
        if n in self.attention:
            return self.attention[n].simulate(self.env[n.args[0]])  # type: ignore[index]
        if n in self.tables:
            table: Tensor = self.env[n.args[0]]  # type: ignore[index]
            return table + (self.tables[n].round(table).dequantize().to(table) - table).detach()
        if n.op == "call_module":  # an observer
            return self.env[n.args[0]]  # type: ignore[index]
        if n.op == "get_attr" and f"float|{n.target}" in self.parameters:
            return self.parameters[f"float|{n.target}"].to(graph.attribute(self.prepared, n).dtype)
        if n not in self.names:
            return super().run_node(n)
        name = self.names[n]
        activation = self.watchers[name][1]
        args, _ = self.fetch_args_kwargs_from_env(n)
        x: Tensor = args[0]
        if activation is not None:
            x = activation.straight_through(x, None if self.timestep is None else self.env[self.timestep])
        values = self._weight(name)
        bias = self.parameters.get(f"{name}|bias")
        return n.target(  # type: ignore[operator]
            x, values.to(x.dtype), None if bias is None else bias.to(x.dtype), *args[3:]
        )

    def _weight(self, name: str) -> Tensor:
        """A quantized layer's float32 weight [out, ...]."""
        scale, record = self.parameters[f"{name}|scale"], self.watchers[name][0].decided
        assert record is not None
        if name in self.low_rank:
            return self.low_rank[name].values(scale, self.parameters[f"{name}|up"], self.parameters[f"{name}|down"])
        values: Tensor = DequantizedCodes.apply(scale, record.codes, record.zero_point)  # type: ignore[no-untyped-call]
        return values

    def predict(self, arguments: list[Tensor]) -> Tensor:
        """The denoiser's first output [B, ...]."""
        result = self.run(*arguments)
        self.env.clear()
        return graph.first_tensor(result)

    def predict_with(self, arguments: list[Tensor], node: Node) -> tuple[Tensor, Tensor]:
        """The denoiser's first output [B, ...] and, in float32, the value of a node on the way."""
        result = self.run(*arguments)
        features = self.env[node].float()
        self.env.clear()
        return graph.first_tensor(result), features

    def settle(self, parameters: dict[str, Tensor]) -> None:
        """Put ``parameters`` [...], named as the student's, where ``convert`` finds them: records, tuned tensors."""
        tuned = {}
        for key, parameter in parameters.items():
            name, _, what = key.rpartition("|")
            if name == "float":
                tuned[what] = parameter.detach().to(graph.attribute_at(self.prepared, what).dtype)
            elif what == "scale":
                weight, _ = self.watchers[name]
                record = weight.decided
                assert record is not None
                if name in self.low_rank:
                    record = self.low_rank[name].merged(parameters[f"{name}|up"], parameters[f"{name}|down"])
                bias = parameters.get(f"{name}|bias")
                settled = with_positive_scale(replace(record, scale=parameter.detach().clone()))
                weight.restore(settled, None if bias is None else bias.detach().clone())
        state_of(self.prepared).tuned = tuned


def distill(
    prepared: GraphModule,
    samples: GraphSamples,
    config: Distillation,
    holdout: Tensor,
    *,
    layout: RowLayout,
    batch_size: int,
    watched: Watched | None,
    seed: int,
    checkpoint: Checkpoint,
    bar: tqdm[Any],
) -> DistillationReport:
    """Learn, keep the best state by held-out samples, and settle it; the start is kept when nothing is better.

    Args:
        prepared: calibrated; its records are changed in place.
        samples: to learn from.
        config: of the stage.
        holdout: [N] bool, samples that nothing is fitted to.
        layout: whose the rows of the denoiser's output are; where they cannot be told apart, nothing is learned.
        batch_size: samples per forward pass of the teacher.
        watched: windows and features, where ``config`` has a relation.
        seed: of the order of samples, and of the low-rank updates.
        checkpoint: where the state is saved every few steps.
        bar: one tick a step.
    """
    if not isinstance(layout, Layout):
        return _left_out(prepared, samples, batch_size)
    data = TeacherOutputs(prepared, samples, layout, batch_size)
    student = Student(prepared, config.rank, seed)
    relations = None if watched is None else Relations(prepared, watched, samples, holdout, batch_size)
    run = _Run(student, data, relations, config, holdout, seed)
    bar.reset(run.total)
    saved = checkpoint.load("distillation", "a state of distillation")
    if saved is not None:
        run.restore(*saved)
        bar.update(run.step)
    else:
        run.best = run.before = run.check()
    every = max(1, run.total // config.checks)
    while run.step < run.total:
        loss = run.advance()
        if run.step % every == 0 or run.step == run.total:
            run.keep_if_better()
        if run.step % SAVE_EVERY == 0 or run.step == run.total:
            checkpoint.save("distillation", *run.state())
        bar.set_postfix(loss=f"{loss:.4f}", held_out=f"{run.best:.4f}")
        bar.update(1)
    student.settle(run.best_parameters)
    return DistillationReport(run.before, run.best, run.step)


def _left_out(prepared: GraphModule, samples: GraphSamples, batch_size: int) -> DistillationReport:
    """The report where samples meet in the output: the error of whole batches, and that nothing was learned."""
    student, errors = Student(prepared), []
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            target = graph.first_tensor(prepared(*batch.arguments)).float()
            errors.append(float(relative_error(student.predict(batch.arguments).float()[None], target[None])))
    error = sum(errors) / len(errors)
    return DistillationReport(error, error, 0, "the rows of the denoiser's output cannot be told apart by sample")


class _Run:
    """Parameters, optimizer and the best state so far."""

    def __init__(
        self,
        student: Student,
        data: TeacherOutputs,
        relations: Relations | None,
        config: Distillation,
        holdout: Tensor,
        seed: int,
    ) -> None:
        self.student, self.data, self.relations = student, data, relations
        self.config, self.seed = config, seed
        self.holdout, self.fit = torch.nonzero(holdout)[:, 0], fitted(holdout)
        self.total = config.steps_of(len(self.fit))
        parameters = student.parameters
        self.optimizer = torch.optim.Adam([{"params": [p], "lr": self._lr(name)} for name, p in parameters.items()])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate())
        self.best_parameters = {name: p.detach().clone() for name, p in parameters.items()}
        self.step, self.before, self.best = 0, math.inf, math.inf

    def _lr(self, name: str) -> float:
        factor = name.rpartition("|")[2] in ("up", "down")
        return (self.config.lr_rank if factor else self.config.lr) * self.student.sizes[name]

    def _rate(self) -> Callable[[int], float]:
        total = self.total
        return lambda step: 0.5 * (1 + math.cos(math.pi * step / total)) * min(1.0, (step + 1) / WARMUP_STEPS)

    def error(self, batch: Tensor) -> Tensor:
        """Relative error [B] of the outputs of the samples numbered ``batch`` [B]."""
        output = self.student.predict(self.data.arguments(batch))
        return relative_error(self.data.by_sample(output), self.data.targets[batch])

    def loss(self, batch: Tensor) -> Tensor:
        """What is minimised [B], of the samples numbered ``batch`` [B]: the error, and that of relations if any."""
        relations = self.relations
        if relations is None:
            return self.error(batch)
        output, features = self.student.predict_with(self.data.arguments(batch), relations.node)
        error = relative_error(self.data.by_sample(output), self.data.targets[batch])
        return error + relations.error(batch, features, self._features)

    def _features(self, batch: Tensor) -> Tensor:
        assert self.relations is not None
        return self.student.predict_with(self.data.arguments(batch), self.relations.node)[1]

    def check(self) -> float:
        """Mean error of the held-out samples."""
        with torch.no_grad():
            return float(torch.cat([self.error(part) for part in self.holdout.split(CHECK_BATCH)]).mean())

    def advance(self) -> float:
        """One gradient step."""
        loss = self.loss(self._batch()).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def _batch(self) -> Tensor:
        """Samples of this step: every epoch is a permutation drawn from the seed and the epoch's number alone."""
        size = min(self.config.batch_size, len(self.fit))
        per_epoch = len(self.fit) // size
        epoch, place = divmod(self.step, per_epoch)
        order = torch.randperm(len(self.fit), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return self.fit[order[place * size : (place + 1) * size]]

    def keep_if_better(self) -> None:
        """Remember the parameters when held-out samples say so."""
        error = self.check()
        if error < self.best:
            self.best = error
            self.best_parameters = {name: p.detach().clone() for name, p in self.student.parameters.items()}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything the rest of the run depends on, as JSON and tensors."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.student.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"now/{name}": parameter.detach(), f"kept/{name}": self.best_parameters[name]}
            # Without a gradient (a layer whose output only chooses rows) Adam has no state.
            tensors |= {f"{key}/{name}": state[key] for key in _ADAM if key in state}
        return {"step": self.step, "before": self.before, "best": self.best}, tensors

    def restore(self, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a ``state``."""
        self.before, self.best = meta["before"], meta["best"]
        for name, parameter in self.student.parameters.items():
            parameter.data = tensors[f"now/{name}"].to(parameter.device)
            self.best_parameters[name] = tensors[f"kept/{name}"].to(parameter.device)
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                for key in _ADAM
                if f"{key}/{name}" in tensors
            }
        self.schedule.load_state_dict({**self.schedule.state_dict(), "last_epoch": meta["step"]})
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = rate * self._rate()(meta["step"])
        self.step = meta["step"]
