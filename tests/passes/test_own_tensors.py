"""What becomes of the float model after ``convert`` does not reach the quantized one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain import STEPS, Plain, flow, plain_samples, seeded
from torch import Tensor, nn

import dmq_ao
from dmq_ao.denoiser.report import tensor_bytes

X, T = torch.linspace(-2, 2, 2 * 3 * 64).reshape(2, 3, 8, 8).sin(), torch.tensor(STEPS[:2])
RECIPE = dmq_ao.recipes.minmax("w8a8")


class Buffered(Plain):
    """With a buffer, a buffer that is not saved, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(16, 1, 1))
        self.register_buffer("gain", torch.full((3, 1, 1), 2.0), persistent=False)
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.norm(self.first(x * self.gain)) + self.shift
        return self.last(self.conv(skip + self.time(t.to(x.dtype)[:, None] / 1000)[:, :, None, None]))


def zero_state(model: nn.Module) -> None:
    model.load_state_dict({name: 0 * value for name, value in model.state_dict().items()})


def fill_buffers(model: nn.Module) -> None:
    for buffer in model.buffers():
        buffer.fill_(5.0)


def train_a_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(X, T).square().sum().backward()
    optimizer.step()


def halve(model: nn.Module) -> None:
    model.bfloat16()


def spoil(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("change", [zero_state, fill_buffers, train_a_step, halve, spoil])
def test_a_change_of_the_float_model_changes_nothing(backend: str, change: Callable[[nn.Module], None]) -> None:
    model = seeded(Buffered)
    denoiser, _ = flow(model, RECIPE, plain_samples(model), backend)
    expected, before = denoiser(X, T), {name: x.clone() for name, x in denoiser.float_tensors.items()}
    change(model)
    assert torch.equal(denoiser(X, T), expected)
    assert all(torch.equal(denoiser.float_tensors[name], x) for name, x in before.items())


def test_no_tensor_of_the_model_is_read_and_none_is_held_twice() -> None:
    model = seeded(Buffered)
    denoiser, _ = flow(model, RECIPE, plain_samples(model), "auto")
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    held = [x for x in [*denoiser.graph_module.parameters(), *denoiser.graph_module.buffers()] if not x.is_mkldnn]
    assert not own & {x.untyped_storage().data_ptr() for x in held}
    assert tensor_bytes([*held, *denoiser.float_tensors.values()]) == tensor_bytes(held)
    read = sum(
        x.numel() for name, x in model.named_parameters() if name.split(".")[0] not in ("conv", "tokens", "merge")
    )
    biases = model.conv.bias.numel()
    assert sum(x.numel() for x in denoiser.float_tensors.values()) == read + biases + 16  # 16 of the saved buffer


def test_sharing_is_an_option() -> None:
    model = seeded(Buffered)
    samples = plain_samples(model)
    prepared = dmq_ao.prepare(model, RECIPE, samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    apart, shared = dmq_ao.convert(prepared), dmq_ao.convert(prepared, share_float=True)
    assert torch.equal(apart(X, T), shared(X, T))
    assert shared.float_tensors["first.weight"].data_ptr() == model.first.weight.data_ptr()
    assert apart.float_tensors["first.weight"].data_ptr() != model.first.weight.data_ptr()
    expected, twin = apart(X, T), copy.deepcopy(shared)
    zero_state(model)
    assert torch.equal(apart(X, T), expected)
    assert torch.equal(twin(X, T), expected)
    assert not torch.equal(shared(X, T), expected)
