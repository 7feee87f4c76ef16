"""Gradients in a quantized denoiser's inputs: straight through the q/dq graph, an error where kernels pass none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from plain import STEPS, Plain, flow, plain_samples, record, relative, scaled, seeded, small
from torch import Tensor, nn

from dmq_ao import QuantizedDenoiser, Ranges, Recipe, recipes
from dmq_ao.records import ActivationRecord

X, T = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 3, 8, 8).sin(), torch.tensor(STEPS[:2])


class Rounded(torch.autograd.Function):
    """``x`` on its grid; the gradient of the identity inside of the grid, none outside."""

    @staticmethod
    def forward(ctx, x, step, zero_point, bits):  # type: ignore[no-untyped-def]
        codes = torch.clamp(torch.round(x / step) + zero_point, 0, 2**bits - 1)
        ctx.save_for_backward(
            (torch.round(x / step) + zero_point >= 0) & (torch.round(x / step) + zero_point < 2**bits)
        )
        return (codes - zero_point) * step

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * ctx.saved_tensors[0], None, None, None


def on_grid(x: Tensor, record: ActivationRecord | None, t: Tensor) -> Tensor:
    """A layer's input as its codes stand for it, by hand; divided by the learned factors."""
    if record is None:
        return x
    channels = [1] * x.dim()
    channels[record.ch_axis] = -1
    if record.channel_scale is not None:
        x = x / record.channel_scale.reshape(channels)
    if record.ranges is Ranges.DYNAMIC:
        low, high = x.detach().flatten(1).amin(1).clamp(max=0), x.detach().flatten(1).amax(1).clamp(min=0)
        scale = (high - low) / (2**record.bits - 1)
        zero_point = torch.round(-low / scale).clamp(0, 2**record.bits - 1)
    else:
        scale, zero_point = record.scale, record.zero_point
        if record.timesteps is not None:
            rows = (t[:, None].float() - record.timesteps).abs().argmin(1)
            scale, zero_point = scale[rows], zero_point[rows]
    rows_shape = [-1] + [1] * (x.dim() - 1)
    step, zero_point = scale.reshape(rows_shape), zero_point.reshape(rows_shape)
    if record.exponents is not None:
        step = step * torch.exp2(-record.exponents.float()).reshape(channels)
    answer: Tensor = Rounded.apply(x, step, zero_point, record.bits)
    return answer


def by_hand(model: nn.Module, denoiser: QuantizedDenoiser, x: Tensor, t: Tensor) -> Tensor:
    """The float model, each quantized layer replaced by its dequantized weight on inputs on their grid."""

    def layer(name: str, value: Tensor) -> Tensor:
        module, record = model.get_submodule(name), denoiser.records.get(name)
        if record is None:
            return module(value)
        value, weight = on_grid(value, record.activation, t), record.weight.dequantize()
        bias = module.bias if record.bias is None else record.bias
        if isinstance(module, nn.Linear):
            return nn.functional.linear(value, weight, bias)
        return nn.functional.conv2d(value, weight, bias, padding=module.padding)

    skip = layer("first", x)
    vector = layer("time", t.to(x.dtype)[:, None] / 1000)
    h = nn.functional.silu(layer("conv", nn.functional.silu(skip) + vector[:, :, None, None]))
    h = layer("tokens", h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(skip.shape)
    return layer("last", nn.functional.silu(layer("merge", torch.cat([h, skip], 1))))


def gradient(output: Tensor, x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (answer,) = torch.autograd.grad((output * weights).sum(), x)
    return answer


def whole(recipe: Recipe) -> Recipe:
    """Without split concatenations."""
    return dataclasses.replace(recipe, split_concat=False)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipes.minmax("w8a8"), id="static"),
        pytest.param(recipes.minmax("w4a4"), id="few bits"),
        pytest.param(recipes.minmax("w8a8", ranges=Ranges.PER_STEP), id="per step"),
        pytest.param(recipes.minmax("w8a8", ranges=Ranges.DYNAMIC), id="dynamic"),
        pytest.param(recipes.minmax("w8a8", power_of_two=True), id="exponents"),
        pytest.param(scaled(recipes.minmax("w4a8")), id="learned scales"),
        pytest.param(recipes.minmax("w4a16"), id="weights alone"),
        pytest.param(small(recipes.minmax("w2a4", observer="mse"), 2), id="clipped"),
    ],
)
def test_the_gradient_is_that_of_the_graph_by_hand(recipe: Recipe) -> None:
    model = seeded(Plain)
    denoiser, _ = flow(model, whole(recipe), plain_samples(model))
    x = (2 * X).requires_grad_()
    actual = denoiser(x, T)
    expected = by_hand(model, denoiser, x, T)
    with torch.no_grad():
        assert torch.equal(actual, denoiser(x, T))
    assert relative(actual, expected) < 1e-3
    assert relative(gradient(actual, x), gradient(expected, x)) < 1e-3
    floats = gradient(model(x, T), x)
    assert 0 < relative(gradient(denoiser(x, T), x), floats) < 1.5


def test_clipped_inputs_have_no_gradient() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Identity(), nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(x) + 0 * t[:, None]

    model = seeded(One)
    recipe = recipes.minmax("w8a8")
    recipe = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, keep_float=()))
    samples = record(model, lambda step: model(torch.linspace(-1, 1, 12).reshape(4, 3), torch.full((4,), step)))
    denoiser, _ = flow(model, recipe, samples)
    x = torch.tensor([[0.5, 3.0, -3.0]], requires_grad=True)
    (answer,) = torch.autograd.grad(denoiser(x, 0).sum(), x)
    assert answer[0, 0] != 0
    assert answer[0, 1] == answer[0, 2] == 0


def test_kernels_pass_no_gradient_and_say_so() -> None:
    model = seeded(Plain)
    samples = plain_samples(model)
    x = X.clone().requires_grad_()
    denoiser, _ = flow(model, recipes.minmax("w8a8"), samples, "onednn")
    with pytest.raises(TypeError, match=r"requires a gradient, .* \(onednn\).* torch.no_grad\(\), or convert"):
        denoiser(x, T)
    with torch.no_grad():
        assert not denoiser(x, T).requires_grad
    assert torch.equal(denoiser(x.detach(), T), denoiser(X, T))
    leaf = x * 2  # not a leaf
    with pytest.raises(TypeError, match="requires a gradient"):
        denoiser(leaf, T)
    with pytest.raises(TypeError, match="requires a gradient"):
        denoiser(X, torch.tensor([900.0, 600.0], requires_grad=True))


def test_gradients_reach_every_input_and_cross_the_border() -> None:
    model = seeded(Plain)
    denoiser, _ = flow(model, recipes.minmax("w8a8"), plain_samples(model))
    x = X.bfloat16().requires_grad_()
    with pytest.warns(UserWarning, match="cast from torch.bfloat16"):
        denoiser(x, T).float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.abs().sum() > 0
    t = torch.tensor([900.5, 600.5], requires_grad=True)
    denoiser(X, t).sum().backward()
    assert t.grad is not None
    assert bool((t.grad != 0).all())
