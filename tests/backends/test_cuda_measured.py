"""Linears that PyTorch multiplies faster are left to it, mean the same, and say why."""

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from interpreted import needs_interpreter, without_lost_checks
from torch import Tensor, nn
from torch.fx import GraphModule

import dmq_ao
from dmq_ao import CalibrationSet, QuantizedDenoiser, TensorConfig
from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.backends.cuda import measured as cuda_measured
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda import tiles as cuda_tiles
from dmq_ao.backends.cuda.tiles import Tile
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.recipes import minmax
from tests.backends.one_layer import distance, everywhere, run

pytestmark = needs_interpreter
without_lost_checks()
WHY = "measured: triton 2 ms, torch 1 ms on [2, 20, 16]"


class Mixed(nn.Module):
    """Two linears of one input, a third of four bits, a convolution, and a linear of few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.narrow, self.point = nn.Linear(8, 16), nn.Conv1d(16, 24, 1)
        self.vector = nn.Linear(24, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.narrow(self.q(x) * self.k(x)) + x
        result: Tensor = self.vector(self.point(h.transpose(1, 2)).mean(-1))
        return result


class Clock:
    """Makes each call, and says that what ``slow`` names takes two milliseconds, and other operators one."""

    def __init__(self, slow: object) -> None:
        self.slow, self.asked = slow, list[object]()

    def __call__(self, call: Callable[[], object]) -> float:
        assert isinstance(call, partial)
        call()
        self.asked.append(call.func)
        return 2.0 if call.func is self.slow else 1.0


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    tile = Tile(rows=64, outs=16, lanes=32, parts=1, warps=4, stages=2)
    with (
        mock.patch.object(cuda, "why_not_here", return_value=""),
        mock.patch.object(cuda_tiles, "tile_for", return_value=tile),
    ):
        yield


@pytest.fixture
def prepared() -> GraphModule:
    torch.manual_seed(0)
    x, t = torch.randn(6, 20, 16) + 0.3, torch.tensor([900, 500, 100]).repeat(2)
    samples = CalibrationSet({"x": x}, {}, t, torch.arange(3).repeat(2), "t")
    four = dmq_ao.Override("narrow", weight=TensorConfig(bits=4, granularity=dmq_ao.Granularity.PER_CHANNEL))
    recipe = everywhere(minmax("w8a8"), overrides=(four,))
    gm = dmq_ao.prepare(Mixed().eval(), recipe, samples.example(), backend="cuda")
    dmq_ao.calibrate(gm, samples, progress=False)
    return gm


def measured(prepared: GraphModule, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> QuantizedDenoiser:
    monkeypatch.setattr(ALL_BACKENDS["cuda"], "measured", partial(cuda_measured.lower_by_linear_times, clock=clock))
    return dmq_ao.convert(prepared, "cuda", latency_aware=True)


def test_the_faster_product_runs(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(cuda_ops.cuda_linear)
    chosen, plain = measured(prepared, clock, monkeypatch), dmq_ao.convert(prepared, "cuda")
    names = {name: kernel.name for name, kernel in chosen.kernels.items()}
    assert names == {
        "q": "torch int8 linear, weight in 8 bits",
        "k": "torch int8 linear, weight in 8 bits",
        "narrow": "triton int8 linear, weight in 4 bits",
        "point": "torch int8 linear, weight in 8 bits",
        "vector": "torch int8 linear, weight in 8 bits",
    }
    assert chosen.kernels["q"].why == chosen.kernels["k"].why == WHY
    assert all(chosen.kernels[name].is_integer for name in names)
    x, t = torch.randn(5, 20, 16), torch.tensor([900, 100, 500, 100, 900])
    assert torch.equal(run(chosen, x, t), run(plain, x, t))  # the same sums, and the same end
    assert distance(run(chosen, x, t), run(dmq_ao.convert(prepared, "reference"), x, t)) < 1e-4
    assert len(clock.asked) == 3 * 2 * (cuda_measured._REPEATS + cuda_measured._WARMUP)


def test_what_is_no_faster_stays(prepared: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = measured(prepared, Clock(cuda_ops.library_linear), monkeypatch)
    assert chosen.kernels == dmq_ao.convert(prepared, "cuda").kernels


@pytest.mark.parametrize(("rows", "channels", "outs"), [(17, 8, 16), (16, 8, 8), (40, 12, 8), (40, 8, 12)])
def test_pytorch_is_asked_only_for_sizes_that_it_knows(
    rows: int, channels: int, outs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *args: asked.append(args) or real(*args))
    codes = torch.randint(-128, 128, (rows, channels), dtype=torch.int8)
    weight = torch.nn.functional.pad(torch.randint(-128, 128, (outs, channels), dtype=torch.int8), (0, -channels % 32))
    zero = torch.zeros(outs, dtype=torch.int8)
    sums, zero_point = weight.sum(1, dtype=torch.int32)[None], torch.tensor([77], dtype=torch.int32)
    args = (codes, torch.ones(1), zero_point, [weight], [8], None, zero, None, sums, torch.ones(outs), None, None)
    actual = cuda_ops.library_linear(*args, torch.float32)
    expected = (codes.double() + 128 - 77) @ weight[:, :channels].double().T
    assert torch.equal(actual.double(), expected)
    assert bool(asked) is ((rows, channels, outs) == (17, 8, 16))
