"""Costs: a clock that the test turns, files of known length, weights of known width."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmq_ao.evaluation import (
    Latency,
    StoredTensor,
    clock_of,
    cost,
    cuda_ms,
    folder_bytes,
    latency,
    machine,
    mean_bits,
    peak_rss_bytes,
    rss_bytes,
    speedup,
    wall_ms,
)


class Clock:
    """A stopwatch that moves only when a call says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """A call that takes ``milliseconds[i]`` the i-th time, the last of them ever after."""
        left = list(milliseconds)

        def call() -> None:
            self.log.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cost, "perf_counter", clock)
    return clock


def test_latency_gives_percentiles_in_milliseconds(clock: Clock) -> None:
    timed = latency({"a": clock.taking("a", *range(1, 12))}, repeats=11, warmup=0)["a"]
    assert (timed.median_ms, timed.p10_ms, timed.p90_ms) == pytest.approx((6, 2, 10))
    assert timed.repeats == 11


def test_latency_leaves_out_the_warmup(clock: Clock) -> None:
    timed = latency({"a": clock.taking("a", 5000, 5000, 3)}, repeats=4, warmup=2)["a"]
    assert (timed.p10_ms, timed.p90_ms) == pytest.approx((3, 3))
    assert len(clock.log) == 6


def test_latency_interleaves_and_rotates(clock: Clock) -> None:
    latency({name: clock.taking(name, 1) for name in "abc"}, repeats=4, warmup=0)
    assert "".join(clock.log) == "abcbcacababc"


def test_latency_takes_another_clock(clock: Clock) -> None:
    asked: list[object] = []

    def other(call: Callable[[], object]) -> float:
        asked.append(call)
        return 7.0

    calls = {"a": clock.taking("a", 1)}
    timed = latency(calls, repeats=3, warmup=1, clock=other)["a"]
    assert (asked, timed.median_ms, clock.log) == ([calls["a"]] * 4, 7, [])


def test_every_device_has_its_clock() -> None:
    assert clock_of(torch.device("cpu")) is wall_ms
    assert clock_of(torch.device("cuda")) is cuda_ms


@pytest.mark.gpu
def test_cuda_time_is_that_of_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    once, ten_times = (cuda_ms(lambda n=n: [x @ x for _ in range(n)]) for n in (1, 10))
    assert once < ten_times


def test_latency_shows_a_bar_when_asked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    latency({"a": clock.taking("a", 1)})
    assert capsys.readouterr().err == ""
    latency({"a": clock.taking("a", 1)}, progress=True)
    assert "17/17" in capsys.readouterr().err


def test_latency_wants_calls_and_rounds() -> None:
    with pytest.raises(ValueError, match="calls: expected at least one call to time, got none"):
        latency({})
    with pytest.raises(ValueError, match="expected repeats >= 1 and warmup >= 0, got repeats=0 and warmup=2"):
        latency({"a": int}, repeats=0)
    with pytest.raises(ValueError, match="got repeats=1 and warmup=-1"):
        latency({"a": int}, repeats=1, warmup=-1)


def test_speedup_is_a_ratio_of_medians() -> None:
    timed = {"float": Latency(30.0, 1.0, 99.0, 5), "int8": Latency(12.0, 1.0, 99.0, 5)}
    assert speedup(timed, "float") == {"float": 1.0, "int8": 2.5}
    with pytest.raises(ValueError, match=r"baseline: expected one of \['float', 'int8'\], got 'fp32'"):
        speedup(timed, "fp32")


def test_machine_is_plain_and_named() -> None:
    facts = machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert (facts["torch"], facts["threads"]) == (torch.__version__, torch.get_num_threads())
    assert facts["avx512"] is (torch.backends.cpu.get_cpu_capability() == "AVX512")
    assert (facts["gpu"] is not None) == torch.cuda.is_available()


def test_machine_where_torch_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert machine()["vnni"] is None


def test_folder_bytes_counts_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "unet" / "deep").mkdir(parents=True)
    (tmp_path / "config.json").write_bytes(b"x" * 7)
    (tmp_path / "unet" / "deep" / "model.safetensors").write_bytes(b"x" * 100)
    assert folder_bytes(tmp_path) == folder_bytes(str(tmp_path)) == 107


def test_folder_bytes_wants_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="absent: expected a folder, got nothing there"):
        folder_bytes(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file: expected a folder, got a file"):
        folder_bytes(tmp_path / "file")


def test_peak_rss_is_bytes_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        peak = peak_rss_bytes()
        assert peak is not None
        assert 20e6 < peak < 1e12
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_rss_bytes() is None
    assert rss_bytes() is None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = rss_bytes()
    assert before is not None
    size = len(bytearray(b"x" * 2**28))
    peak, after = peak_rss_bytes(), rss_bytes()
    assert peak is not None
    assert after is not None
    assert peak > max(before, after) + size / 2


def test_mean_bits_weighs_by_numbers() -> None:
    assert mean_bits([StoredTensor(900, 4), StoredTensor(100, 32)]) == 6.8
    assert mean_bits(iter([StoredTensor(10, 4.5), StoredTensor(0, 32)])) == 4.5


@given(st.lists(st.builds(StoredTensor, st.integers(1, 10**9), st.sampled_from([2, 3.5, 4, 8, 16, 32])), min_size=1))
def test_mean_bits_lies_between_the_extremes(stored: list[StoredTensor]) -> None:
    bits = [tensor.bits for tensor in stored]
    assert min(bits) - 1e-9 <= mean_bits(stored) <= max(bits) + 1e-9


def test_mean_bits_wants_weights() -> None:
    with pytest.raises(ValueError, match="stored: expected at least one weight, got 1 tensors with no numbers"):
        mean_bits([StoredTensor(0, 8)])
    with pytest.raises(ValueError, match="expected numel >= 0 and bits >= 0, got numel=-1, bits=8"):
        StoredTensor(-1, 8)
