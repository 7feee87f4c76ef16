"""Diffusers models that were changed since they were built: refused at ``save``, not at ``load``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes

Tiny = tuple[nn.Module, dict[str, Tensor]]


class LowRank(nn.Module):
    """A layer with a low-rank part beside it, as adapters have."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> None:
    feed = model.get_submodule("transformer_blocks.0.ff.net.0")
    feed.proj = LowRank(feed.proj)


def joined(model: nn.Module) -> None:
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()


def extended(model: nn.Module) -> None:
    model.register_buffer("ip_scale", torch.ones(2))


def shortened(model: nn.Module) -> None:
    del model.transformer_blocks[1]


@pytest.mark.parametrize("change", [adapted, joined, extended, shortened])
def test_a_changed_model_is_refused_at_save(
    tiny_dit: Tiny, change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny_dit[0])
    change(model)
    prepared = dmq_ao.prepare(model.eval(), recipes.minmax("w8a16"), tiny_dit[1])
    quantized = dmq_ao.convert(prepared, "reference")
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel was changed since .* Before dmq_ao.prepare: of LoRA"):
        dmq_ao.save(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unchanged_one_is_saved_and_loaded(tiny_dit: Tiny, tmp_path: Path) -> None:
    quantized = dmq_ao.convert(dmq_ao.prepare(tiny_dit[0], recipes.minmax("w8a16"), tiny_dit[1]), "reference")
    dmq_ao.save(quantized, tmp_path)
    loaded = dmq_ao.load(tmp_path, backend="reference")
    assert torch.equal(loaded(**tiny_dit[1]).sample, quantized(**tiny_dit[1]).sample)
