"""Layers that are decided together, and what was decided of them on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph.roles import whole_name
from dmq_ao.observers import VoteReport
from dmq_ao.quantizer.prepared import observers, readers, state_of
from dmq_ao.records import LayerRecord, on_device
from dmq_ao.serialization.checkpoint import Checkpoint
from dmq_ao.serialization.layers import layer_configs, layer_records, layer_tensors


@dataclass(frozen=True)
class LayerLearning:
    """What one layer learned.

    Attributes:
        scale_gain: held-out error with learned channel scales over that without, 1 where they were not kept; None
            where none were asked for.
        scale_steps: gradient steps taken for them.
        nearest_error: held-out error of nearest rounding, relative to the output.
        rounded_error: of the codes that were kept.
        note: what was not learned, and why; empty where nothing was left out.
    """

    scale_gain: float | None
    scale_steps: int
    nearest_error: float
    rounded_error: float
    note: str = ""


@dataclass(frozen=True)
class BlockLearning:
    """Held-out error of a block's output, relative, before and after, and the gradient steps taken."""

    before: float
    after: float
    steps: int


@dataclass(frozen=True)
class Unit:
    """Layers that are decided together: names in graph order."""

    index: int
    layers: tuple[str, ...]


def units_of(prepared: GraphModule) -> list[Unit]:
    """Quantized layers by shared input observer and, where no layer elsewhere shares it, by whole layer; in order.

    A part of a split layer may read the tensor that a layer far above reads: that unit is decided there, where the
    other part has no input yet.
    """
    merged: dict[str, list[str]] = {}
    for _, names in readers(prepared):
        wholes = {whole_name(name) for name in names}
        key = wholes.pop() if len(wholes) == 1 else "+".join(names)
        merged.setdefault(key, []).extend(names)
    order = list(observers(prepared))
    groups = sorted((sorted(names, key=order.index) for names in merged.values()), key=lambda ns: order.index(ns[0]))
    return [Unit(index, tuple(names)) for index, names in enumerate(groups)]


class Decisions:
    """Records of decided layers, between the observers and a checkpoint."""

    def __init__(self, prepared: GraphModule, checkpoint: Checkpoint) -> None:
        self.prepared, self.checkpoint = prepared, checkpoint
        self.device, self.watchers = graph.device_of(prepared), observers(prepared)

    def save_unit(self, unit: Unit, learned: Mapping[str, LayerLearning], votes: Mapping[str, VoteReport]) -> None:
        """Write what a unit decided."""
        records = self._records(unit.layers)
        meta = {
            "layers": layer_configs(records),
            "learned": {name: asdict(learned[name]) for name in unit.layers},
            "votes": {name: vote.to_dict() for name, vote in votes.items() if name in unit.layers},
        }
        self.checkpoint.save(f"units/{unit.index:04d}", meta, layer_tensors(records))

    def load_unit(self, unit: Unit) -> tuple[dict[str, LayerLearning], dict[str, VoteReport]] | None:
        """Give the observers what a unit decided, and return what came of it; None where there is no file.

        Raises:
            InvalidFile: for a damaged file.
            ValueError: for a file of another run.
        """
        saved = self.checkpoint.load(f"units/{unit.index:04d}", "a unit of a calibration")
        if saved is None:
            return None
        meta, tensors = saved
        self._restore(layer_records(meta["layers"], tensors))
        learned = {name: LayerLearning(**one) for name, one in meta["learned"].items()}
        return learned, {name: VoteReport.from_dict(vote) for name, vote in meta["votes"].items()}

    def save_block(self, index: int, layers: Iterable[str], learned: Mapping[str, float]) -> None:
        """Write what a block decided of its layers."""
        records = self._records(layers)
        meta = {"layers": layer_configs(records), "learned": dict(learned)}
        self.checkpoint.save(f"units/block{index:04d}", meta, layer_tensors(records))

    def load_block(self, index: int) -> dict[str, float] | None:
        """Give the observers what a block decided, and return what came of it; None, and errors, as ``load_unit``."""
        saved = self.checkpoint.load(f"units/block{index:04d}", "a block of a calibration")
        if saved is None:
            return None
        meta, tensors = saved
        self._restore(layer_records(meta["layers"], tensors))
        return dict(meta["learned"])

    def _records(self, names: Iterable[str]) -> dict[str, LayerRecord]:
        plan, records = state_of(self.prepared).plan, {}
        for name in names:
            weight, activation = self.watchers[name]
            assert weight.decided is not None
            inputs = None if activation is None else activation.record()
            records[name] = LayerRecord(name, plan[name].kind, weight.decided, inputs, weight.bias)
        return records

    def _restore(self, records: Mapping[str, LayerRecord]) -> None:
        for name, record in records.items():
            weight, activation = self.watchers[name]
            there = on_device(record, self.device)
            weight.restore(there.weight, there.bias)
            if activation is not None and record.activation is not None:
                activation.channel_scale = record.activation.channel_scale
                activation.restore(record.activation)
