"""What a model costs: milliseconds, bytes, true mean bits over all weights, and the machine these were measured on."""

import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call, in milliseconds: median, 10th and 90th percentile over ``repeats`` calls."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def latency(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 15,
    warmup: int = 2,
    progress: bool = False,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Latency]:
    """Time several calls against each other in interleaved rounds, so that a slow minute slows all of them.

    Each round makes each call once; the next round starts one call later.

    Args:
        calls: what to time, by name; each already holds its inputs.
        repeats: timed rounds.
        warmup: rounds before them, not timed (compilation happens here).
        progress: show a bar.
        clock: makes a call and tells its milliseconds, as ``cuda_ms`` does; None takes ``wall_ms``.

    Returns:
        A ``Latency`` for each name, in the order of ``calls``.

    Raises:
        ValueError: ``calls`` is empty, ``repeats`` is below 1 or ``warmup`` below 0.
    """
    if not calls:
        raise ValueError("calls: expected at least one call to time, got none")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got repeats={repeats} and warmup={warmup}")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(-warmup, repeats), desc="latency", unit="round", disable=not progress):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            milliseconds = (clock or wall_ms)(calls[name])
            if turn >= 0:
                times[name].append(milliseconds)
    return {name: _summary(values) for name, values in times.items()}


def wall_ms(call: Callable[[], object]) -> float:
    """Make a call, and tell its milliseconds on the wall clock."""
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e3


def cuda_ms(call: Callable[[], object]) -> float:
    """Make a call that gives work to the CUDA device, and tell the milliseconds that the device takes for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def clock_of(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """The clock for work on a device."""
    return cuda_ms if device.type == "cuda" else wall_ms


def speedup(latencies: Mapping[str, Latency], baseline: str) -> dict[str, float]:
    """How many times faster than ``baseline`` each call is: ratios of medians, 1.0 for the baseline itself.

    Raises:
        ValueError: ``baseline`` was not timed.
    """
    if baseline not in latencies:
        raise ValueError(f"baseline: expected one of {sorted(latencies)}, got {baseline!r}")
    return {name: latencies[baseline].median_ms / times.median_ms for name, times in latencies.items()}


def machine() -> dict[str, Any]:
    """The machine and the torch that numbers were measured on, as plain values for a report.

    Returns:
        ``cpu`` (model name), ``cores`` (those this process may use), ``threads`` (torch's), ``torch``, ``python``,
        ``system``, ``capability`` (torch's name for the CPU's vector instructions), ``avx512`` and ``vnni`` (None
        where torch cannot say), ``gpu`` (None without CUDA).
    """
    capability = torch.backends.cpu.get_cpu_capability()
    features = getattr(torch.cpu, "get_capabilities", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "capability": capability,
        "avx512": "AVX512" in capability,
        "vnni": None if features is None else bool(features().get("avx512_vnni", False)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of all files in a folder and the folders below it; a link counts as the file that it names.

    Raises:
        NotADirectoryError: ``path`` is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{folder}: expected a folder, got {'a file' if folder.exists() else 'nothing there'}"
        )
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_rss_bytes() -> int | None:
    """Largest resident memory that this process ever had, in bytes; None where it is not known (only Linux is)."""
    # Not getrusage: a process starts with the peak there of the one that started it.
    return _status_bytes("VmHWM")


def rss_bytes() -> int | None:
    """Resident memory of this process now, in bytes; None where it is not known (only Linux is)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    if sys.platform != "linux":
        return None
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024  # the file says kB and means KiB


@dataclass(frozen=True)
class StoredTensor:
    """A weight as it is stored: how many numbers, and bits of each (a mean, where output channels differ).

    Raises:
        ValueError: ``numel`` or ``bits`` is negative.
    """

    numel: int
    bits: float

    def __post_init__(self) -> None:
        if self.numel < 0 or self.bits < 0:
            raise ValueError(
                f"StoredTensor: expected numel >= 0 and bits >= 0, got numel={self.numel}, bits={self.bits}"
            )


def mean_bits(stored: Iterable[StoredTensor]) -> float:
    """True mean bits of a weight over *all* weights: those kept in float count with their 16 or 32.

    Raises:
        ValueError: there are no weights.
    """
    tensors = list(stored)
    numel = sum(tensor.numel for tensor in tensors)
    if not numel:
        raise ValueError(f"stored: expected at least one weight, got {len(tensors)} tensors with no numbers in them")
    return sum(tensor.numel * tensor.bits for tensor in tensors) / numel


def _summary(milliseconds: list[float]) -> Latency:
    p10, median, p90 = (float(value) for value in np.percentile(milliseconds, (10, 50, 90)))
    return Latency(median_ms=median, p10_ms=p10, p90_ms=p90, repeats=len(milliseconds))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def float_bytes(denoiser: torch.nn.Module) -> int:
    """Bytes of a denoiser's tensors in float32."""
    return sum(4 * int(tensor.numel()) for tensor in denoiser.state_dict().values())
