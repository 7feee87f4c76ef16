"""Run the samples through a prepared graph: ranges, then votes, then what the integers cost each layer.

Memory is one batch of activations plus the statistics. With a ``state_dir`` the statistics are saved as the run goes,
and the same call resumes from them and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from dmq_ao import graph, numerics
from dmq_ao.annotate import PLAN, observers
from dmq_ao.calibration import CalibrationSet
from dmq_ao.config import InvalidFile, Ranges
from dmq_ao.layer import LayerPlan
from dmq_ao.observers import ActivationObserver

SQNR = "dmq_ao.sqnr_db"
MEASURED_ROWS = 8
SAVE_EVERY_SECONDS = 20.0


@dataclass(frozen=True)
class VoteReport:
    """Outcome of one layer's power-of-two vote: how many channels took each exponent, and how many were refused."""

    channels: dict[int, int]
    refused: int
    mean_agreement: float


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found.

    Attributes:
        samples: rows seen.
        seconds: wall-clock time of this call.
        resumed: whether it went on from saved state.
        sqnr_db: per layer, signal-to-noise ratio of its output on float inputs, integers against float.
        votes: per layer that voted.
    """

    samples: int
    seconds: float
    resumed: bool
    sqnr_db: dict[str, float] = field(default_factory=dict)
    votes: dict[str, VoteReport] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        votes = {
            name: {**vars(vote), "channels": {str(k): v for k, v in vote.channels.items()}}
            for name, vote in self.votes.items()
        }
        return {
            "samples": self.samples,
            "seconds": self.seconds,
            "resumed": self.resumed,
            "sqnr_db": self.sqnr_db,
            "votes": votes,
        }


def calibrate(
    prepared: GraphModule,
    samples: CalibrationSet,
    *,
    state_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 8,
) -> CalibrationReport:
    """Decide every range, exponent and code of a prepared denoiser. Every call starts clean.

    Args:
        prepared: from ``dmq_ao.prepare``.
        samples: from ``dmq_ao.record``.
        state_dir: folder to save progress in, so that an interrupted call resumes.
        seed: chooses the samples on which the layers' noise is measured.
        progress: show a progress bar.
        batch_size: rows per forward pass; bounds the memory.

    Raises:
        TypeError: when ``prepared`` is not prepared, or ``samples`` are no calibration set.
        ValueError: for non-finite activations, naming the layer; for samples that lack an argument; for a
            ``state_dir`` of another run.
        InvalidFile: for a damaged file in ``state_dir``.
    """
    if not isinstance(prepared, GraphModule) or PLAN not in prepared.meta:
        raise TypeError(f"calibrate takes what dmq_ao.prepare returned, got {type(prepared).__name__}")
    if not isinstance(samples, CalibrationSet):
        raise TypeError(
            f"calibrate takes a CalibrationSet, got {type(samples).__name__}; dmq_ao.record makes one from any"
            " sampling loop"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    started = time.monotonic()
    watchers = _unique_watchers(prepared)
    for watcher in watchers.values():
        watcher.start_ranges()
    for weight_observer, _ in observers(prepared).values():
        weight_observer.start()
    passes: list[tuple[str, Callable[[ActivationObserver], None]]] = []
    if any(w.config.ranges is not Ranges.DYNAMIC for w in watchers.values()):
        passes.append(("ranges", ActivationObserver.start_ranges))
    if any(w.power_of_two for w in watchers.values()):
        passes.append(("votes", ActivationObserver.start_votes))
    state = _State(state_dir, _digest(prepared, samples, batch_size), watchers)
    resumed = state.load()
    batches = math.ceil(len(samples) / batch_size)
    with tqdm(total=batches * len(passes), disable=not progress, unit="batch", desc="calibrate") as bar:
        for index, (name, start) in enumerate(passes):
            if index < state.index:
                bar.update(batches)
                continue
            if state.batch == 0:
                for watcher in watchers.values():
                    start(watcher)
            bar.set_postfix(watching=name)
            bar.update(state.batch)
            _run(prepared, samples, batch_size, bar, state)
            state.finish_pass()
    sqnr = prepared.meta[SQNR] = _decide_and_measure(prepared, samples, seed)
    return CalibrationReport(len(samples), time.monotonic() - started, resumed, sqnr, _votes(prepared))


def _unique_watchers(prepared: GraphModule) -> dict[str, ActivationObserver]:
    found = [activation for _, activation in observers(prepared).values() if activation is not None]
    return {watcher.layer: watcher for watcher in found}


def _run(prepared: GraphModule, samples: CalibrationSet, batch_size: int, bar: tqdm[Any], state: _State) -> None:
    with torch.no_grad():
        for index, inputs in enumerate(samples.batches(batch_size)):
            if index < state.batch:
                continue
            prepared(*graph_arguments(prepared, inputs))
            bar.update(1)
            state.advance()


def graph_arguments(gm: GraphModule, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors in the graph's order, on its device, from keyword arguments of the denoiser.

    Raises:
        ValueError: when the samples lack an argument that the graph takes.
    """
    flat = graph.flatten_inputs(inputs)
    names = graph.signature_of(gm).names
    missing = [name for name in names if name not in flat]
    if missing:
        raise ValueError(f"the samples lack {missing}, which the prepared denoiser takes; they hold {sorted(flat)}")
    device = next((p.device for p in gm.parameters()), torch.device("cpu"))
    return [torch.as_tensor(flat[name]).to(device) for name in names]


class _Measure(Interpreter):
    """Runs the float graph and, beside each layer, the same layer with its integers."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.watchers = observers(prepared)
        self.nodes = {node: name for name, node in graph.layer_nodes(prepared).items() if name in self.watchers}
        self.timestep: Tensor | None = None
        self.sqnr: dict[str, float] = {}

    def measure(self, arguments: list[Tensor]) -> dict[str, float]:
        """Output noise of every layer, dB."""
        signature = graph.signature_of(self.module)  # type: ignore[arg-type]
        if signature.timestep is not None:
            self.timestep = arguments[signature.names.index(signature.timestep)]
        self.run(*arguments)
        return self.sqnr

    def run_node(self, n: Node) -> Any:
        """The node's float result; the integers' result only feeds the ratio."""
        expected = super().run_node(n)
        if n in self.nodes:
            name = self.nodes[n]
            weight, activation = self.watchers[name]
            args, _ = self.fetch_args_kwargs_from_env(n)
            x = args[0] if activation is None else activation.simulate(args[0], self.timestep)
            codes = weight.record(args[1]).dequantize().to(args[1].dtype)
            actual = n.target(x, codes, *args[2:])  # type: ignore[operator]
            self.sqnr[name] = numerics.sqnr(actual, expected)
        return expected


def _decide_and_measure(prepared: GraphModule, samples: CalibrationSet, seed: int) -> dict[str, float]:
    """Freeze every record, and measure each layer on a few samples."""
    for name, (weight, activation) in observers(prepared).items():
        source = graph.layer_nodes(prepared)[name].args[1]
        assert isinstance(source, Node)
        weight.restore(weight.record(graph.attribute(prepared, source.args[0])))  # type: ignore[arg-type]
        if activation is not None:
            activation.restore(activation.record())
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:MEASURED_ROWS]
    with torch.no_grad():
        inputs = next(iter(samples.select(rows).batches(MEASURED_ROWS)))
        return _Measure(prepared).measure(graph_arguments(prepared, inputs))


def _votes(prepared: GraphModule) -> dict[str, VoteReport]:
    found = {}
    for name, (_, activation) in observers(prepared).items():
        if activation is not None and activation.election is not None:
            values, counts = activation.election.exponents.unique(return_counts=True)
            channels = dict(zip(values.tolist(), counts.tolist(), strict=True))
            found[name] = VoteReport(
                channels, activation.election.refused, float(activation.election.agreement.mean())
            )
    return found


def _digest(prepared: GraphModule, samples: CalibrationSet, batch_size: int) -> str:
    plan: dict[str, LayerPlan] = prepared.meta[PLAN]
    text = json.dumps([samples.digest(), batch_size, [str(item) for item in plan.values()]])
    digest = hashlib.sha256(text.encode())
    for _, parameter in sorted(prepared.named_parameters()):
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _State:
    """Where a calibration stands: pass, batch and the observers' statistics, in one safetensors file."""

    def __init__(self, folder: str | Path | None, digest: str, watchers: Mapping[str, ActivationObserver]) -> None:
        self.file = None if folder is None else Path(folder) / "calibration.safetensors"
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)  # now, not when there is something to lose
        self.digest, self.watchers = digest, watchers
        self.index = self.batch = 0
        self.saved = time.monotonic()

    def load(self) -> bool:
        """Take up a saved run; False when there is none."""
        if self.file is None or not self.file.exists():
            return False
        try:
            with safe_open(self.file, "pt") as opened:
                meta = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InvalidFile(f"{self.file}: not a calibration state ({error}); delete it to start again") from error
        if meta.get("digest") != self.digest:
            raise ValueError(
                f"{self.file} belongs to another run: model, recipe, samples and batch_size must all be the same;"
                " delete it to start again, or give another state_dir"
            )
        self.index, self.batch = int(meta["pass"]), int(meta["batch"])
        for name, watcher in self.watchers.items():
            prefix = f"{name}|"
            watcher.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        return True

    def advance(self) -> None:
        """One batch done; save now and then."""
        self.batch += 1
        if time.monotonic() - self.saved > SAVE_EVERY_SECONDS:
            self._save()

    def finish_pass(self) -> None:
        """A pass done; always saved."""
        self.index, self.batch = self.index + 1, 0
        self._save()

    def _save(self) -> None:
        if self.file is None:
            return
        tensors = {
            f"{name}|{k}": v.contiguous().clone() for name, w in self.watchers.items() for k, v in w.state().items()
        }
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial, {"digest": self.digest, "pass": str(self.index), "batch": str(self.batch)})
        os.replace(partial, self.file)
        self.saved = time.monotonic()
