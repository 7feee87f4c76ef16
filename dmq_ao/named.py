"""Denoisers that need no files: known architectures with random weights, since speed does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from dmq_ao.calibration import CalibrationSet

STEPS, SEED = 4, 0


@dataclass(frozen=True)
class Named:
    """A denoiser by name, and what it is benchmarked with.

    Attributes:
        build: makes it, in eval mode; twice the same weights.
        noise: inputs of so many rows but for the timestep, by the name of the argument.
        batch_size: rows of a call.
        samples: rows to calibrate on, a multiple of ``STEPS``.
    """

    build: Callable[[], nn.Module]
    noise: Callable[[int, Generator], dict[str, Tensor]]
    batch_size: int = 4
    samples: int = 16


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make().eval()


def cifar_unet() -> nn.Module:
    """The UNet of DDPM on CIFAR-10: 36M parameters, 32x32 pixels."""
    import diffusers

    return _seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            attention_head_dim=64,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    )


def sd15_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1.5: 860M parameters (3.4 GB), 64x64 latents, cross-attention to 77 tokens."""
    import diffusers

    return _seeded(lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768))


def dit_s_2() -> nn.Module:
    """A DiT of the size S/2: 12 layers, 384 wide, 32x32 latents in patches of 2, noise and variance predicted."""
    import diffusers

    return _seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_layers=12, num_attention_heads=6, attention_head_dim=64, out_channels=8
        )
    )


def _pixels(rows: int, generator: Generator) -> dict[str, Tensor]:
    return {"sample": torch.randn(rows, 3, 32, 32, generator=generator)}


def _latents_and_text(rows: int, generator: Generator) -> dict[str, Tensor]:
    latents = torch.randn(rows, 4, 64, 64, generator=generator)
    return {"sample": latents, "encoder_hidden_states": torch.randn(rows, 77, 768, generator=generator)}


def _latents_and_label(rows: int, generator: Generator) -> dict[str, Tensor]:
    latents = torch.randn(rows, 4, 32, 32, generator=generator)
    return {"hidden_states": latents, "class_labels": torch.randint(1000, (rows,), generator=generator)}


NAMED: dict[str, Named] = {
    "cifar-unet": Named(cifar_unet, _pixels),
    "sd15-unet": Named(sd15_unet, _latents_and_text, batch_size=2, samples=8),
    "dit-s-2": Named(dit_s_2, _latents_and_label),
}


def noise_samples(named: Named) -> CalibrationSet:
    """Noise to calibrate on, at ``STEPS`` timesteps from 999 down to 0."""
    generator = torch.Generator().manual_seed(SEED)
    step = torch.arange(STEPS).repeat_interleave(named.samples // STEPS)
    timestep = torch.linspace(999, 0, STEPS).long()[step]
    return CalibrationSet(named.noise(len(step), generator), {}, timestep, step)


def named_denoiser(name: str) -> tuple[nn.Module, CalibrationSet]:
    """A denoiser that needs no files, with noise to calibrate on.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMED:
        raise ValueError(f"no denoiser is called {name!r}; there are {sorted(NAMED)}")
    return NAMED[name].build(), noise_samples(NAMED[name])
