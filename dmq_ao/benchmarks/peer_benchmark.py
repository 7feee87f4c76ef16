"""Ours and other tools' on one machine: milliseconds in interleaved rounds of one process, the error beside them.

All are given the same calibration samples, the same call and the same number of threads. Errors are relative to the
float denoiser, on the same states for all.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.api.compile import Mode, compile
from dmq_ao.api.saving import save
from dmq_ao.benchmarks.cuda_peers import CUDA_PEERS
from dmq_ao.benchmarks.measure import by_timestep
from dmq_ao.benchmarks.peers import (
    NOT_INSTALLED,
    PEERS,
    Artifact,
    Call,
    Inputs,
    Peer,
    Plain,
    missing_packages,
)
from dmq_ao.benchmarks.roofline import int8_peak, integer_macs
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.evaluation import clock_of, folder_bytes, latency, one_step_error
from dmq_ao.graph import device_of
from dmq_ao.graph.arguments import flatten_inputs, moved_inputs, unflatten_inputs
from dmq_ao.samples import CalibrationSet


@dataclass(frozen=True)
class Case:
    """A float denoiser and what it is measured with.

    Attributes:
        net: in eval mode.
        inputs: keyword arguments of the call that is timed, ``batch_size`` rows of one timestep.
        samples: what everybody is calibrated on.
        states: what errors are measured on.
        batch_size: rows of a call.
    """

    net: nn.Module
    inputs: Inputs
    samples: CalibrationSet
    states: CalibrationSet
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the denoiser is, and everybody runs."""
        return device_of(self.net)

    def calibration(self) -> list[Inputs]:
        """The samples as calls of exactly ``batch_size`` rows; the last rows that make no call are left out."""
        whole = len(self.samples) // self.batch_size * self.batch_size
        rows = torch.arange(max(whole, self.batch_size)) % len(self.samples)
        return [moved_inputs(call, self.device) for call in self.samples.select(rows).batches(self.batch_size)]


@dataclass(frozen=True)
class Ours:
    """A quantized denoiser, how it is compiled, and the seconds that prepare, calibrate and convert took."""

    denoiser: QuantizedDenoiser
    mode: Mode
    build_seconds: float


def peers_on(device: torch.device) -> Mapping[str, Peer]:
    """The peers that run on a device, by name."""
    return CUDA_PEERS if device.type == "cuda" else PEERS


class Padded(nn.Module):
    """A call of fixed batch size as a module that takes any."""

    def __init__(self, call: Call, size: int) -> None:
        super().__init__()
        self.call, self.size = call, size

    def forward(self, **inputs: Any) -> Tensor:
        """Denoise [B, ...], ``size`` rows at a time; rows are repeated to fill the last call up."""
        flat = flatten_inputs(inputs)
        count = next(len(value) for value in flat.values() if isinstance(value, Tensor) and value.dim() > 1)
        parts = [
            self._part(flat, torch.arange(start, start + self.size) % count) for start in range(0, count, self.size)
        ]
        return torch.cat(parts)[:count]

    def _part(self, flat: Mapping[str, Any], rows: Tensor) -> Tensor:
        part = {k: v[rows] if isinstance(v, Tensor) and v.dim() else v for k, v in flat.items()}
        result = self.call(**unflatten_inputs(part))
        return (result if isinstance(result, Tensor) else result[0]).float().clone()


def side_by_side(
    case: Case,
    peers: Sequence[str],
    ours: Mapping[str, Ours],
    *,
    repeats: int = 15,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build all, then time all in interleaved rounds, then measure the error of each.

    Args:
        case: the denoiser and what it is measured with.
        peers: names of ``peers_on`` the denoiser's device. One that fails, or is not there, has a row that says so.
        ours: by the name of the row.
        repeats: timed rounds.
        progress: show a progress bar.
        say: told what is ready, and what failed.

    Returns:
        ``rows`` by name: ``median_ms``, ``p10_ms``, ``p90_ms``, ``repeats``, ``one_step_error``, ``file_bytes``,
        ``build_seconds`` (export, calibrate, convert), ``compile_seconds`` (with the first call), ``integer`` (whether
        its products are of integers), ``device_bytes`` (on a GPU: what it holds there) and, of ours, ``macs``,
        ``kernels`` and ``mean_bits``; or ``failed`` alone.
        ``macs``: integer multiply-accumulates of a call, of the one of ours that has the fewest. ``int8_peak``: those
        per second that the machine reaches. Both None without any; the latter also without VNNI.
    """
    torch.compiler.reset()
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, one in ours.items():
        say(f"{name}: compile")
        rows[name], calls[name] = _ready_ours(one, case)
    for name in peers:
        missing = missing_packages(peers_on(case.device)[name])
        if missing:
            rows[name] = {"failed": NOT_INSTALLED + " ".join(missing)}
            say(f"{name}: {rows[name]['failed']}")
            continue
        say(f"{name}: build and compile")
        _attempt(rows, name, partial(_ready, name, case, calls), say)
    gc.collect()
    runs = {name: partial(call, **moved_inputs(case.inputs, case.device)) for name, call in calls.items()}
    for name, times in latency(runs, repeats=repeats, progress=progress, clock=clock_of(case.device)).items():
        rows[name] |= vars(times)
    say("one-step errors")
    error_of = _errors(case)
    for name, call in calls.items():
        if name in ours:
            rows[name] |= error_of(call)
        else:
            _attempt(rows, name, partial(error_of, call), say)
    macs = min((row["macs"] for row in rows.values() if row.get("macs")), default=None)
    return {"rows": rows, "macs": macs, "int8_peak": None if macs is None else int8_peak(device=case.device)}


def _attempt(
    rows: dict[str, dict[str, Any]], name: str, work: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> None:
    """Add to a peer's row; a tool that cannot is a result of the comparison, not a failure of it."""
    try:
        rows[name] = {**rows.get(name, {}), **work()}
    except Exception as error:
        rows[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        say(f"{name}: {rows[name]['failed']}")


def _ready(name: str, case: Case, calls: dict[str, Call]) -> dict[str, Any]:
    """A peer's row, and its call once it has run."""
    with redirect_stdout(sys.stderr):  # NNCF and torch.onnx print what they do
        start = perf_counter()
        peer, before = peers_on(case.device)[name], _device_bytes(case.device)
        artifact = peer.build(case.net, moved_inputs(case.inputs, case.device), case.calibration())
        build_seconds = perf_counter() - start
        call, compile_seconds = _first_call(artifact, case)
    calls[name] = call
    return {
        "file_bytes": artifact.file_bytes,
        "build_seconds": build_seconds,
        "compile_seconds": compile_seconds,
        "integer": peer.integer,
        **_device_growth(case.device, before),
    }


def _ready_ours(one: Ours, case: Case) -> tuple[dict[str, Any], Call]:
    artifact = Artifact(stored_bytes(one.denoiser), lambda: _in_its_type(one))
    before = _device_bytes(case.device) - one.denoiser.graph_bytes
    call, compile_seconds = _first_call(artifact, case)
    macs = integer_macs(one.denoiser, moved_inputs(case.inputs, case.device, one.denoiser.dtype))
    row = {
        "file_bytes": artifact.file_bytes,
        "build_seconds": one.build_seconds,
        "compile_seconds": compile_seconds,
        "integer": macs > 0,
        "macs": macs,
        "kernels": one.denoiser.kernel_counts,
        "mean_bits": one.denoiser.mean_bits,
        **_device_growth(case.device, before),
    }
    return row, call


def _in_its_type(one: Ours) -> Call:
    """The compiled denoiser for inputs of float32, whatever type it has."""
    compiled = torch.no_grad()(compile(one.denoiser, one.mode))

    def call(**inputs: Any) -> Tensor:
        result: Tensor = compiled(**moved_inputs(inputs, floats=one.denoiser.dtype))
        return result

    return compiled if one.denoiser.dtype == torch.float32 else call


def _first_call(artifact: Artifact, case: Case) -> tuple[Call, float]:
    start = perf_counter()
    call = artifact.compile()
    call(**moved_inputs(case.inputs, case.device))
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    return call, perf_counter() - start


def _device_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def _device_growth(device: torch.device, before: int) -> dict[str, Any]:
    """What a GPU holds more than before: weights, and the pools of CUDA graphs."""
    return {"device_bytes": _device_bytes(device) - before} if device.type == "cuda" else {}


def stored_bytes(quantized: QuantizedDenoiser) -> int:
    """Bytes of the folder that ``dmq_ao.save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(quantized, folder)
        return folder_bytes(folder)


def _errors(case: Case) -> Callable[[Call], dict[str, Any]]:
    """What measures the error of a call; the float denoiser is asked once for all of them."""
    batches = [(timestep, moved_inputs(inputs, case.device)) for timestep, inputs in by_timestep(case.states)]
    teacher = torch.no_grad()(Plain(case.net))
    answers = [Padded(teacher, case.batch_size)(**inputs) for _, inputs in batches]

    def error_of(call: Call) -> dict[str, Any]:
        replay = iter(answers)
        student = Padded(call, case.batch_size)
        return {"one_step_error": one_step_error(lambda **_: next(replay), student, batches).mean}

    return error_of
