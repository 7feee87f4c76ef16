"""Eight tiny pipelines of diffusers with random weights, called with embeddings of a prompt in place of its text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import families
import torch
from torch import Tensor, nn


class TinyPipeline:
    """A pipeline, how it is called, and the values of ``scale`` without guidance and with it."""

    def __init__(self, pipe: Any, call: dict[str, Any], scales: tuple[float, float], scale: str = "guidance_scale"):
        self.pipe, self.call, self.scales, self.scale = pipe, call, scales, scale
        pipe.set_progress_bar_config(disable=True)

    @property
    def part(self) -> str:
        """The denoiser's name in the pipeline."""
        return "unet" if hasattr(self.pipe, "unet") else "transformer"

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipe, self.part)

    def latents(self, steps: int, guided: bool, seed: int) -> Tensor:
        """What a run ends with before decoding, [1, ...]."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return self.pipe(
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
                **self.call,
                **{self.scale: self.scales[guided]},
            )[0]


def _prompt(dtype: torch.dtype, *shape: int, mask: bool = False, pooled: int = 0) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one; with a mask over tokens, or a pooled embedding."""
    generator = torch.Generator().manual_seed(7)
    embeddings: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        embeddings[f"{prefix}prompt_embeds"] = torch.randn(1, *shape, generator=generator).to(dtype)
        if mask:
            embeddings[f"{prefix}prompt_attention_mask"] = torch.ones(1, shape[0], dtype=torch.int64)
        if pooled:
            embeddings[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator).to(dtype)
    return embeddings


def _of_family(name: str) -> Any:
    return families.built(name).model


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _sd15(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    torch.manual_seed(0)
    unet = families.stable_diffusion_unet()
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return TinyPipeline(pipe, _prompt(dtype, 7, 24) | _square(64), (1.0, 5.0))


def _sdxl(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_of_family("sdxl"),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return TinyPipeline(pipe, _prompt(dtype, 7, 24, pooled=12) | _square(64), (1.0, 5.0))


def _sd3(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    encoders = dict.fromkeys(
        f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=_of_family("sd3"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, **encoders
    )
    return TinyPipeline(pipe, _prompt(dtype, 7, 12, pooled=10) | _square(64), (1.0, 5.0))


def _flux(dtype: torch.dtype) -> TinyPipeline:
    """Guidance is embedded; with it, a negative prompt is denoised as well."""
    import diffusers

    torch.manual_seed(0)
    transformer = families.flux_transformer(in_channels=16)
    pipe = diffusers.FluxPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    return TinyPipeline(pipe, _prompt(dtype, 7, 12, pooled=10) | _square(64), (1.0, 3.5), "true_cfg_scale")


def _pixart(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_of_family("pixart"),
        scheduler=diffusers.DDIMScheduler(),
    )
    call = _prompt(dtype, 7, 12, mask=True) | _square(64)
    return TinyPipeline(pipe, call | {"negative_prompt": None, "use_resolution_binning": False}, (1.0, 4.5))


def _sana(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    pipe = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_of_family("sana"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    call = _prompt(dtype, 7, 8, mask=True) | _square(256)
    return TinyPipeline(pipe, call | {"negative_prompt": None, "use_resolution_binning": False}, (1.0, 4.5))


def _wan(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_of_family("wan"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return TinyPipeline(pipe, _prompt(dtype, 7, 8) | _square(64) | {"num_frames": 5}, (1.0, 5.0))


def _ltx(dtype: torch.dtype) -> TinyPipeline:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    call = _prompt(dtype, 7, 12, mask=True) | _square(64) | {"num_frames": 9}
    return TinyPipeline(pipe, call, (1.0, 3.0))


TINY_PIPELINES: dict[str, Callable[[torch.dtype], TinyPipeline]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "sana": _sana,
    "wan": _wan,
    "ltx": _ltx,
}


def tiny_pipeline(name: str, dtype: torch.dtype = torch.float32) -> TinyPipeline:
    """With its denoiser in ``dtype`` as ``from_pretrained`` leaves it: some classes keep parts in float32."""
    tiny = TINY_PIPELINES[name](dtype)
    if dtype != torch.float32:
        with tempfile.TemporaryDirectory() as folder:
            tiny.denoiser.save_pretrained(folder)
            denoiser = type(tiny.denoiser).from_pretrained(folder, torch_dtype=dtype)
        tiny.pipe.register_modules(**{tiny.part: denoiser})
    return tiny
