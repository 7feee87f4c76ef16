"""``dmq-ao sample``: images of a pipeline, float or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmq_ao.cli.options import (
    AUTO_BACKEND,
    BackendOption,
    ControlPicture,
    Debug,
    Device,
    Dtype,
    FormatOption,
    GuidanceScale,
    Height,
    Lora,
    Mask,
    Model,
    NegativePrompt,
    NumFrames,
    Picture,
    Prompt,
    Seed,
    Steps,
    Width,
    call_conditions,
    examples,
    open_pipeline,
)
from dmq_ao.cli.terminal import Format, emit

SAMPLE_EXAMPLES = examples(
    "dmq-ao sample out/ -o grid.png",
    "dmq-ao sample demo -o pictures/ --num 64 --seed 1000",
    "dmq-ao sample out/ -o grid.png --device cuda --backend cuda",
)


def sample_command(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="A .png file for a grid, else a folder.")],
    num: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    steps: Steps = 20,
    seed: Seed = 0,
    prompt: Prompt = None,
    image: Picture = None,
    mask: Mask = None,
    control_image: ControlPicture = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    num_frames: NumFrames = None,
    lora: Lora = None,
    backend: BackendOption = AUTO_BACKEND,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep 4-bit codes packed in memory: half the bytes, slower calls.")
    ] = False,
    device: Device = "cpu",
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="Dtype of the float parts; default: that of a quantized denoiser, else float32."),
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the denoiser first.")] = False,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Draw images with a pipeline, float or quantized.

    A seed gives the same image in any batch, so grids of two pipelines can be laid side by side.
    """
    from dmq_ao.cli import gallery
    from dmq_ao.pipelines import adapter

    conditions = call_conditions(
        prompt,
        image=image,
        mask=mask,
        control_image=control_image,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
    )
    pipeline = open_pipeline(model, conditions, backend, packed, device, dtype, lora)
    if compile_:
        adapter.compile_denoiser(pipeline)
    seeds = range(seed, seed + num)
    images = adapter.sample(pipeline, seeds, steps=steps, prompt=conditions, progress=True)
    files = [str(path) for path in gallery.write_images(images, seeds, out)]
    text = files[0] if len(files) == 1 else f"{len(files)} pictures in {out}"
    emit({"model": model, "seeds": list(seeds), "steps": steps, "files": files}, lambda: text, form)
