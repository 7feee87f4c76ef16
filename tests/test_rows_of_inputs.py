"""The number of rows in a denoiser's code, and inputs that have none."""

from __future__ import annotations

import builtins
from collections.abc import Callable

import pytest
import torch
from awkward import Net, all_layers, inputs
from plain import flow, plain_samples, record, relative, seeded
from torch import Tensor, nn

import dmq_ao
from dmq_ao import graph
from dmq_ao.config import Recipe
from dmq_ao.graph.export import CaptureError
from dmq_ao.graph.symbolic_len import symbolic_len


class Expanded(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.reshape(-1).expand(len(x)))


class Reshaped(Net):
    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h.flatten(1).reshape(len(h), 8, *h.shape[2:]))


class Halved(Net):
    """Guidance that is split by half of the rows."""

    def body(self, x: Tensor) -> Tensor:
        h = self.first(torch.cat([x, x * 0.5]))
        half = len(h) // 2
        return self.last(h[:half] + h[half:])


class Made(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + torch.zeros(len(x), 8, 1, 1) + torch.arange(len(x[0, 0]))[:, None])


@pytest.mark.parametrize("kind", [Expanded, Reshaped, Halved, Made])
def test_the_length_of_a_batch_stays_open(kind: type[Net]) -> None:
    net = seeded(kind)
    gm = graph.capture(net, inputs())
    for batch, height in ((1, 8), (3, 8), (5, 6)):
        x, t = inputs(batch, height)
        torch.testing.assert_close(gm(x, t), net(x, t))
    samples = record(net, lambda step: net(inputs(3, seed=step)[0], torch.full((3,), float(step))))
    quantized, _ = flow(net, all_layers(), samples)
    x, t = inputs(5, seed=600)
    assert 0 < relative(quantized(x, t), net(x, t)) < 0.02
    assert builtins.len([1, 2]) == 2
    assert builtins.len.__module__ == "builtins"


def test_the_builtin_is_back_after_an_export_that_failed() -> None:
    class Fails(Net):
        def body(self, x: Tensor) -> Tensor:
            assert len(x) > 10_000, "few"
            return x

    with pytest.raises(CaptureError, match="few"):
        graph.capture(seeded(Fails), inputs())
    assert builtins.len.__module__ == "builtins"


class OneByOne(Net):
    """A loop over the rows: as many as there were at capture."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(torch.stack([x[row] * 1.0 for row in range(len(x))]))


class Pairs(Net):
    """Rows in pairs."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x.unflatten(0, (2, -1)).flip(1).flatten(0, 1))


@pytest.mark.parametrize("recipe", [dmq_ao.recipes.minmax(), dmq_ao.recipes.dmq("w8a8")])
def test_a_denoiser_of_some_numbers_of_rows_is_refused_before_it_is_calibrated(recipe: Recipe) -> None:
    for kind, batch_size in ((OneByOne, 8), (Pairs, 5)):
        net = seeded(kind)
        samples = record(net, lambda step, net=net: net(inputs(4, seed=step)[0], torch.full((4,), float(step))))
        prepared = dmq_ao.prepare(net, all_layers(recipe), samples.example(4))
        with pytest.raises(ValueError, match=r"some numbers of samples alone: .*shape.*int\(x.shape\[0\]\)"):
            dmq_ao.calibrate(prepared, samples, progress=False, batch_size=batch_size)
    dmq_ao.calibrate(prepared, samples, progress=False, batch_size=4)


class Vector(Net):
    """A vector among the arguments, without rows, that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + self.shift(v)[:, None, None], t)


class Picture(Net):
    """A convolution of one picture without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + self.shift(v), t)


class Line(Picture):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Conv1d(2, 3, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return super(Picture, self).forward(x + self.shift(v)[..., None], t)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (Vector, lambda: torch.arange(5.0)),
        (Picture, lambda: torch.ones(2, 8, 8)),
        (Line, lambda: torch.ones(2, 8)),
    ],
)
def test_a_layer_whose_input_has_no_rows_stays_float(
    kind: type[Net], make: Callable[[], Tensor], tmp_path: object
) -> None:
    net, shared = seeded(kind), make()
    samples = record(net, lambda step: net(inputs(4, seed=step)[0], torch.full((4,), float(step)), shared))
    quantized, _ = flow(net, all_layers(dmq_ao.recipes.dmq("w8a8")), samples)
    rows = {row["name"]: row for row in quantized.layer_reports()}
    assert rows["shift"]["status"] == "float"
    assert "without a batch axis" in rows["shift"]["why"]
    x, t = inputs(4, seed=600)
    dmq_ao.save(quantized, f"{tmp_path}/q")
    loaded = dmq_ao.load(f"{tmp_path}/q", model=net, backend="reference")
    assert torch.equal(loaded(x, t, shared), quantized(x, t, shared))
    assert 0 < relative(quantized(x, t, shared), net(x, t, shared)) < 0.02


def test_a_denoiser_without_a_timestep_is_given_one() -> None:
    class Untimed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.body(x)

    class Timed(nn.Module):
        """As the error says."""

        def __init__(self, denoiser: nn.Module) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.denoiser(x)

    untimed = seeded(Untimed)
    with pytest.raises(ValueError, match="is a timestep.*a module whose forward also takes timestep"):
        plain_samples(untimed)
    net = Timed(untimed).eval()
    quantized, _ = flow(net, all_layers(dmq_ao.recipes.dmq("w8a8")), plain_samples(net))
    x, t = inputs(4)
    assert 0 < relative(quantized(x, t), untimed(x)) < 0.05


def test_a_timestep_of_many_axes_is_made_of_one_a_row() -> None:
    class Sigma(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.body(x) + t / 1000

    class OneARow(nn.Module):
        """As the error says."""

        def __init__(self, denoiser: nn.Module) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t.reshape(-1, 1, 1, 1))

    sigma = seeded(Sigma)
    with pytest.raises(
        ValueError, match=r"one value for each of the 4 rows; got \[4, 1, 1, 1\].*t.reshape\(-1, 1, 1, 1\)"
    ):
        record(sigma, lambda step: sigma(inputs(4)[0], torch.full((4, 1, 1, 1), float(step))))
    net = OneARow(sigma).eval()
    quantized, _ = flow(net, all_layers(), plain_samples(net))
    x, t = inputs(4)
    assert 0 < relative(quantized(x, t), net(x, t)) < 0.05


def test_len_is_pythons_own_after_exports_that_overlap() -> None:
    own = builtins.len
    first, second = symbolic_len(), symbolic_len()
    first.__enter__()
    second.__enter__()
    assert builtins.len is not own
    assert len([1, 2]) == 2
    first.__exit__(None, None, None)
    assert builtins.len is not own  # the second is under way
    second.__exit__(None, None, None)
    assert builtins.len is own
