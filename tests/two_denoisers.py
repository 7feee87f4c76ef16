"""A tiny random pipeline of two denoisers, as Wan 2.2 has them: one for the noisy steps, one for the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import families
import torch
from torch import nn


class TinyWan22(diffusers.DiffusionPipeline):
    """Denoises video latents [B, 4, 2, 4, 8], guided by two calls, and draws their first three channels: no VAE."""

    _optional_components: ClassVar[list[str]] = ["transformer", "transformer_2"]

    def __init__(
        self,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler, transformer=transformer, transformer_2=transformer_2)
        self.register_to_config(boundary_ratio=boundary_ratio)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 4,
        generator: Any = None,
        output_type: str = "np",
    ) -> Any:
        x = torch.stack([torch.randn(4, 2, 4, 8, generator=one) for one in generator])
        text = torch.stack([torch.full((6, 8), 0.01 * len(one)) for one in prompt])
        boundary = None if self.config.boundary_ratio is None else self.config.boundary_ratio * 1000
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noisy = boundary is None or t >= boundary
            denoiser = self.transformer if noisy else self.transformer_2
            times = t.expand(len(x))
            noise, blank = (
                denoiser(hidden_states=x, timestep=times, encoder_hidden_states=one, return_dict=False)[0]
                for one in (text, 0 * text)
            )
            x = self.scheduler.step(blank + guidance_scale * (noise - blank), t, x, return_dict=False)[0]
        return SimpleNamespace(frames=x if output_type == "latent" else x[:, :3].movedim(1, -1).sigmoid().numpy())


def tiny_wan(boundary_ratio: float | None = 0.5, scheduler: Any = None) -> TinyWan22:
    """With random weights; its own scheduler visits 1000, 667, 334 and 1 in four steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoisers = [_transformer() for _ in range(2)]
    pipeline = TinyWan22(None, scheduler or diffusers.FlowMatchEulerDiscreteScheduler(), *denoisers, boundary_ratio)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer() -> nn.Module:
    model = families.wan_transformer()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()
