"""SHA-256 of what each recipe writes for the tiny UNet of the tests, to compare two commits: python tests/digests.py

The tensors and the graph of a folder; its config holds versions, and sets of names in an order of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

import dmq_ao
from dmq_ao import Recipe, recipes

TENSORS, GRAPH = "diffusion_pytorch_model.safetensors", "graph.json"
STEPS = (900, 600, 300, 0)


def short(recipe: Recipe) -> Recipe:
    """The same recipe with few gradient steps."""
    changes: dict[str, Any] = {}
    for name in ("scaling", "rounding", "blocks", "distillation"):
        stage = getattr(recipe, name)
        if stage is not None:
            shorter = {"steps": 6} | ({"passes": 0, "checks": 2} if name == "distillation" else {})
            changes[name] = dataclasses.replace(stage, **shorter)
    return dataclasses.replace(recipe, **changes)


def subject() -> tuple[torch.nn.Module, dmq_ao.CalibrationSet]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    select = dmq_ao.Selection(window=2)
    with dmq_ao.record(unet, num_samples=16, select=select) as recorder, torch.no_grad():
        x = torch.randn(4, 3, 16, 16)
        for step in STEPS:
            unet(x * (1 - step / 1800), torch.full((4,), step))
    return unet, recorder.calibration_set()


def main() -> None:
    """A line a recipe."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    unet, samples = subject()
    wanted = {f"minmax {bits}": recipes.minmax(bits) for bits in ("w8a8", "w4a8", "w2a4", "w4a16")}
    wanted["minmax votes"] = recipes.minmax("w4a8", power_of_two=True, embeddings=True)
    for name in ("dmq", "eda_dm", "mpq_dm", "default"):
        wanted[name] = short(recipes.ALL_RECIPES[name]("w4a8"))
    for name in ("dmq", "eda_dm", "mpq_dm"):
        wanted[f"{name} reference"] = short(recipes.ALL_RECIPES[name]("w4a8", compat="reference"))
    for name, recipe in wanted.items():
        prepared = dmq_ao.prepare(unet, recipe, samples.example(), backend="reference")
        dmq_ao.calibrate(prepared, samples, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            dmq_ao.save(dmq_ao.convert(prepared, "reference"), folder)
            digests = [
                hashlib.sha256((Path(folder) / file).read_bytes()).hexdigest()[:16] for file in (TENSORS, GRAPH)
            ]
        print(f"{name:18s}", *digests, flush=True)


if __name__ == "__main__":
    main()
