"""What every test may ask for: a fixed seed, a device, and tiny models that are real diffusers models.

The models are built once per run and shared: copy one (``copy.deepcopy``) before changing it.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import families
import interpreted  # noqa: F401  before anything imports Triton
import pytest
import torch
from hypothesis import settings
from plain import Plain, plain_samples, seeded
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph.arguments import bind, find_timestep, flatten_inputs
from dmq_ao.samples import CalibrationSet

# Tensors here are tiny: handing work to a second thread costs more than it saves, and takes cores from parallel runs.
torch.set_num_threads(1)

# No deadline: a machine that does other work as well is no failure. ``--hypothesis-profile nightly`` looks longer.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "test_other_device" not in item.nodeid)


TinyModel = tuple[nn.Module, dict[str, Tensor]]  # the denoiser in eval mode, keyword arguments for a batch of two


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _devices() -> Iterator[object]:
    yield "cpu"
    if torch.cuda.is_available():
        yield pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """One test body for all devices: the CPU, and with ``-m gpu`` the CUDA device where there is one."""
    return torch.device(request.param)


def _build(model: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]]) -> TinyModel:
    """Weights and inputs of fixed seeds, whatever ran before, leaving the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = model().eval()
        torch.manual_seed(1)
        return built, inputs()


@pytest.fixture(scope="session")
def tiny_unet2d() -> TinyModel:
    """A DDPM UNet on 16x16: skip concatenations, self-attention at 8x8."""
    diffusers = pytest.importorskip("diffusers")
    return _build(
        lambda: diffusers.UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        lambda: {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([10, 500])},
    )


@pytest.fixture(scope="session")
def tiny_unet2d_condition() -> TinyModel:
    """A UNet as in Stable Diffusion on 16x16 latents: skip concatenations, cross-attention to seven tokens."""
    pytest.importorskip("diffusers")
    return _build(
        families.stable_diffusion_unet,
        lambda: {
            "sample": torch.randn(2, 4, 16, 16),
            "timestep": torch.tensor([10, 500]),
            "encoder_hidden_states": torch.randn(2, 7, 24),
        },
    )


@pytest.fixture(scope="session")
def tiny_dit() -> TinyModel:
    """A class-conditional DiT on 8x8 latents: sixteen tokens, two blocks, noise and variance predicted."""
    return _dit(blocks=2)


@pytest.fixture(scope="session")
def tinier_dit() -> TinyModel:
    """The same of one block, where each of its tensors is looked at one by one."""
    return _dit(blocks=1)


def _dit(blocks: int) -> TinyModel:
    diffusers = pytest.importorskip("diffusers")
    return _build(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=blocks,
            num_attention_heads=2,
            attention_head_dim=16,
            num_embeds_ada_norm=10,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([10, 500]),
            "class_labels": torch.tensor([3, 7]),
        },
    )


@pytest.fixture(scope="session")
def capture_once() -> Callable[..., GraphModule]:
    """``graph.capture`` that captures a model once per run for inputs of the same shapes, and hands out copies.

    Nothing else takes as long. A copy reads the model's own tensors, as a capture does.
    """
    capture = graph.capture
    kept: dict[str, tuple[nn.Module, GraphModule]] = {}

    def copy_of(denoiser: nn.Module, example_inputs: Any, timestep_arg: str | None = None) -> GraphModule:
        flat = flatten_inputs(bind(denoiser, example_inputs))
        like = {name: (x.shape, x.dtype) if isinstance(x, Tensor) else x for name, x in flat.items()}
        key = f"{id(denoiser)} {like} {find_timestep(list(flat), timestep_arg)}"
        if key not in kept:
            kept[key] = denoiser, capture(denoiser, example_inputs, timestep_arg)
        gm = kept[key][1]
        return copy.deepcopy(gm, {id(tensor): tensor for tensor in [*gm.parameters(), *gm.buffers()]})

    return copy_of


@pytest.fixture(scope="module")
def captures_are_shared(capture_once: Callable[..., GraphModule]) -> Iterator[None]:
    """Every ``dmq_ao.prepare`` of a file that asks for this captures a model once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "capture", capture_once)
        yield


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    """The plain denoiser, or the class that a test asks for."""
    return seeded(getattr(request, "param", Plain))


@pytest.fixture(scope="module")
def samples(model: nn.Module) -> CalibrationSet:
    """What ``model`` saw in a short sampling loop."""
    return plain_samples(model)
