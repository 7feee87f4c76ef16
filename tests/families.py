"""Tiny denoisers of every family that diffusers has, with inputs of any batch and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


class Case:
    """A model, the inputs of any batch and size it takes, and those it was captured with."""

    def __init__(self, model: nn.Module, inputs: Callable[[int, int], Inputs], example: Inputs) -> None:
        self.model, self.inputs, self.example = model, inputs, example


def latents(batch: int, channels: int, size: int) -> Tensor:
    """Not square from size 3 on."""
    return torch.randn(batch, channels, 4 * size, 4 * size if size < 3 else 8 * size - 8)


def _text(batch: int, size: int, channels: int) -> Tensor:
    return torch.randn(batch, 5 + size, channels)


def _times(batch: int) -> Tensor:
    return torch.arange(batch) * 100 + 10


def stable_diffusion_unet() -> Any:
    """A UNet as in Stable Diffusion: skip concatenations, cross-attention."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=8,
    )


def flux_transformer(in_channels: int) -> Any:
    """Guidance is embedded."""
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def wan_transformer() -> Any:
    """Of video latents."""
    import diffusers

    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        rope_max_seq_len=32,
    )


def _unet2d(model: nn.Module) -> Case:
    def inputs(batch: int, size: int) -> Inputs:
        return {"sample": latents(batch, 3, 2 * size), "timestep": _times(batch)}

    return Case(model, inputs, inputs(2, 2))


def _stable_diffusion(model: nn.Module) -> Case:
    def inputs(batch: int, size: int) -> Inputs:
        return {
            "sample": latents(batch, 4, 2 * size),
            "timestep": _times(batch),
            "encoder_hidden_states": _text(batch, size, 24),
        }

    return Case(model, inputs, inputs(2, 2))


def _dit(model: nn.Module) -> Case:
    def inputs(batch: int, size: int) -> Inputs:
        del size  # its code turns the number of tokens into a Python number: it has the size it was captured at
        return {
            "hidden_states": torch.randn(batch, 4, 8, 8),
            "timestep": _times(batch),
            "class_labels": torch.arange(batch),
        }

    return Case(model, inputs, inputs(2, 2))


def _sdxl() -> Case:
    """Captured with a batch of one and a timestep without axes."""
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )

    def inputs(batch: int, size: int) -> Inputs:
        added = {"text_embeds": torch.randn(batch, 12), "time_ids": torch.rand(batch, 6)}
        return {
            "sample": latents(batch, 4, size),
            "timestep": _times(batch),
            "encoder_hidden_states": _text(batch, size, 24),
            "added_cond_kwargs": added,
        }

    return Case(model, inputs, inputs(1, 2) | {"timestep": torch.tensor(10)})


def _unet3d() -> Case:
    """Captured with a batch of one and a Python number as timestep."""
    import diffusers

    model = diffusers.UNet3DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock3D",),
        up_block_types=("UpBlock3D",),
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=4,
    )

    def inputs(batch: int, size: int) -> Inputs:
        frames = latents(batch * (size + 1), 4, size)
        return {
            "sample": frames.unflatten(0, (batch, size + 1)).transpose(1, 2),
            "timestep": _times(batch),
            "encoder_hidden_states": _text(batch, size, 16),
        }

    return Case(model, inputs, inputs(1, 2) | {"timestep": 10})


def _pixart() -> Case:
    """Positions of any size, the native one among them; a mask over tokens; conditions that are None."""
    import diffusers

    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )

    def inputs(batch: int, size: int) -> Inputs:
        return {
            "hidden_states": latents(batch, 4, size),
            "encoder_hidden_states": _text(batch, size, 12),
            "timestep": _times(batch),
            "encoder_attention_mask": (torch.arange(5 + size) < torch.arange(3, 3 + batch)[:, None]).float(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return Case(model, inputs, inputs(2, 2))


def _sd3() -> Case:
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
    )

    def inputs(batch: int, size: int) -> Inputs:
        return {
            "hidden_states": latents(batch, 4, size),
            "encoder_hidden_states": _text(batch, size, 12),
            "pooled_projections": torch.randn(batch, 10),
            "timestep": _times(batch),
        }

    return Case(model, inputs, inputs(2, 2))


def _flux() -> Case:
    """Captured with a batch of one; ids of image and text without a batch axis; timestep and guidance in 0..1."""
    model = flux_transformer(in_channels=4)

    def inputs(batch: int, size: int) -> Inputs:
        return {
            "hidden_states": torch.randn(batch, 8 * size, 4),
            "encoder_hidden_states": _text(batch, size, 12),
            "pooled_projections": torch.randn(batch, 10),
            "timestep": torch.rand(batch),
            "img_ids": torch.randn(8 * size, 3),
            "txt_ids": torch.zeros(5 + size, 3),
            "guidance": torch.rand(batch),
        }

    return Case(model, inputs, inputs(1, 2))


def _sana() -> Case:
    import diffusers

    model = diffusers.SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )

    def inputs(batch: int, size: int) -> Inputs:
        return {
            "hidden_states": latents(batch, 4, size),
            "encoder_hidden_states": _text(batch, size, 8),
            "timestep": _times(batch),
        }

    return Case(model, inputs, inputs(1, 2))


def _wan() -> Case:
    model = wan_transformer()

    def inputs(batch: int, size: int) -> Inputs:
        frames = latents(batch * (size + 1), 4, size)
        return {
            "hidden_states": frames.unflatten(0, (batch, size + 1)).transpose(1, 2),
            "timestep": _times(batch),
            "encoder_hidden_states": _text(batch, size, 8),
        }

    return Case(model, inputs, inputs(1, 2))


TINY = {"tiny_unet2d": _unet2d, "tiny_unet2d_condition": _stable_diffusion, "tiny_dit": _dit}
OWN = {
    "sdxl": _sdxl,
    "unet3d": _unet3d,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "sana": _sana,
    "wan": _wan,
}


def built(name: str) -> Case:
    """A case of ``OWN`` with no parameter at zero: a zeroed layer would hide what it is fed."""
    torch.manual_seed(0)
    case = OWN[name]()
    case.model.eval()
    for parameter in case.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return case
