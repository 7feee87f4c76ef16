"""Small denoisers of shapes that people bring and that graphs find hard, each with what should come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from dmq_ao import recipes
from dmq_ao.config import Recipe


class Net(nn.Module):
    """Two convolutions and a timestep; ``body`` is what the subclasses change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.first(x)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x) + t[:, None, None, None] / 1000


@dataclass(frozen=True)
class Case:
    """A net, the layers that become integers, and the rows of what stays in float with a word of the reason."""

    build: Callable[[], nn.Module]
    layers: tuple[str, ...] = ("first", "last")
    floats: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-4


def inputs(batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator), torch.arange(batch) * 300.0


def all_layers(recipe: Recipe | None = None, keep: tuple[str, ...] = ()) -> Recipe:
    """A recipe that keeps no layer in float for what it is for, but only those of given names."""
    recipe = recipes.minmax("w8a8") if recipe is None else recipe
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, keep_float=keep))


# --- code under another mode -------------------------------------------------


class NoGrad(Net):
    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


class NoGradAroundOne(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.first(x)
        with torch.enable_grad():
            return self.last(h)


class InferenceMode(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.first(x)
        return self.last(h)


class InferenceForward(Net):
    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


class Autocast(Net):
    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = super().body(x)
        return h.float()


class AutocastAndBack(Net):
    """An autocast switched off inside another, and one within ``no_grad``."""

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.first(x)
            with torch.autocast("cpu", enabled=False):
                h = self.last(F.silu(h.float()))
        return h


class AutocastEinsum(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3))

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.einsum("bchw,cd->bdhw", x, self.mix)
            h = F.layer_norm(h.float(), h.shape[-1:]) + torch.cat([h, h.float()], 1)[:, :3]
            return self.last(self.first(h)).float()


class AutocastOfCuda(Net):
    """Means nothing on a CPU."""

    def body(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return super().body(x)


class Checkpoint(Net):
    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=False)


class ReentrantCheckpoint(Net):
    def body(self, x: Tensor) -> Tensor:
        return checkpoint(super().body, x, use_reentrant=True)


class Cond(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.cond(t.sum() > 3, lambda y: self.middle(y), lambda y: self.middle(y) * 2, (h,))
        return self.last(h)


class CondInAutocast(Net):
    """The branches run under autocast, and so does what stands beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 8, 1)
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.cond(t.sum() > 3, lambda y: self.middle(y), lambda y: self.middle(y) * 2, (h,))
            h = self.second(h)
        return self.last(h.float())


class Scan(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        h = self.first(x)
        total, _ = scan(lambda carry, y: (carry + self.middle(y), y * 1.0), torch.zeros_like(h), torch.stack([h, h]))
        return self.last(total)


class WhileLoop(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        state = (torch.tensor(0), self.first(x))
        _, h = while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, self.middle(h)), state)
        return self.last(h)


class Vmap(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x).movedim(1, -1)
        return self.last(torch.vmap(self.middle)(h).movedim(-1, 1))


class FlexAttention(Net):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 48)
        self.out = nn.Linear(16, 8)

    def body(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        h = self.first(x)
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.last(tokens.transpose(1, 2).reshape(h.shape))


class TransformerLayer(Net):
    """PyTorch's own layer, which runs as one fused operator where no gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        tokens = self.encoder(h.flatten(2).transpose(1, 2))
        return self.last(tokens.transpose(1, 2).reshape(h.shape))


_LOOP = {"middle": "known in a call only"}
REGIONS = {
    "no_grad": Case(NoGrad),
    "no_grad around one layer": Case(NoGradAroundOne),
    "inference_mode": Case(InferenceMode),
    "inference_mode around forward": Case(InferenceForward),
    "autocast": Case(Autocast, tolerance=2e-2),
    "autocast and back": Case(AutocastAndBack, tolerance=2e-2),
    "autocast, einsum": Case(AutocastEinsum, floats={"mix": "einsum"}, tolerance=2e-2),
    "autocast of another device": Case(AutocastOfCuda),
    "checkpoint": Case(Checkpoint),
    "reentrant checkpoint": Case(ReentrantCheckpoint),
    "cond": Case(Cond, floats=_LOOP),
    "cond in autocast": Case(CondInAutocast, ("first", "last", "second"), floats=_LOOP, tolerance=2e-2),
    "scan": Case(Scan, floats=_LOOP),
    "while_loop": Case(WhileLoop, floats=_LOOP),
    "vmap": Case(Vmap, floats={"middle": "vmap"}),
    "flex_attention": Case(FlexAttention, ("first", "last", "qkv", "out")),
    "transformer layer": Case(
        TransformerLayer,
        ("first", "last", "encoder.linear1", "encoder.linear2", "encoder.self_attn.in_proj_weight")
        + ("encoder.self_attn.out_proj",),
    ),
}


# --- tensors made, filled and computed in forward ----------------------------


class Arange(Net):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x + torch.arange(x.shape[-1], device=x.device))


class Mask(Net):
    def body(self, x: Tensor) -> Tensor:
        size = x.shape[-2]
        later = torch.ones(size, size).triu(1).bool()
        mask = torch.zeros(size, size).masked_fill(later, float("-inf"))
        return super().body(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


class LazyCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None

    def body(self, x: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.linspace(0, 1, 8)
        return super().body(x + self.positions[: x.shape[-1]])


class LazyList(Net):
    """A cache in a list, and one in an object that is no module."""

    class Holder:
        table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []
        self.holder = self.Holder()

    def body(self, x: Tensor) -> Tensor:
        if not self.cache:
            self.cache.append(torch.full((1,), 0.5))
        if self.holder.table is None:
            self.holder.table = self.cache[0] + 1
        return super().body(x * self.cache[0] + self.holder.table)


class PlainTensors(Net):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.randn(3, 1, 1)
        self.shifts = [torch.randn(3, 1, 1), {"b": torch.randn(3, 1, 1)}]

    def body(self, x: Tensor) -> Tensor:
        first, named = self.shifts
        return super().body(x * self.scale + first - named["b"])


class Rotary(Net):
    """Complex numbers of double width in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(4).double()
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def body(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (4, 2)).contiguous())
        return super().body(torch.view_as_real(pairs * self.turns).flatten(-2).to(x.dtype))


class LearnedVector(Net):
    """A linear layer whose input is a parameter: no batch, no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))
        self.table = nn.Parameter(torch.randn(5, 8))
        self.shift = nn.Linear(8, 3)
        self.tokens = nn.Linear(8, 3)

    def body(self, x: Tensor) -> Tensor:
        shift = self.shift(self.vector) + self.tokens(self.table).mean(0)
        return super().body(x) + shift[:, None, None]


class Experts(Net):
    """A sparse mixture: which rows an expert gets depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rows = h.movedim(1, -1).flatten(0, 2)
        weights = self.gate(rows).softmax(-1)
        best, total = weights.argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = (best == number).nonzero()[:, 0]
            total = total.index_add(0, chosen, expert(rows[chosen]) * weights[chosen, number : number + 1])
        return self.last(total.unflatten(0, (h.shape[0], *h.shape[2:])).movedim(-1, 1))


def _changed(change: Callable[[nn.Conv2d], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net()
        change(net.last)
        return net

    return build


class Masked(Net):
    """A weight computed from two stored tensors by a function of the library's user."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(3, 8, 3, 3) > 0.3).float())

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(self.first(x), self.last.weight * self.mask, self.last.bias * 2, padding=1)


MADE = {
    "arange": Case(Arange),
    "mask": Case(Mask),
    "lazy cache": Case(LazyCache),
    "lazy list and object": Case(LazyList),
    "plain tensors": Case(PlainTensors),
    "complex128": Case(Rotary),
    "learned vector": Case(LearnedVector, floats={"shift": "stored tensor", "tokens": "stored tensor"}),
    "experts": Case(Experts, ("first", "last", "gate"), {"experts.0": "rows", "experts.1": "rows"}),
    "weight_norm": Case(_changed(weight_norm)),
    "spectral_norm": Case(_changed(spectral_norm)),
    "weight_norm, parametrized": Case(_changed(parametrizations.weight_norm)),
    "spectral_norm, parametrized": Case(_changed(parametrizations.spectral_norm)),
    "orthogonal, parametrized": Case(_changed(parametrizations.orthogonal)),
    "pruned": Case(_changed(lambda conv: prune.l1_unstructured(conv, "weight", 0.3))),
    "masked": Case(Masked),
}


# --- weights that no layer reads, and layers of every form -------------------


class Forms(Net):
    """Convolutions told in words, grouped, depthwise, with windows of an even size, in one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.even = nn.Conv2d(8, 8, 4, padding="same")
        self.valid = nn.Conv2d(8, 8, 1, padding="valid")
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.line = nn.Conv1d(8, 8, 3, padding="same")
        self.cube = nn.Conv3d(1, 1, 3, padding="same")

    def body(self, x: Tensor) -> Tensor:
        h = self.grouped(self.depthwise(self.valid(self.even(self.same(self.first(x))))))
        h = h + self.line(h.flatten(2)).reshape(h.shape)
        return self.cube(self.last(h)[:, None])[:, 0]


class Others(Net):
    """Weights that only a row of the report can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        h = self.first(torch.einsum("bchw,cd->bdhw", x, self.mix)) * self.scale
        rows = h.movedim(1, -1) @ self.turned.t()
        rows = rows + self.bilinear(rows.contiguous(), rows.contiguous())
        return self.last(F.avg_pool2d(self.up(rows.movedim(-1, 1)), 2))


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 4, batch_first=True, bidirectional=True)

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        tokens, _ = self.gru(h.mean(3).transpose(1, 2))  # few: an export writes each of them out
        return self.last(h + tokens.transpose(1, 2)[..., None])


class Bag(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 3)
        self.table = nn.Embedding(7, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        words = (t[:, None] // 100).long() % 7
        return super().forward(x + (self.bag(words) + self.table(words[:, 0]))[:, :, None, None], t)


_GRU = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse")
WEIGHTS = {
    "padding in words": Case(
        Forms, ("first", "last", "same", "even", "valid", "depthwise", "grouped", "line", "cube")
    ),
    "other products": Case(
        Others, floats={"mix": "einsum", "turned": "matmul", "bilinear": "bilinear", "up": "transposed convolution"}
    ),
    "recurrent": Case(Recurrent, floats={f"gru.{name}": "gru" for name in _GRU}),
    "embedding bag": Case(Bag, ("first", "last", "table"), {"bag": "embedding_bag"}),
}
