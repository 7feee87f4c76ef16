"""A calibration set as the arguments of a graph: what has a row for each sample, and what all samples share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph import size_rules
from dmq_ao.samples.calibration_set import CalibrationSet
from dmq_ao.samples.values import take


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples as a graph takes them.

    Attributes:
        rows: [b] int64, numbers of the samples.
        arguments: tensors in the graph's order, on its device.
        timestep: [b] of these, None where the graph takes none.
    """

    rows: Tensor
    arguments: list[Tensor]
    timestep: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class GraphSamples:
    """Samples for one graph.

    Attributes:
        samples: where they are from.
        names: of the graph's arguments, in its order.
        per_sample: [N, ...] each, the arguments with a row for each sample, by name.
        shared: the others, which all samples share.
        timestep: name of the timestep among the arguments; None for a graph without.
        device: where the graph is.
        rules: conditions on sizes that the graph relies on.
    """

    samples: CalibrationSet
    names: tuple[str, ...]
    per_sample: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    timestep: str | None
    device: torch.device
    rules: tuple[str, ...] = ()

    @classmethod
    def of(cls, gm: GraphModule, samples: CalibrationSet) -> GraphSamples:
        """The arguments of ``gm`` out of a calibration set.

        Raises:
            ValueError: when the samples lack an argument that the graph takes, or hold None for one; when they have
                axes or sizes that the graph does not take.
        """
        signature = graph.signature_of(gm)
        rows = {**samples.inputs, samples.timestep_arg: samples.timestep}
        missing = [name for name in signature.names if name not in rows and samples.shared.get(name) is None]
        if missing:
            raise ValueError(
                f"the samples lack {missing}, which the prepared denoiser takes; they hold"
                f" {sorted([*rows, *samples.shared])}"
            )
        shared = {name: torch.as_tensor(samples.shared[name]) for name in signature.names if name not in rows}
        whole = cls(
            samples,
            signature.names,
            {name: rows[name] for name in signature.names if name in rows},
            {name: value.to(graph.device_of(gm)) for name, value in shared.items()},
            signature.timestep,
            graph.device_of(gm),
            signature.rules,
        )
        _check_sizes(whole, signature)
        return whole

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def step(self) -> Tensor:
        """[N] int64, place of each sample on the sampler's list of steps."""
        return self.samples.step

    @property
    def timesteps(self) -> Tensor:
        """[S], that list."""
        return self.samples.timesteps

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the arguments of a batch of ``count`` samples."""
        shapes = {name: (count, *x.shape[1:]) for name, x in self.per_sample.items()}
        return shapes | {name: tuple(x.shape) for name, x in self.shared.items()}

    def broken_rule(self, count: int) -> str | None:
        """The first of the rules that a batch of ``count`` samples breaks; None where all hold."""
        return size_rules.broken(self.rules, self.shapes(count))

    def check_batches(self, batch_size: int) -> None:
        """Refuse batches of at most ``batch_size`` samples that the graph does not take.

        Raises:
            ValueError: with the rule that one of them breaks.
        """
        for count in dict.fromkeys([min(batch_size, len(self)), len(self) % batch_size or batch_size]):
            rule = self.broken_rule(count)
            if rule is not None:
                raise ValueError(
                    f"{fixed_rows_text(rule)}. {len(self)} samples in batches of {batch_size} make one of {count};"
                    " batch_size and a number of samples that fit would do too"
                )

    def batch(self, rows: Tensor) -> Batch:
        """The samples with the numbers ``rows`` [b], in that order; a number may come twice."""
        arguments = [
            take(self.per_sample[name], rows).to(self.device) if name in self.per_sample else self.shared[name]
            for name in self.names
        ]
        return Batch(rows, arguments, None if self.timestep is None else arguments[self.names.index(self.timestep)])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order; the last batch may be smaller."""
        return (self.batch(rows) for rows in torch.arange(len(self), device="cpu").split(batch_size))

    def whole(self) -> Batch:
        """All samples at once."""
        return self.batch(torch.arange(len(self), device="cpu"))

    def select(self, rows: Tensor) -> GraphSamples:
        """The samples at ``rows`` [M], in that order.

        Raises:
            ValueError: for no rows, or one that is not there.
        """
        samples = self.samples.select(rows)
        per_sample = {name: take(value, rows) for name, value in self.per_sample.items()}
        return GraphSamples(samples, self.names, per_sample, self.shared, self.timestep, self.device, self.rules)

    def spread(self, count: int) -> GraphSamples:
        """``count`` samples, or all, at steps spread over the schedule, from the first to the last."""
        return self.select(_spread_over_steps(self.samples, count))

    def earlier(self, window: int) -> Tensor:
        """[N, window - 1] the samples before each in its trajectory, see ``CalibrationSet.earlier``.

        Raises:
            ValueError: for a ``window`` below 1, or where no sample has all of them.
        """
        return self.samples.earlier(window)


def _check_sizes(samples: GraphSamples, signature: graph.Signature) -> None:
    """Refuse samples of another model, of other sizes, or in a number that the graph does not take."""
    if not signature.example:  # of a graph that torchao prepared alone, which has no rules either
        return
    example = {name: shape for name, (shape, _) in signature.example.items()}
    rows = example[signature.batch][0]
    shapes = samples.shapes(rows)
    for name, shape in shapes.items():
        if name != signature.timestep and len(shape) != len(example[name]):
            raise ValueError(
                f"the samples are of another model: {name} is {shape} there, {example[name]} in the prepared denoiser;"
                " record from the model that was prepared"
            )
    if rule := samples.broken_rule(rows):
        refusal = size_rules.refusal_text(rule, shapes, example)
        raise ValueError(f"the samples' {refusal}, or record from the model that was prepared")
    if rule := samples.broken_rule(2):
        raise ValueError(fixed_rows_text(rule))


def fixed_rows_text(rule: str) -> str:
    """What to say where a graph takes some numbers of samples alone, by a rule that others break."""
    return (
        f"the denoiser was captured for some numbers of samples alone: {rule}. Prepare it with another number,"
        " example_inputs=samples.example(4); where its code makes a Python number of a batch's size, as"
        " int(x.shape[0]) or range(len(x)) do, let it do without"
    )


def _spread_over_steps(samples: CalibrationSet, count: int) -> Tensor:
    """Indices [M] of ``count`` samples, or all, at steps spread over the schedule, from the first to the last."""
    order = torch.argsort(samples.step, stable=True)
    places = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()
    return order[places]
