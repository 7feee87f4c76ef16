"""Watch the samples go through the float network: ranges, then votes.

Memory is one batch of activations plus the statistics. With a ``state_dir`` the statistics are saved as the run goes,
and the same call resumes from them and ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm.auto import tqdm

from dmq_ao.config import Ranges
from dmq_ao.observers import ActivationObserver
from dmq_ao.quantizer.prepared import observers
from dmq_ao.serialization.checkpoint import Checkpoint

SAVE_EVERY_SECONDS = 20.0


def passes_of(prepared: GraphModule) -> list[tuple[str, Callable[[ActivationObserver], None]]]:
    """Name and start of each pass over the samples that the observers need."""
    watchers = _unique_watchers(prepared).values()
    passes: list[tuple[str, Callable[[ActivationObserver], None]]] = []
    if any(w.config.ranges is not Ranges.DYNAMIC for w in watchers):
        passes.append(("ranges", ActivationObserver.start_ranges))
    if any(w.power_of_two for w in watchers):
        passes.append(("votes", ActivationObserver.start_votes))
    return passes


def observe(
    prepared: GraphModule,
    batches: Callable[[], Iterable[list[Tensor]]],
    count: int,
    checkpoint: Checkpoint,
    bar: tqdm[Any],
) -> bool:
    """Run all passes, going on from the checkpoint where there is one; True when it did.

    Args:
        prepared: its observers are fed in place.
        batches: starts a pass over the graph's arguments, a list of tensors [b, ...] a batch.
        count: how many batches there are.
        checkpoint: where statistics are saved.
        bar: one tick a batch and pass.

    Raises:
        InvalidFile: for a damaged checkpoint.
        ValueError: for the checkpoint of another run; for an input that is not finite, naming the layer.
    """
    watchers = _unique_watchers(prepared)
    state = _State(checkpoint, watchers)
    resumed = state.load()
    for index, (name, start) in enumerate(passes_of(prepared)):
        if index < state.index:
            bar.update(count)
            continue
        if state.batch == 0:
            for watcher in watchers.values():
                start(watcher)
        bar.set_postfix(watching=name)
        bar.update(state.batch)
        with torch.no_grad():
            for number, arguments in enumerate(batches()):
                if number < state.batch:
                    continue
                prepared(*arguments)
                bar.update(1)
                state.advance()
        state.finish_pass()
    return resumed


def _unique_watchers(prepared: GraphModule) -> dict[str, ActivationObserver]:
    inputs = [activation for _, activation in observers(prepared).values() if activation is not None]
    return {watcher.layer: watcher for watcher in inputs}


class _State:
    """Where a calibration stands: pass, batch and the observers' statistics, in one safetensors file."""

    def __init__(self, checkpoint: Checkpoint, watchers: Mapping[str, ActivationObserver]) -> None:
        self.checkpoint, self.watchers = checkpoint, watchers
        self.index = self.batch = 0
        self.saved = time.monotonic()

    def load(self) -> bool:
        """Take up a saved run; False when there is none."""
        saved = self.checkpoint.load("calibration", "a calibration state")
        if saved is None:
            return False
        meta, tensors = saved
        self.index, self.batch = meta["pass"], meta["batch"]
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
        tensors = {f"{name}|{k}": v for name, w in self.watchers.items() for k, v in w.state().items()}
        self.checkpoint.save("calibration", {"pass": self.index, "batch": self.batch}, tensors)
        self.saved = time.monotonic()
