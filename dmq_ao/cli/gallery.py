"""Samples of a pipeline as picture files."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from dmq_ao.evaluation import image_grid
from dmq_ao.evaluation.pictures import pixel_rows, png
from dmq_ao.evaluation.report import write_whole

GRID_COLUMNS = 8
FRAME_MS = 125


def write_images(images: Tensor, seeds: Sequence[int], out: str | Path) -> list[Path]:
    """Write one grid, or one picture a seed.

    Args:
        images: [seeds, C, H, W] in 0..1, or videos [seeds, frames, C, H, W].
        seeds: that they were drawn from.
        out: a file ``*.png`` for a grid of eight a row, else a folder for ``seed_0.png`` and so on; of videos a folder
            for ``seed_0.gif`` and so on, and the grid has a video's frames one after the other.

    Returns:
        The files that were written.
    """
    out = Path(out)
    if images.dim() == 5 and out.suffix.lower() != ".png":
        out.mkdir(parents=True, exist_ok=True)
        return [_write_video(video, out / f"seed_{seed}.gif") for seed, video in zip(seeds, images, strict=True)]
    if images.dim() == 5:
        frames = images.shape[1]
        images, seeds = images.flatten(0, 1), [seed for seed in seeds for _ in range(frames)]
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        return [write_whole(out, image_grid(_grid_rows(images, seeds)))]
    out.mkdir(parents=True, exist_ok=True)
    pixels = pixel_rows({"samples": images})["samples"]
    return [write_whole(out / f"seed_{seed}.png", png(image)) for seed, image in zip(seeds, pixels, strict=True)]


def _write_video(frames: Tensor, file: Path) -> Path:
    """Frames [N, C, H, W] as an animation, eight a second."""
    from PIL import Image

    pictures = [Image.open(BytesIO(png(pixels))) for pixels in pixel_rows({"frames": frames})["frames"]]
    data = BytesIO()
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0)
    return write_whole(file, data.getvalue())


def _grid_rows(images: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Rows of equal length; the last is filled up with white."""
    width = min(GRID_COLUMNS, len(images))
    blank = torch.ones(-len(images) % width, *images.shape[1:])
    rows = torch.cat([images, blank]).split(width)
    parts = [seeds[start : start + width] for start in range(0, len(seeds), width)]
    return {f"seeds {part[0]}-{part[-1]}": row for part, row in zip(parts, rows, strict=True)}
