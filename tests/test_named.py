"""Denoisers by name: the sizes they claim, inputs they take, the same weights and noise each time."""

from __future__ import annotations

import pytest
import torch

from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.named import NAMED, STEPS, named_denoiser, noise_samples

pytest.importorskip("diffusers")

EXPECTED = {  # million parameters, and the shape of an output row
    "cifar-unet": (35.7, (3, 32, 32)),
    "sd15-unet": (859.5, (4, 64, 64)),
    "sdxl-unet": (2562.2, (4, 128, 128)),
    "dit-s-2": (39.8, (8, 32, 32)),
    "dit-xl-2": (749.8, (8, 32, 32)),
    "flux-blocks": (1290.5, (1024, 64)),
}


def test_all_are_expected() -> None:
    assert NAMED.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_a_named_denoiser_takes_its_noise(name: str) -> None:
    named = NAMED[name]
    with torch.device("meta"):  # the largest has 10 GB of weights
        net = named.build()
    millions, shape = EXPECTED[name]
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert not net.training
    inputs = first_rows(noise_samples(named), named.batch_size)
    result = net(**{argument: value.to("meta") for argument, value in inputs.items()})
    assert result[0].shape == (named.batch_size, *shape)


@pytest.mark.parametrize("name", NAMED)
def test_noise_is_the_same_each_time(name: str) -> None:
    samples = noise_samples(NAMED[name])
    assert len(samples) == NAMED[name].samples
    assert samples.timesteps.tolist() == [999, 666, 333, 0]
    assert torch.bincount(samples.step).tolist() == [NAMED[name].samples // STEPS] * STEPS
    assert samples.digest() == noise_samples(NAMED[name]).digest()


def test_weights_are_the_same_each_time_and_make_an_output() -> None:
    before = torch.random.get_rng_state()
    net, samples = named_denoiser("dit-s-2")
    assert torch.equal(torch.random.get_rng_state(), before)
    again = NAMED["dit-s-2"].build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        result = net(**first_rows(samples, 2))[0]
    assert result.std() > 0.1
    assert not torch.allclose(result[0], result[1], atol=0.1)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"denoiser 'x' is not known; the denoisers are \['cifar-unet'"):
        named_denoiser("x")
