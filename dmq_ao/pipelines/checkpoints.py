"""Pipelines of one file, and LoRA weights fused into a float pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dmq_ao.config import InvalidFile

SAFE = ".safetensors"


def pipeline_of_file(file: Path, dtype: torch.dtype) -> Any:
    """A pipeline from a single checkpoint file, as other tools share them.

    What the file does not hold (configs, tokenizers) comes from the Hub, or from its cache.

    Raises:
        InvalidFile: for another format than safetensors, or a file that diffusers does not know.
    """
    if file.suffix != SAFE:
        raise InvalidFile(f"{file}: only {SAFE} checkpoints are read, others can hold code; convert it first")
    try:
        return _pipeline_class(file).from_single_file(str(file), dtype=dtype)
    except Exception as error:  # diffusers' own, of any type: about the file, or about what it wants from the Hub
        raise InvalidFile(
            f"{file}: diffusers does not load it as a whole pipeline ({error!r}); it holds a part alone, is of an"
            " unknown kind, or its configs are neither cached nor to be downloaded: give a diffusers pipeline folder"
        ) from error


def _pipeline_class(file: Path) -> Any:
    """The class that diffusers takes for a checkpoint with such tensors."""
    import diffusers
    from diffusers.loaders import single_file_utils as known

    checkpoint = known.load_single_file_checkpoint(str(file))
    repository = known.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    name = diffusers.DiffusionPipeline.load_config(repository)["_class_name"]
    return getattr(diffusers, name)


def fuse_lora(pipeline: Any, lora: str | Path) -> None:
    """Add LoRA weights to a float pipeline's own, so that they are quantized with them.

    Args:
        pipeline: float; it is changed.
        lora: a file or folder, as ``load_lora_weights`` of diffusers takes it.

    Raises:
        ValueError: for a pipeline that takes none, peft that is not installed, or weights that do not fit.
    """
    name = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{name} takes no LoRA weights; leave them out")
    try:
        pipeline.load_lora_weights(str(lora))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except Exception as error:  # of any type: diffusers', peft's or safetensors'
        missing = "; install with: pip install peft" if "peft" in str(error).lower() else ""
        raise ValueError(f"{lora}: {name} does not take these LoRA weights ({error}){missing}") from error
