"""What a quantized denoiser answers for the float model, and what it refuses because the graph runs without it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, flow, plain_samples, seeded
from torch import Tensor, nn

import dmq_ao

RECIPE = dmq_ao.recipes.minmax("w8a8")
Inputs = dict[str, Tensor]
Change = Callable[[Any], object]


class Conditioner(nn.Module):
    """A part with methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(1, 16)
        self.factors, self.history = {"gain": 1.0}, [1.0]

    def forward(self, t: Tensor) -> Tensor:
        return self.project(t[:, None] / 1000) * self.factors["gain"]

    def amplify(self, gain: float) -> None:
        self.factors["gain"] = gain


class Own(Plain):
    """A model whose methods have names of its own."""

    sigma_max = 80.0

    def __init__(self) -> None:
        super().__init__()
        self.time = Conditioner()
        self.options = {"scale": [1.0, 2.0]}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.first(x)
        return self.last(self.conv(nn.functional.silu(skip) + self.time(t.to(x.dtype))[:, :, None, None]))

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma).round()

    def swap(self) -> None:
        self.conv = nn.Conv2d(16, 16, 1)

    def louder(self) -> None:
        self.options["scale"].append(3.0)

    def freeze(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad = not parameter.requires_grad

    def watch(self) -> None:
        self.conv.register_forward_hook(print)

    def weight_norm(self) -> Tensor:
        return self.conv.weight.norm()

    @classmethod
    def built(cls) -> Own:
        return cls()


@pytest.fixture(scope="module")
def own() -> dmq_ao.QuantizedDenoiser:
    model = seeded(Own)
    return flow(model, RECIPE, plain_samples(model), "auto")[0]


@pytest.fixture(scope="module")
def unet(tiny_unet2d_condition: tuple[nn.Module, Inputs]) -> dmq_ao.QuantizedDenoiser:
    model, example = tiny_unet2d_condition
    return dmq_ao.convert(dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a16"), example), "reference")


@pytest.fixture(scope="module")
def dit(tiny_dit: tuple[nn.Module, Inputs]) -> dmq_ao.QuantizedDenoiser:
    model, example = tiny_dit
    return dmq_ao.convert(dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a16"), example), "reference")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda q: q.set_attn_processor(object()), "before dmq_ao.prepare", id="processors"),
        pytest.param(lambda q: q.enable_freeu(0.9, 0.2, 1.2, 1.4), "before dmq_ao.prepare", id="FreeU"),
        pytest.param(lambda q: q.disable_freeu(), "before dmq_ao.prepare", id="FreeU off"),
        pytest.param(lambda q: q.fuse_qkv_projections(), "before dmq_ao.prepare", id="joined projections"),
        pytest.param(lambda q: q.set_attention_backend("native"), "before dmq_ao.prepare", id="attention backend"),
        pytest.param(lambda q: q.set_attention_slice("auto"), "before dmq_ao.prepare", id="slices"),
        pytest.param(lambda q: q.set_default_attn_processor(), "before dmq_ao.prepare", id="default processors"),
        pytest.param(lambda q: q.add_adapter(object()), "fuse_lora", id="adapter"),
        pytest.param(lambda q: q.load_lora_adapter("folder"), "fuse_lora", id="LoRA"),
        pytest.param(lambda q: q.load_attn_procs("folder"), "before dmq_ao.prepare", id="processors from a folder"),
        pytest.param(lambda q: q.fuse_lora(), "fuse_lora", id="LoRA fused"),
        pytest.param(lambda q: q.set_adapters("one"), "fuse_lora", id="adapters chosen"),
        pytest.param(lambda q: q.disable_lora(), "fuse_lora", id="LoRA off"),
        pytest.param(lambda q: q.enable_layerwise_casting(torch.float16), "before dmq_ao.prepare", id="casting"),
        pytest.param(lambda q: q.enable_group_offload("cpu"), "already packed", id="offload"),
        pytest.param(lambda q: q.enable_gradient_checkpointing(), "not trained", id="checkpoints"),
        pytest.param(lambda q: q.compile_repeated_blocks(), r"dmq_ao.compile\(denoiser\)", id="blocks compiled"),
        pytest.param(lambda q: q.save_config("folder"), "dmq_ao.save", id="config written"),
        pytest.param(lambda q: q.from_pretrained("folder"), "before dmq_ao.prepare", id="class method"),
        pytest.param(lambda q: q.mid_block.register_forward_hook(print), "no effect", id="hook of a block"),
        pytest.param(lambda q: q.down_blocks[0].resnets[0].register_forward_pre_hook(print), "no effect", id="hook"),
        pytest.param(lambda q: q.get_submodule("mid_block").train(), "no effect", id="mode of a block"),
        pytest.param(lambda q: next(iter(q.up_blocks)).to(torch.float16), "no effect", id="dtype of a block"),
        pytest.param(lambda q: dict(q.mid_block.named_modules())["resnets.0"].apply(print), "no effect", id="apply"),
        pytest.param(lambda q: setattr(q, "conv_in", nn.Conv2d(3, 3, 1)), "no effect", id="block replaced"),
        pytest.param(lambda q: setattr(q.mid_block, "attentions", None), "no effect", id="block of a block replaced"),
        pytest.param(lambda q: q.conv_in(torch.zeros(1, 4, 8, 8)), "no effect", id="block called"),
        pytest.param(
            lambda q: next(iter(q.attn_processors.values())).__setattr__("scale", 2), "no effect", id="processor set"
        ),
        pytest.param(lambda q: q.graph_module.denoiser.conv_in.register_forward_hook(print), "no effect", id="graph"),
    ],
)
def test_what_would_change_the_float_model_is_refused(
    unet: dmq_ao.QuantizedDenoiser, change: Change, words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        change(unet)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda q: q.transformer_blocks[0].attn1.set_processor(object()), "no effect", id="processor"),
        pytest.param(lambda q: setattr(q, "gradient_checkpointing", True), "not trained", id="checkpoints"),
        pytest.param(lambda q: q.transformer_blocks.append(nn.Identity()), "no effect", id="block added"),
        pytest.param(lambda q: q.transformer_blocks.__setitem__(0, nn.Identity()), "no effect", id="block replaced"),
    ],
)
def test_what_would_change_a_transformer_is_refused(dit: dmq_ao.QuantizedDenoiser, change: Change, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        change(dit)


def test_caches_of_blocks_are_refused_and_their_context_is_not() -> None:
    class Cached(Plain, pytest.importorskip("diffusers.models.cache_utils").CacheMixin):  # type: ignore[misc]
        """What pipelines of transformers call in every step."""

    model = seeded(Cached)
    denoiser, _ = flow(model, RECIPE, plain_samples(model))
    for change in (lambda: denoiser.enable_cache(object()), lambda: denoiser.disable_cache()):
        with pytest.raises(TypeError, match="caches of blocks need the blocks"):
            change()
    with denoiser.cache_context("cond"):
        denoiser._reset_stateful_cache()
    assert not denoiser.is_cache_enabled


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda q: q.swap(), id="module replaced"),
        pytest.param(lambda q: q.louder(), id="list grown"),
        pytest.param(lambda q: q.freeze(), id="gradients switched"),
        pytest.param(lambda q: q.watch(), id="hook inside"),
        pytest.param(lambda q: q.time.amplify(2.0), id="dictionary of a part"),
        pytest.param(lambda q: q.built(), id="class method"),
        pytest.param(lambda q: setattr(q, "sigma_max", 1.0), id="class attribute"),
        pytest.param(lambda q: delattr(q.time, "factors"), id="attribute deleted"),
    ],
)
def test_methods_of_any_name_are_refused_when_they_change_something(
    own: dmq_ao.QuantizedDenoiser, change: Change
) -> None:
    with pytest.raises(TypeError, match="would have no effect: do it on the float denoiser before dmq_ao.prepare"):
        change(own)
    assert own.options == {"scale": [1.0, 2.0]}
    assert own.time.factors == {"gain": 1.0}
    assert own.conv.kernel_size == (3, 3)


def test_what_only_reads_goes_on_working(own: dmq_ao.QuantizedDenoiser) -> None:
    assert own.sigma_max == 80.0
    assert own.round_sigma(1.6) == 2.0
    assert own.time.project.in_features == 1
    assert isinstance(own.time, Conditioner)
    assert isinstance(own.time, nn.Module)
    assert own.time == own.time
    assert [name for name, _ in own.time.named_parameters()] == ["project.weight", "project.bias"]
    own.options["scale"].append(3.0)  # of a copy
    assert own.options == {"scale": [1.0, 2.0]}
    with pytest.raises(TypeError, match="weight_norm reads weights of the float model"):
        own.weight_norm()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = own.time.no_such_thing


def test_pipelines_find_what_they_ask_for(unet: dmq_ao.QuantizedDenoiser, dit: dmq_ao.QuantizedDenoiser) -> None:
    assert len(unet.down_blocks) == len(list(unet.down_blocks)) == 2
    assert unet.down_blocks[0].eval() == unet.down_blocks[0]
    assert unet.time_embedding.linear_1.in_features == 16
    assert unet.num_parameters() > 0
    assert hasattr(unet, "set_attention_slice")
    assert unet.config.cross_attention_dim == 24
    assert len(dit.transformer_blocks[:1]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda q: q.train(), "cannot be trained", id="train"),
        pytest.param(lambda q: nn.Sequential(q).train(), "cannot be trained", id="train a parent"),
        pytest.param(lambda q: q.requires_grad_(), "codes .* have no gradients", id="gradients"),
        pytest.param(lambda q: q.load_state_dict({}, strict=False), "takes no state_dict", id="state"),
        pytest.param(lambda q: q.share_memory(), "not shared between processes", id="memory"),
        pytest.param(lambda q: q.half(), "stays torch.float32", id="half"),
        pytest.param(lambda q: pickle.dumps(q), r"dmq_ao.save\(denoiser, folder\) writes it", id="pickle"),
        pytest.param(lambda q: torch.save(q, io.BytesIO()), r"dmq_ao.save\(denoiser", id="torch.save"),
        pytest.param(lambda q: torch.save({"unet": q}, io.BytesIO()), r"dmq_ao.save\(denoiser", id="in a dictionary"),
        pytest.param(lambda q: pickle.dumps(nn.Sequential(q)), r"dmq_ao.save\(denoiser", id="in a module"),
    ],
)
def test_what_a_module_can_do_and_a_quantized_one_cannot(
    own: dmq_ao.QuantizedDenoiser, change: Change, words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        change(own)
    assert not own.training


def test_copies_compute_the_same(own: dmq_ao.QuantizedDenoiser) -> None:
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(STEPS[:2])
    expected = own(x, t)
    for twin in (copy.copy(own), copy.deepcopy(own), copy.deepcopy({"unet": own})["unet"]):
        assert type(twin) is dmq_ao.QuantizedDenoiser
        assert torch.equal(twin(x, t), expected)
        assert twin.round_sigma(1.6) == 2.0
    assert own.eval().requires_grad_(False).to("cpu") is own
