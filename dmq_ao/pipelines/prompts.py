"""What a pipeline is told beside a seed: a text, a class, or how many images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from dmq_ao.api.arguments import denoiser_name
from dmq_ao.pipelines.conditions import Conditions

Prompts = str | Sequence[str] | Conditions | None
"""One text for all images, or several that seeds take in turn; for pipelines of classes their numbers or names; and
``Conditions`` for all else that a call is given."""


def call_arguments(pipeline: Any, seeds: Sequence[int], prompt: Prompts) -> dict[str, Any]:
    """Keyword arguments of a call that draws one image a seed.

    Seed ``s`` takes prompt ``s % len(prompts)``, the same in any batch. Pipelines of classes (DiT) that are given none
    draw class ``s % number of classes``.

    Raises:
        ValueError: when the pipeline wants a prompt and there is none, or the other way round; for a class that it
            does not know; for a pipeline that starts from a picture, and there is none.
    """
    conditions = prompt if isinstance(prompt, Conditions) else Conditions(prompt)
    parameters = inspect.signature(pipeline.__call__).parameters
    rest = conditions.arguments(pipeline, parameters, seeds)
    _check_needs(pipeline, parameters, rest)
    return {**_texts(pipeline, parameters, seeds, conditions.prompt, "image" in rest), **rest}


def _check_needs(pipeline: Any, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> None:
    """Refuse a call without the pictures that the pipeline starts from."""
    for name, option in (("image", "image"), ("mask_image", "mask"), ("control_image", "control_image")):
        if name in arguments or name not in parameters or not _starts_from(type(pipeline).__name__, name, parameters):
            continue
        raise ValueError(
            f"{type(pipeline).__name__} needs {option.replace('_', ' ')}: a picture, a folder of them, or 'noise'"
            f" (Conditions({option}=...), --{option.replace('_', '-')}); or wrap its own loop in"
            " dmq_ao.record(denoiser), then prepare, calibrate and convert the denoiser"
        )


def _starts_from(pipeline: str, name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a pipeline cannot do without a picture. diffusers gives most of them a default of None all the same."""
    if parameters[name].default is inspect.Parameter.empty:
        return True
    words: dict[str, tuple[str, ...]] = {
        "image": ("Img2Img", "Inpaint", "Upscale", "SuperRes", "ControlNet", "InstructPix2Pix", "Depth2Img"),
        "mask_image": ("Inpaint",),
        "control_image": ("ControlNet",),
    }
    return any(word in pipeline for word in words[name])


def _texts(
    pipeline: Any,
    parameters: Mapping[str, inspect.Parameter],
    seeds: Sequence[int],
    prompt: str | Sequence[str] | None,
    counted: bool,
) -> dict[str, Any]:
    """Prompts, classes or the number of images; nothing where pictures are ``counted`` already."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    name = type(pipeline).__name__
    count = {"batch_size": len(seeds)} if "batch_size" in parameters else {}
    classes = range(_classes(pipeline) if "class_labels" in parameters else 0)
    if classes:
        labels = [_label(pipeline, text, classes) for text in prompts] or classes
        return {"class_labels": [labels[seed % len(labels)] for seed in seeds], **count}
    if prompts and "prompt" not in parameters:
        raise ValueError(f"{name} does not take a prompt; leave it out")
    if prompts:
        return {"prompt": [prompts[seed % len(prompts)] for seed in seeds]}
    if count:
        return count
    if "prompt" in parameters:
        raise ValueError(f"{name} needs a prompt; give one (prompt=, or --prompt)")
    if counted:
        return {}
    raise ValueError(
        f"{name} takes {', '.join(parameters)}, neither a prompt nor class_labels nor batch_size; wrap its own loop in"
        " dmq_ao.record(denoiser), then prepare, calibrate and convert the denoiser"
    )


def _classes(pipeline: Any) -> int:
    """How many classes the denoiser knows; 0 for none."""
    config = getattr(pipeline, denoiser_name(pipeline)).config
    return next((config[key] for key in ("num_embeds_ada_norm", "num_class_embeds") if config.get(key)), 0)


def _label(pipeline: Any, text: str, classes: range) -> int:
    labels: dict[str, int] = getattr(pipeline, "labels", None) or {}
    label = labels.get(text, int(text) if text.isdecimal() else None)
    if label is None or label not in classes:
        names = f" or one of {len(labels)} names, such as {next(iter(labels))!r}" if labels else ""
        raise ValueError(f"{type(pipeline).__name__} takes class numbers 0 to {classes[-1]}{names}; got {text!r}")
    return label
