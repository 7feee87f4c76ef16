"""Exporting diffusers' ``PatchEmbed`` (DiT, PixArt) for any picture size, not only the square one it was built for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_PATCH_EMBED = "diffusers.models.embeddings.PatchEmbed"


@contextmanager
def any_size(module: nn.Module) -> Iterator[None]:
    """For the time of an export, let diffusers' ``PatchEmbed`` work out its positions from the size it is given.

    It compares that size with its native one, then reads a table or computes one in a way that only squares export:
    the graph would serve one size.
    """
    patch_embeds = [m for m in module.modules() if f"{type(m).__module__}.{type(m).__name__}" == _PATCH_EMBED]
    tables = [
        m for m in patch_embeds if m.pos_embed is not None and not m.pos_embed_max_size and "forward" not in vars(m)
    ]
    try:
        for table in tables:
            table.forward = partial(_embed_patches, table)
        yield
    finally:
        for table in tables:
            vars(table).pop("forward", None)


def _embed_patches(table: Any, latent: Tensor) -> Tensor:
    """What ``PatchEmbed.forward`` computes: patches [B, C, H, W] as tokens, plus sines of their column and row."""
    height, width = (size // table.patch_size for size in latent.shape[-2:])
    tokens = table.proj(latent).flatten(2).transpose(1, 2)
    if table.layer_norm:
        tokens = table.norm(tokens)
    sines = sys.modules[type(table).__module__].get_1d_sincos_pos_embed_from_grid
    columns, rows = (
        sines(
            table.pos_embed.shape[-1] // 2,
            torch.arange(count, device=latent.device, dtype=torch.float32)
            / (count / table.base_size)
            / table.interpolation_scale,
        )
        for count in (width, height)
    )
    grid = torch.cat([columns.expand(height, -1, -1), rows.unsqueeze(1).expand(-1, width, -1)], dim=-1)
    positions = grid.reshape(1, height * width, -1).to(table.pos_embed.dtype)
    placed: Tensor = (tokens + positions).to(tokens.dtype)
    return placed
