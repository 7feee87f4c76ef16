"""Calls of several sizes in one calibration set: each size is a bucket, and calibration goes through all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.config import InvalidFile, Selection, SelectMethod
from dmq_ao.quantizer.prepared import observers
from dmq_ao.samples import CalibrationSet, record

STEPS = (900, 500, 100)


class Tokens(nn.Module):
    """Denoises tokens [B, N, 4] at places [N, 2] that all samples share, by a text [B, T, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.places = nn.Linear(6, 8), nn.Linear(2, 8)
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, places: Tensor) -> Tensor:
        x = self.first(hidden_states) + self.places(places) + self.text(text).mean(1, keepdim=True)
        return self.last(self.middle(torch.tanh(x + timestep.reshape(-1, 1, 1) / 1000)))


def call(batch: int, tokens: int, text: int, step: float, size: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch * 1000 + tokens * 10 + text)
    return {
        "hidden_states": size * torch.randn(batch, tokens, 4, generator=generator),
        "timestep": torch.full((batch,), step),
        "text": torch.randn(batch, text, 6, generator=generator),
        "places": torch.linspace(0, 1, 2 * tokens).reshape(tokens, 2),
    }


@pytest.fixture(scope="module")
def denoiser() -> Tokens:
    torch.manual_seed(0)
    return Tokens().eval()


def recorded(denoiser: nn.Module, shapes: list[tuple[int, int, int]], num_samples: int = 64, **how: Any) -> Any:
    """One trajectory of each shape (batch, tokens, text)."""
    with record(denoiser, num_samples=num_samples, **how) as recorder, torch.no_grad():
        for shape in shapes:
            with recorder.trajectory():
                for step in STEPS:
                    denoiser(**call(*shape, step))
    return recorder.calibration_set()


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        pytest.param([(2, 6, 5), (4, 12, 5)], [12, 6], id="two resolutions, the larger bucket first"),
        pytest.param([(4, 6, 5), (2, 6, 5)], [6], id="with and without guidance are of one size"),
        pytest.param([(3, 6, 5), (2, 6, 7), (1, 6, 9)], [5, 7, 9], id="prompts of three lengths"),
        pytest.param([(2, 6, 5), (2, 12, 9), (2, 6, 5)], [6, 12], id="a size that comes back"),
    ],
)
def test_each_size_is_a_bucket(shapes: list[tuple[int, int, int]], sizes: list[int], denoiser: Tokens) -> None:
    samples = recorded(denoiser, shapes)
    axis = "text" if len({one[1] for one in shapes}) == 1 and len(sizes) > 1 else "hidden_states"
    assert [bucket.inputs[axis].shape[1] for bucket in samples.buckets] == sizes
    assert sum(map(len, samples.buckets)) == len(STEPS) * sum(batch for batch, *_ in shapes)
    for bucket in samples.buckets:
        assert bucket.timesteps.tolist() == list(STEPS)
        assert bucket.shared["places"].shape[0] == bucket.inputs["hidden_states"].shape[1]
        for arguments in bucket.batches(4):
            assert denoiser(**arguments).isfinite().all()


@pytest.mark.parametrize("method", list(SelectMethod))
def test_every_selection_draws_from_the_buckets_alike(method: SelectMethod, denoiser: Tokens) -> None:
    shapes = [(8, 6, 5), (8, 12, 5)] * 8 + [(8, 6, 5)] * 16
    how = Selection(method, tap="middle" if method is SelectMethod.TDAC else None)
    samples = recorded(denoiser, shapes, num_samples=120, select=how)
    counts = [len(bucket) for bucket in samples.buckets]
    assert sum(counts) == 120
    assert 0.15 < counts[1] / 120 < 0.4  # a quarter of the rows seen were of the second size
    again = recorded(denoiser, shapes, num_samples=120, select=how)
    assert again.digest() == samples.digest()


def test_a_window_is_of_one_size(denoiser: Tokens) -> None:
    samples = recorded(denoiser, [(2, 6, 5), (2, 12, 5)], select=Selection(window=2))
    for bucket in samples.buckets:
        assert (bucket.earlier(2) >= 0).any()


def test_the_file_keeps_all_buckets(denoiser: Tokens, tmp_path: Path) -> None:
    samples = recorded(denoiser, [(2, 6, 5), (2, 12, 7), (1, 6, 9)])
    samples.save(tmp_path / "set")
    loaded = CalibrationSet.load(tmp_path / "set")
    assert loaded.digest() == samples.digest()
    assert repr(loaded) == repr(samples)
    for one, other in zip(loaded.buckets, samples.buckets, strict=True):
        assert one.digest() == other.digest()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "set").read_bytes()
    assert len({samples.digest(), *(bucket.digest() for bucket in samples.buckets)}) == 4


def test_one_bucket_is_written_as_before(denoiser: Tokens, tmp_path: Path) -> None:
    recorded(denoiser, [(2, 6, 5), (4, 6, 5)]).save(tmp_path / "set")
    with safe_open(tmp_path / "set", "pt") as file:
        header = json.loads(file.metadata()["dmq_ao.calibration_set"])
        assert "buckets" not in header
        assert header["format_version"] == 1
        assert not [name for name in file.keys() if name.startswith("bucket")]  # noqa: SIM118


@pytest.mark.parametrize("buckets", [0, -1, 1, 3, 10**9])
def test_a_file_with_another_number_of_buckets_is_damaged(buckets: int, denoiser: Tokens, tmp_path: Path) -> None:
    recorded(denoiser, [(2, 6, 5), (2, 12, 7)]).save(tmp_path / "set")
    with safe_open(tmp_path / "set", "pt") as file:
        header = json.loads(file.metadata()["dmq_ao.calibration_set"])
    header["buckets"] = buckets
    save_file(load_file(tmp_path / "set"), tmp_path / "set", {"dmq_ao.calibration_set": json.dumps(header)})
    with pytest.raises(InvalidFile, match="Expected a calibration set of format version 1 or 2 or 3"):
        CalibrationSet.load(tmp_path / "set")


def test_ranges_are_of_all_buckets(denoiser: Tokens) -> None:
    """What one bucket alone would clip is within the range of both."""
    with record(denoiser) as recorder, torch.no_grad():
        for step in STEPS:
            denoiser(**call(4, 6, 5, step))
            denoiser(**call(2, 12, 7, step, size=5.0))
    samples = recorder.calibration_set()
    recipe = recipes.minmax("w8a8", ranges=dmq_ao.Ranges.STATIC)
    scales = {}
    for name, one in {"all": samples, "first": samples.buckets[0], "second": samples.buckets[1]}.items():
        prepared = dmq_ao.prepare(denoiser, recipe, samples.example(), backend="reference")
        report = dmq_ao.calibrate(prepared, one, progress=False)
        assert report.samples == sum(map(len, one.buckets))
        activation = observers(prepared)["middle"][1]
        assert activation is not None
        scales[name] = float(activation.record().scale)
        if name == "all":
            quantized = dmq_ao.convert(prepared, "reference")
            for shape in ((2, 6, 5), (1, 12, 7), (3, 9, 6)):
                inputs = call(*shape, 500.0)
                assert torch.allclose(quantized(**inputs), denoiser(**inputs), atol=0.05)
    assert scales["all"] == pytest.approx(max(scales["first"], scales["second"]), rel=0.1)
    assert scales["all"] >= scales["second"]


def test_per_step_ranges_bits_and_resuming_go_through_all(denoiser: Tokens, tmp_path: Path) -> None:
    samples = recorded(denoiser, [(4, 6, 5), (2, 12, 7)])
    recipe = recipes.minmax("w4a8", ranges=dmq_ao.Ranges.PER_STEP)
    digests = []
    for _ in range(2):
        prepared = dmq_ao.prepare(denoiser, recipe, samples.example(), backend="reference")
        report = dmq_ao.calibrate(prepared, samples, state_dir=tmp_path / "state", batch_size=3, progress=False)
        digests.append((report.samples, report.sqnr_db))
    assert report.resumed
    assert digests[0] == digests[1]
    assert dmq_ao.search_bits(prepared, samples, mean_bits=4.0, progress=False).summary()["mean_bits"] > 0


LEARNING: list[Callable[[str], dmq_ao.Recipe]] = [recipes.default, recipes.dmq, recipes.eda_dm]


@pytest.mark.parametrize("recipe", LEARNING)
def test_a_recipe_that_learns_wants_one_size(recipe: Callable[[str], dmq_ao.Recipe], denoiser: Tokens) -> None:
    samples = recorded(denoiser, [(4, 6, 5), (2, 12, 7)])
    prepared = dmq_ao.prepare(denoiser, recipe("w4a8"), samples.example(), backend="reference")
    words = (
        r"learns \(.*\) from samples of one size, and these are of 2: 12 rows of hidden_states \[6, 4\], text \[5, 6\]"
    )
    with pytest.raises(
        ValueError, match=words + r"; 6 rows .* Calibrate on the largest bucket, .*samples.buckets\[0\]"
    ):
        dmq_ao.calibrate(prepared, samples, progress=False)


def test_what_it_says_works(denoiser: Tokens) -> None:
    samples = recorded(denoiser, [(4, 6, 5), (2, 12, 7)])
    prepared = dmq_ao.prepare(denoiser, recipes.dmq("w8a8"), samples.example(), backend="reference")
    assert dmq_ao.calibrate(prepared, samples.buckets[0], progress=False).samples == 12


def test_a_unet_at_two_resolutions(tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]]) -> None:
    unet, inputs = tiny_unet2d_condition
    with record(unet) as recorder, torch.no_grad():
        for side, tokens in ((16, 7), (16, 9), (8, 7)):
            unet(torch.randn(2, 4, side, side), inputs["timestep"], torch.randn(2, tokens, 24))
    samples = recorder.calibration_set()
    assert len(samples.buckets) == 3
    prepared = dmq_ao.prepare(unet, recipes.minmax("w8a8", power_of_two=True), samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    quantized = dmq_ao.convert(prepared, "reference")
    for bucket in samples.buckets:
        arguments = next(bucket.batches(2))
        expected = unet(**arguments).sample.detach()
        assert float((quantized(**arguments).sample - expected).norm() / expected.norm()) < 0.05


def test_sizes_that_the_graph_does_not_take_are_named() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            if x.shape[1] > 8:
                raise RuntimeError("too long")
            return self.last(self.two(self.one(x + timestep.reshape(-1, 1, 1))))

    with record(Square()) as recorder, torch.no_grad():
        for tokens in (6, 8):
            recorder._observe(Square(), (torch.randn(2, tokens, 4), torch.zeros(2)), {})
        recorder._observe(Square(), (torch.randn(1, 12, 4), torch.zeros(1)), {})
    samples = recorder.calibration_set()
    net = Square().eval()
    prepared = dmq_ao.prepare(net, recipes.minmax("w8a8"), samples.example(), backend="reference")
    with pytest.raises(ValueError, match="the samples' shapes .*12.* do not fit"):
        dmq_ao.calibrate(prepared, samples, progress=False)


def _set(**changes: Any) -> CalibrationSet:
    values: dict[str, Any] = {"inputs": {"x": torch.zeros(2, 3)}, "shared": {"mode": "a"}}
    values |= {"timestep": torch.tensor([5, 4]), "step": torch.tensor([0, 1])}
    return CalibrationSet(**(values | changes))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: _set(inputs={"y": torch.zeros(2, 4)}), r"others must be sets of the same arguments, got .*y \["),
        (lambda: _set(shared={"mode": "b"}), "others must be sets of the same arguments"),
        (lambda: _set(timestep_arg="t"), "others must be sets of the same arguments"),
        (lambda: _set(others=(_set(),)), "others must be sets of the same arguments"),
        (lambda: _set(timestep=torch.tensor([5, 3])), "others must be of the same sampler"),
    ],
)
def test_others_must_go_together(other: Callable[[], CalibrationSet], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _set(others=(other(),))
