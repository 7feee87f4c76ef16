"""Denoisers that need no files: known architectures with random weights, since speed does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from dmq_ao.samples import CalibrationSet
from dmq_ao.samples.values import Shared

STEPS, SEED = 4, 0


@dataclass(frozen=True)
class NamedDenoiser:
    """A denoiser by name, and what it is benchmarked with.

    Attributes:
        build: makes it, in eval mode; twice the same weights.
        noise: inputs [rows, ...] of so many rows but for the timestep, by the name of the argument.
        batch_size: rows of a call.
        samples: rows to calibrate on, a multiple of ``STEPS``.
        shared: inputs that all rows have in common.
    """

    build: Callable[[], nn.Module]
    noise: Callable[[int, Generator], dict[str, Tensor]]
    batch_size: int = 4
    samples: int = 16
    shared: Callable[[], dict[str, Shared]] = dict


def _with_seed(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make().eval()


def cifar_unet() -> nn.Module:
    """The UNet of DDPM on CIFAR-10: 36M parameters, 32x32 pixels."""
    import diffusers

    return _with_seed(
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

    return _with_seed(lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768))


def dit_s_2() -> nn.Module:
    """A DiT of the size S/2: 12 layers, 384 wide, 32x32 latents in patches of 2, noise and variance predicted."""
    import diffusers

    return _with_seed(
        lambda: diffusers.DiTTransformer2DModel(
            num_layers=12, num_attention_heads=6, attention_head_dim=64, out_channels=8
        )
    )


def sdxl_unet() -> nn.Module:
    """The UNet of Stable Diffusion XL: 2.6G parameters (10 GB), 128x128 latents, up to ten layers of attention."""
    import diffusers

    return _with_seed(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    )


def dit_xl_2() -> nn.Module:
    """A DiT of the size XL/2: 28 layers, 1152 wide, 32x32 latents in patches of 2, noise and variance predicted."""
    import diffusers

    return _with_seed(
        lambda: diffusers.DiTTransformer2DModel(
            num_layers=28, num_attention_heads=16, attention_head_dim=72, out_channels=8
        )
    )


def flux_blocks() -> nn.Module:
    """Two double and four single blocks of Flux: 3072 wide, 64x64 latents as 1024 tokens, and 512 of text."""
    import diffusers

    return _with_seed(
        lambda: diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=4, joint_attention_dim=1024, pooled_projection_dim=768
        )
    )


def _pixel_noise(rows: int, generator: Generator) -> dict[str, Tensor]:
    return {"sample": torch.randn(rows, 3, 32, 32, generator=generator)}


def _latents_and_text(rows: int, generator: Generator) -> dict[str, Tensor]:
    latents = torch.randn(rows, 4, 64, 64, generator=generator)
    return {"sample": latents, "encoder_hidden_states": torch.randn(rows, 77, 768, generator=generator)}


def _large_latents_and_text(rows: int, generator: Generator) -> dict[str, Tensor]:
    latents = torch.randn(rows, 4, 128, 128, generator=generator)
    return {"sample": latents, "encoder_hidden_states": torch.randn(rows, 77, 2048, generator=generator)}


def _packed_latents_and_text(rows: int, generator: Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(rows, 1024, 64, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 512, 1024, generator=generator),
        "pooled_projections": torch.randn(rows, 768, generator=generator),
    }


def _places() -> dict[str, Shared]:
    grid = torch.meshgrid(torch.zeros(1), torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return {"img_ids": torch.stack(grid, -1).reshape(-1, 3), "txt_ids": torch.zeros(512, 3)}


def _latents_and_label(rows: int, generator: Generator) -> dict[str, Tensor]:
    latents = torch.randn(rows, 4, 32, 32, generator=generator)
    return {"hidden_states": latents, "class_labels": torch.randint(1000, (rows,), generator=generator)}


NAMED: dict[str, NamedDenoiser] = {
    "cifar-unet": NamedDenoiser(cifar_unet, _pixel_noise),
    "sd15-unet": NamedDenoiser(sd15_unet, _latents_and_text, batch_size=2, samples=8),
    "sdxl-unet": NamedDenoiser(sdxl_unet, _large_latents_and_text, batch_size=2, samples=4),
    "dit-s-2": NamedDenoiser(dit_s_2, _latents_and_label),
    "dit-xl-2": NamedDenoiser(dit_xl_2, _latents_and_label, samples=8),
    "flux-blocks": NamedDenoiser(flux_blocks, _packed_latents_and_text, batch_size=2, samples=4, shared=_places),
}


def noise_samples(denoiser: NamedDenoiser) -> CalibrationSet:
    """Noise to calibrate on, at ``STEPS`` timesteps from 999 down to 0."""
    generator = torch.Generator().manual_seed(SEED)
    step = torch.arange(STEPS).repeat_interleave(denoiser.samples // STEPS)
    timestep = torch.linspace(999, 0, STEPS).long()[step]
    return CalibrationSet(denoiser.noise(len(step), generator), denoiser.shared(), timestep, step)


def named_denoiser(name: str) -> tuple[nn.Module, CalibrationSet]:
    """A denoiser that needs no files, with noise to calibrate on.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMED:
        raise ValueError(f"denoiser {name!r} is not known; the denoisers are {sorted(NAMED)}")
    return NAMED[name].build(), noise_samples(NAMED[name])
