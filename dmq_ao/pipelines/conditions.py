"""What a pipeline's call is given beside seeds and steps: prompts, images to start from, sizes, guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

NOISE = "noise"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DEFAULT_SIDE = 64
# Pipelines that take no list of pictures.
_TENSORS_ALONE = ("LDMSuperResolution",)
_MULTIPLE = 32  # of their sides


@dataclass(frozen=True)
class Conditions:
    """Arguments of a call by what they mean; None leaves the pipeline's own default.

    Attributes:
        prompt: a text, or several that the seeds take in turn; classes by number or name.
        negative_prompt: what not to draw, for all seeds.
        guidance_scale: of classifier-free guidance.
        image: to start from: a file, a folder whose pictures the seeds take in turn, or ``"noise"``.
        mask: where to paint, white; as ``image``.
        control_image: of a ControlNet; as ``image``.
        height: of the result, in pixels, of the pictures, and of noise; pipelines that take the size of their pictures
            are given these alone.
        width: see there.
        num_frames: of a video.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    image: str | None = None
    mask: str | None = None
    control_image: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    def describe(self) -> Any:
        """In plain values, for a report: the prompt alone where there is nothing else."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        rest = {name: value for name, value in values.items() if value is not None and name != "prompt"}
        return {"prompt": self.prompt, **rest} if rest else self.prompt

    def arguments(self, pipeline: Any, parameters: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of a call on ``seeds``, prompts aside.

        Raises:
            ValueError: for something that the pipeline's call does not take, or pictures that are not there.
        """
        numbers = {name: getattr(self, name) for name in ("guidance_scale", "height", "width", "num_frames")}
        arguments = {name: value for name, value in numbers.items() if value is not None}
        if self.negative_prompt is not None:
            arguments["negative_prompt"] = [self.negative_prompt] * len(seeds)
        control = "control_image" if "control_image" in parameters else "image"
        sources = {"image": (self.image, "RGB"), "mask_image": (self.mask, "L"), control: (self.control_image, "RGB")}
        if self.control_image is None:
            sources["image"] = (self.image, "RGB")
        elif control == "image" and self.image is not None:
            raise ValueError(f"{type(pipeline).__name__} takes one image; leave image or control_image out")
        size = self._size(pipeline)
        for name, (source, mode) in sources.items():
            if source is not None:
                arguments[name] = [_picture(source, seed, mode, size, self._resized) for seed in seeds]
        if "image" in arguments and type(pipeline).__name__.startswith(_TENSORS_ALONE):
            arguments["image"] = _as_tensor_batch(arguments["image"])
        resized = () if self.image is None and self.control_image is None else ("height", "width")
        arguments = {name: x for name, x in arguments.items() if name in parameters or name not in resized}
        unknown = [name for name in arguments if name not in parameters]
        if unknown:
            raise ValueError(
                f"{type(pipeline).__name__} does not take {', '.join(unknown)}; leave it out. It takes"
                f" {', '.join(parameters)}"
            )
        return arguments

    @property
    def _resized(self) -> bool:
        return self.height is not None or self.width is not None

    def _size(self, pipeline: Any) -> tuple[int, int]:
        """Width and height in pixels: as asked for, else what the pipeline's denoiser was made for."""
        denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        side = getattr(getattr(denoiser, "config", None), "sample_size", None)
        own = side * int(getattr(pipeline, "vae_scale_factor", 1)) if isinstance(side, int) else _DEFAULT_SIDE
        return self.width or own, self.height or own


def _picture(source: str, seed: int, mode: str, size: tuple[int, int], resized: bool) -> Any:
    """The picture of a seed, as PIL has it."""
    from PIL import Image

    if source == NOISE:
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        values = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(values.numpy() if mode == "RGB" else (values > 127).mul(255).byte().numpy(), mode)
    files = _files(Path(source))
    try:
        with Image.open(files[seed % len(files)]) as image:
            picture = image.convert(mode)
    except OSError as error:
        raise ValueError(f"{files[seed % len(files)]} is no picture that can be read ({error})") from error
    return picture.resize(size) if resized else picture


def _as_tensor_batch(pictures: Sequence[Any]) -> torch.Tensor:
    """Pictures as [B, 3, H, W] in -1..1, cut to multiples of 32 as these pipelines do with a single one."""
    from PIL import Image

    sizes = {tuple(side - side % _MULTIPLE for side in picture.size) for picture in pictures}
    if len(sizes) > 1 or not all(next(iter(sizes))):
        raise ValueError(
            f"the pictures become {sorted(sizes)} pixels, and the pipeline takes one size, of {_MULTIPLE} or more:"
            " give height and width (--height, --width)"
        )
    resized = [picture.resize(next(iter(sizes)), resample=Image.Resampling.LANCZOS) for picture in pictures]
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in resized])
    return 2 * pixels.permute(0, 3, 1, 2).float() / 255 - 1


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in PICTURES) if source.is_dir() else []
    if not files:
        raise ValueError(
            f"{source} is no picture and no folder of {', '.join(PICTURES)}; give one of them, or {NOISE!r}"
        )
    return files
