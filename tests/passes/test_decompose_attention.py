"""Attention written out is the same; quantized, it is what its codes stand for, in every part of the flow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import assert_same_records, graph_arguments, record, relative, small
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import dmq_ao
from dmq_ao import graph
from dmq_ao.algorithms.blocks import find_blocks
from dmq_ao.algorithms.blockwise import BlockStudent
from dmq_ao.config import AttentionConfig, Recipe
from dmq_ao.numerics import ops
from dmq_ao.observers import AttentionObserver
from dmq_ao.passes import decompose_attention
from dmq_ao.passes.decompose_attention import whole_attention
from dmq_ao.quantizer.prepared import attention_observers

MODELS = ["tiny_unet2d", "tiny_unet2d_condition", "tiny_dit"]
pytestmark = pytest.mark.usefixtures("captures_are_shared")
sdpa = torch.ops.aten.scaled_dot_product_attention.default


def with_attention(recipe: Recipe, **given: int) -> Recipe:
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, attention=AttentionConfig(**given)))


@pytest.mark.parametrize("name", MODELS)
def test_written_out_it_is_the_same(name: str, request: pytest.FixtureRequest) -> None:
    model, example = request.getfixturevalue(name)
    gm = graph.capture(model, example)
    arguments = graph_arguments(gm, example)
    with torch.no_grad():
        expected = graph.first_tensor(gm(*arguments))
        decompose_attention(gm)
        assert not [node for node in gm.graph.nodes if node.target == sdpa]
        assert torch.allclose(graph.first_tensor(gm(*arguments)), expected, atol=1e-5)
        more = {key: torch.cat([value, value]) for key, value in example.items()}
        assert len(graph.first_tensor(gm(*graph_arguments(gm, more)))) == 4


class Masked(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        given = dict(self.options)
        if given.pop("masked", False):
            given["attn_mask"] = mask
        if not given.pop("any width", False):
            x = x.reshape(x.shape[0], 4, -1, 4)
        shared = x[:, :2] if given.get("enable_gqa") else x
        return scaled_dot_product_attention(x, shared + 1, shared * 2, **given)


@pytest.mark.parametrize(
    ("options", "mask", "whole"),
    [
        ({"masked": True, "scale": 0.3}, torch.randn(2, 1, 5, 5), False),
        ({"masked": True}, torch.rand(2, 1, 5, 5) > 0.2, False),
        ({"masked": True}, (torch.arange(5) < 4).expand(2, 1, 5, 5), False),
        ({"masked": True}, (torch.arange(5) > 1)[:, None].expand(2, 1, 5, 5), False),  # two rows see nothing
        ({"is_causal": True}, torch.zeros(2, 1, 5, 5), False),
        ({"enable_gqa": True}, torch.zeros(2, 1, 5, 5), False),
        ({"enable_gqa": True, "masked": True}, torch.rand(2, 1, 5, 5) > 0.2, False),
        ({"dropout_p": 0.5}, torch.zeros(2, 1, 5, 5), True),
        ({"any width": True}, torch.zeros(2, 1, 5, 5), True),
    ],
)
def test_masks_and_what_stays_whole(options: dict[str, Any], mask: Tensor, whole: bool) -> None:
    model, x = Masked(options).eval(), torch.randn(2, 4, 5, 4)
    gm = graph.capture(model, {"x": x, "mask": mask})
    decompose_attention(gm)
    assert any(node.target == sdpa for node in gm.graph.nodes) == whole
    if whole:
        assert "dropout of 0.5" in str(whole_attention(gm)) or "sizes of an input" in str(whole_attention(gm))
        return
    arguments = {"x": x, "mask": mask}
    found = gm(*[arguments[name] for name in graph.signature_of(gm).names])
    assert torch.allclose(found, model(x, mask), atol=1e-6)


def test_the_softmax_is_unsigned_and_queries_have_their_own_range() -> None:
    observer = AttentionObserver(bits=8, unit_range=True)
    weights = torch.softmax(torch.randn(2, 3, 4, 4), -1)
    assert torch.allclose(observer.simulate(weights), torch.round(weights * 255) / 255)
    x = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(0, 100, 9)])
    scale, zero_point = ops.dynamic_qparams(x, 4)
    found = AttentionObserver(bits=4, unit_range=False).simulate(x)
    assert torch.equal(
        found, ops.dequantize(ops.quantize(x, scale, zero_point, None, 1, 0, 15), scale, zero_point, None, 1, x.dtype)
    )
    x.requires_grad_()
    AttentionObserver(bits=4, unit_range=False).simulate(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


@pytest.mark.parametrize(("name", "kind"), list(zip(MODELS, ["minmax", "eda_dm", "default"], strict=True)))
def test_any_recipe_takes_it(name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, example = request.getfixturevalue(name)
    samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}), 8)
    recipe = with_attention(small(dmq_ao.recipes.ALL_RECIPES[kind]("w8a8"), 2), bits=4, softmax_bits=6)
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    inside = attention_observers(prepared)
    assert {(one.bits, one.unit_range) for one in inside.values()} == {(4, False), (6, True)}
    inputs = graph_arguments(prepared, samples.example())
    with torch.no_grad():
        before = graph.first_tensor(prepared(*inputs))
    dmq_ao.calibrate(prepared, samples, progress=False)
    with torch.no_grad():
        assert torch.equal(graph.first_tensor(prepared(*inputs)), before)  # the teacher stays float
    saved = dmq_ao.convert(prepared, "reference")
    rows = [row for row in saved.layer_reports() if row["kind"] == "attention"]
    assert len(rows) == len(inside) // 4
    assert all("4 bits, softmax of 6" in row["why"] for row in rows)
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, backend="reference")
    assert_same_records(loaded, saved)

    def output(denoiser: nn.Module) -> Tensor:
        with torch.no_grad():
            return denoiser(**samples.example(4)).sample

    assert torch.equal(output(loaded), output(saved))
    assert 0 < relative(output(saved), output(model)) < 0.2


def test_gradients_pass_quantized_attention(tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, example = tiny_unet2d
    samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}), 8)
    recipe = with_attention(dmq_ao.recipes.minmax("w4a8"))
    prepared = dmq_ao.prepare(model, recipe, samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    assert recipe.blocks is None
    block = next(b for b in find_blocks(prepared) if "mid_block.attentions.0" in b.name)
    kept: dict[Any, Any] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            kept[n] = super().run_node(n)
            return kept[n]

    with torch.no_grad():
        Keep(prepared).run(*graph_arguments(prepared, samples.example()))
    student = BlockStudent(prepared, block, dmq_ao.recipes.eda_dm().blocks)  # type: ignore[arg-type]
    output = student.run({node: kept[node] for node in block.inputs})[block.outputs[0][0]]
    output.square().sum().backward()
    assert all(logits.grad is not None and bool(logits.grad.any()) for logits in student.logits.values())
