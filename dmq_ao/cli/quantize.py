"""``dmq-ao quantize``: a pipeline in, a pipeline with an integer denoiser out."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dmq_ao import recipes
from dmq_ao.cli.options import (
    AUTO_BACKEND,
    BackendOption,
    Bits,
    ControlPicture,
    Debug,
    Device,
    Dtype,
    DtypeOption,
    FormatOption,
    GuidanceScale,
    Height,
    Lora,
    Mask,
    Model,
    NegativePrompt,
    NumFrames,
    ObserverName,
    Picture,
    Prompt,
    Seed,
    Steps,
    Width,
    call_conditions,
    examples,
    open_pipeline,
)
from dmq_ao.cli.terminal import Format, emit, option_values, say
from dmq_ao.config import BitAllocation, Override, Ranges, Recipe, SelectMethod

QUANTIZE_EXAMPLES = examples(
    "dmq-ao quantize demo -o out/",
    "dmq-ao quantize ./my-ddpm -o out/ --recipe default --bits w4a8 --trajectories 64",
    "dmq-ao quantize ./my-ddpm -o out/ --bits w4a8 --power-of-two --steps 50",
    "dmq-ao quantize ./my-ddpm -o out/ --recipe default --select tdac --trajectories 64",
    "dmq-ao quantize ./my-ddpm -o out/ --recipe mpq_dm --bits w3a6 --mean-bits 3.3",
    "dmq-ao quantize ./my-ddpm -o out/ --recipe mpq_dm --bits w3a6 --bit-plan edited.json",
    "dmq-ao quantize ./my-ddpm -o out/ --keep-float '*to_out*' --dry-run",
    "dmq-ao quantize ./my-sd -o out/ --prompt @prompts.txt --dtype bfloat16 --device cuda --backend cuda",
)


def quantize_command(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Pipeline folder to write: absent or empty.")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"Method: {', '.join(recipes.ALL_RECIPES)}.")] = "minmax",
    bits: Bits = "w4a8",
    power_of_two: Annotated[
        bool | None,
        typer.Option("--power-of-two/--no-power-of-two", help="Channel exponents where skip connections join."),
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option("--embeddings/--no-embeddings", help="Time and label embeddings at 8 bits, instead of in float."),
    ] = None,
    ranges: Annotated[Ranges | None, typer.Option(help="When activation ranges are decided.")] = None,
    observer: Annotated[ObserverName | None, typer.Option(help="Range estimator.")] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="More layers to leave in float; repeatable.")
    ] = None,
    mean_bits: Annotated[
        float | None,
        typer.Option(help="Mean bits of weights below 8 bits; each output channel gets what saves most error."),
    ] = None,
    denoisers: Annotated[
        list[str] | None,
        typer.Option("--denoiser", metavar="NAME", help="Of two denoisers only this one (transformer_2); repeatable."),
    ] = None,
    bit_plan: Annotated[
        Path | None, typer.Option(help="Bits of each output channel: a bit_plan.json of an earlier run, or edited.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, spread over the timesteps.")] = 256,
    trajectories: Annotated[
        int | None,
        typer.Option(min=1, help="Trajectories to take the samples from; more make learning recipes generalise."),
    ] = None,
    select: Annotated[
        SelectMethod | None,
        typer.Option(help="Share of each timestep in the samples; tdac looks at the denoiser's features."),
    ] = None,
    steps: Steps = 20,
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
    seed: Seed = 0,
    backend: BackendOption = AUTO_BACKEND,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    max_memory: Annotated[
        float | None,
        typer.Option(min=0.01, help="GiB of intermediate values that learning recipes hold; the rest goes to disk."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep progress here: the same command resumes an interrupted calibration.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show layers, bits and bytes; write nothing.")] = False,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Quantize a pipeline's denoiser after training.

    Calibration samples are recorded from the pipeline's own sampler; ranges and exponents are decided on them; the
    pipeline is written with packed integers and a report.json. Loading it needs no float weights.
    """
    parameters: dict[str, Any] = {"power_of_two": power_of_two, "embeddings": embeddings, "ranges": ranges}
    parameters["observer"] = observer and observer.value
    with option_values():
        method = _recipe(recipe, bits, parameters, keep_float or [], samples)
    with option_values():
        if select is not None:
            method = replace(method, select=replace(method.select, method=select))
        if mean_bits is not None:
            method = replace(method, allocation=replace(method.allocation or BitAllocation(), mean_bits=mean_bits))
    if out is None and not dry_run:
        raise typer.BadParameter("required, unless --dry-run is given", param_hint="--output")
    from dmq_ao.api.arguments import denoiser_names
    from dmq_ao.cli import output
    from dmq_ao.mixed_precision.bit_plan import BitPlan
    from dmq_ao.pipelines import ptq
    from dmq_ao.pipelines.adapter import check_free
    from dmq_ao.pipelines.layer_names import check_layer_patterns

    if out is not None:
        check_free(out)
    plan = None if bit_plan is None else BitPlan.load(bit_plan)
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
    pipeline = open_pipeline(model, conditions, device=device, dtype=dtype, lora=lora)
    names = denoisers or list(denoiser_names(pipeline))
    with option_values("--denoiser"):
        ptq.check_denoisers(pipeline, names)
    with option_values("--keep-float"):
        for name in names:
            check_layer_patterns(getattr(pipeline, name), keep_float or [])
    say(f"{model}: export {'the denoiser' if len(names) == 1 else ' and '.join(names)}")
    with option_values():
        prepared = ptq.prepare_pipeline(
            pipeline,
            method,
            prompt=conditions,
            seed=seed,
            backend=backend.value,
            steps=steps,
            denoisers=names,
        )
    if dry_run or out is None:
        report = ptq.forecast(pipeline, prepared, method, steps)
        return emit(report, lambda: output.forecast_text(report), form)
    report = ptq.quantize_pipeline(
        pipeline,
        prepared,
        method,
        out,
        recording=ptq.Recording(steps=steps, prompt=conditions, seed=seed, trajectories=trajectories),
        backend=backend.value,
        batch_size=batch_size,
        state_dir=state_dir,
        max_memory=None if max_memory is None else int(max_memory * 2**30),
        bits=plan,
    )
    return emit({"model": model, **report}, lambda: output.quantize_text(report), form)


def _recipe(name: str, bits: str, parameters: dict[str, Any], keep_float: list[str], samples: int) -> Recipe:
    """A recipe by name, with those of its own parameters that are not None.

    Raises:
        ValueError: for an unknown recipe, bits, or a parameter that the recipe does not have.
    """
    if name not in recipes.ALL_RECIPES:
        raise ValueError(f"recipe {name!r} is not known; the recipes are {sorted(recipes.ALL_RECIPES)}")
    build = recipes.ALL_RECIPES[name]
    arguments = {key: value for key, value in parameters.items() if value is not None}
    foreign = sorted(arguments.keys() - inspect.signature(build).parameters.keys())
    if foreign:
        raise ValueError(f"recipe {name!r} sets {', '.join(foreign)} itself; leave the options out")
    recipe = build(bits, **arguments)
    overrides = (Override(pattern, keep_float=True) for pattern in keep_float)  # last, so that they win
    config = replace(recipe.config, overrides=(*recipe.config.overrides, *overrides))
    return replace(recipe, config=config, num_samples=samples)
