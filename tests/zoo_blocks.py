"""Blocks of denoisers that people bring, each of a random form: ``tests/zoo.py`` composes nets of them.

A block maps [B, C, *sizes], or [B, N, C] among tokens, to the same shape, with a vector [B, C] of the timestep beside.
"""

from __future__ import annotations

import math
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

AXES = {"tokens": 1, "line": 1, "image": 2, "video": 3}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Block(nn.Module):
    """What the blocks below share: the form of the net, and ways from maps to tokens and back."""

    def __init__(self, channels: int, form: str, rng: Random) -> None:
        super().__init__()
        self.channels, self.form, self.axes = channels, form, AXES[form]
        self.build(rng)

    def build(self, rng: Random) -> None:
        """Make the parts."""

    def as_map(self, h: Tensor) -> Tensor:
        return h.transpose(1, 2) if self.form == "tokens" else h

    def as_tokens(self, h: Tensor) -> Tensor:
        return h if self.form == "tokens" else h.flatten(2).transpose(1, 2)

    def back(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens if self.form == "tokens" else tokens.transpose(1, 2).reshape(like.shape)

    def along(self, vector: Tensor) -> Tensor:
        """A vector [..., C] where it can be added to maps or tokens."""
        return vector[..., None, :] if self.form == "tokens" else vector.reshape(*vector.shape, *[1] * self.axes)

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        if type(self).on_tokens is not Block.on_tokens:
            return self.back(self.on_tokens(self.as_tokens(h), vector), h)
        return self.as_map(self.on_map(self.as_map(h), vector))


def divisor(number: int, rng: Random) -> int:
    return rng.choice([one for one in range(1, number + 1) if number % one == 0])


class Mlp(Block):
    def build(self, rng: Random) -> None:
        hidden = rng.choice([1, 3, 8, 2 * self.channels])
        self.up = nn.Linear(self.channels, hidden, bias=rng.random() < 0.7)
        self.down = nn.Linear(hidden, self.channels)
        self.act = rng.choice([F.silu, F.gelu, F.relu, torch.tanh, lambda h: F.gelu(h, approximate="tanh")])

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        return self.down(self.act(self.up(h)))


class GatedMlp(Block):
    def build(self, rng: Random) -> None:
        self.up = nn.Linear(self.channels, 16, bias=False)
        self.down = nn.Linear(8, self.channels)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        value, gate = self.up(h).chunk(2, -1)
        return self.down(value * F.silu(gate))


class Conv(Block):
    """A convolution of any padding, groups and dilation."""

    def build(self, rng: Random) -> None:
        kernel, dilation = rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2])
        words = rng.choice(["same", "valid", "number", "lopsided"])
        mode = rng.choice(["zeros", "zeros", "circular", "replicate"])
        reach = dilation * (kernel - 1)
        if words == "number" and reach % 2:
            words = "same"
        self.pads = [reach // 2, reach - reach // 2] * self.axes if words in ("valid", "lopsided") else None
        padding = words if words in ("same", "valid") else reach // 2 if words == "number" else 0
        groups = divisor(self.channels, rng)
        kind = CONVOLUTIONS[self.axes]
        self.conv = kind(
            self.channels, self.channels, kernel, 1, padding, dilation, groups, rng.random() < 0.7, padding_mode=mode
        )

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        return self.conv(h if self.pads is None else F.pad(h, self.pads))


class DownAndUp(Block):
    """A strided convolution, and a transposed one or an interpolation back."""

    def build(self, rng: Random) -> None:
        stride = rng.choice([2, (2, 1, 1)[: self.axes]])
        self.down = CONVOLUTIONS[self.axes](self.channels, 6, 3, stride, 1)
        self.up = TRANSPOSED[self.axes](6, self.channels, 4, 2, 1) if stride == 2 and rng.random() < 0.5 else None
        self.last = CONVOLUTIONS[self.axes](6, self.channels, 1)

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        low = F.silu(self.down(h))
        if self.up is not None:
            whole = self.up(low)
            return whole[(..., *[slice(0, size) for size in h.shape[2:]])]
        return self.last(F.interpolate(low, size=h.shape[2:], mode="nearest"))


class Patches(Block):
    """Pixels beside one another become channels, or windows of them rows of a product."""

    def build(self, rng: Random) -> None:
        self.is_unfolded = self.axes == 2 and rng.random() < 0.5
        self.mix = nn.Linear(self.channels * (9 if self.is_unfolded else 2), self.channels)

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.is_unfolded:
            rows = F.unfold(h, 3, padding=1).transpose(1, 2)
        else:
            rows = torch.cat([h, h.roll(1, -1)], 1).flatten(2).transpose(1, 2)
        return self.mix(rows).transpose(1, 2).reshape(h.shape)


class Shared(Block):
    """One layer called twice, or under two names."""

    def build(self, rng: Random) -> None:
        self.one = nn.Linear(self.channels, self.channels)
        self.two = self.one if rng.random() < 0.5 else nn.Linear(self.channels, self.channels)
        self.two.weight = self.one.weight
        self.is_turned = rng.random() < 0.4

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        h = self.two(F.silu(self.one(h)))
        return h @ self.one.weight if self.is_turned else h


class Table(Block):
    """Rows of a table, by position, by value, or tied with the product that chose them."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["position", "value", "tied", "bag"])
        self.table = (nn.EmbeddingBag if self.kind == "bag" else nn.Embedding)(11, self.channels)
        self.pick = nn.Linear(self.channels, 11, bias=False)
        if self.kind == "tied":
            self.pick.weight = self.table.weight

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "position":
            return self.pick(h)[..., :1] + self.table(torch.arange(h.shape[1], device=h.device) % 11)
        words = self.pick(h).argmax(-1)
        return h + (self.table(words)[:, None] if self.kind == "bag" else self.table(words))


class Recurrent(Block):
    def build(self, rng: Random) -> None:
        kind = rng.choice([nn.GRU, nn.LSTM, nn.RNN])
        twice = rng.random() < 0.4
        self.cell = kind(self.channels, 4, batch_first=True, bidirectional=twice, num_layers=rng.choice([1, 1, 2]))
        self.out = nn.Linear(8 if twice else 4, self.channels)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        return h + self.out(self.cell(h[:, :4])[0]).sum(1, keepdim=True)  # a step of it is a copy of the cell


class Products(Block):
    """Weights that no layer reads: einsum, bilinear, a matrix, a batch of them."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["einsum", "bilinear", "matmul", "bmm", "masked", "standardized", "addmm", "lora"])
        size = self.channels
        self.matrix = nn.Parameter(torch.randn(size, size) / math.sqrt(size))
        if self.kind == "bilinear":
            self.pair = nn.Bilinear(size, size, size)
        if self.kind == "bmm":
            self.matrices = nn.Parameter(torch.randn(2, size, size) / math.sqrt(size))
        if self.kind == "lora":
            self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)
        self.register_buffer("mask", torch.rand(size, size) > 0.3)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "einsum":
            return torch.einsum("bnc,cd->bnd", h, self.matrix)
        if self.kind == "bilinear":
            return self.pair(h.contiguous(), h.contiguous()) + h @ self.matrix
        if self.kind == "bmm":
            return torch.einsum("bnc,kcd->bnkd", h, self.matrices).mean(2) + F.linear(h, self.matrix)
        if self.kind == "masked":
            return F.linear(h, self.matrix * self.mask)
        if self.kind == "standardized":
            return F.linear(h, (self.matrix - self.matrix.mean(1, keepdim=True)) / (self.matrix.std() + 1e-5))
        if self.kind == "addmm":
            return torch.addmm(vector[0], h.flatten(0, 1), self.matrix.t()).reshape(h.shape)
        if self.kind == "lora":
            return F.linear(h, self.matrix) + self.up(self.down(h)) * 0.5
        return h @ self.matrix.t()


class Normed(Block):
    """A weight that is computed from others in every call."""

    def build(self, rng: Random) -> None:
        changes = [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
        change = rng.choice([*changes, lambda layer: prune.l1_unstructured(layer, "weight", 0.3)])
        self.is_conv = rng.random() < 0.5
        kind = CONVOLUTIONS[self.axes] if self.is_conv else nn.Linear
        self.layer = kind(self.channels, self.channels, *((3, 1, 1) if self.is_conv else ()))
        change(self.layer)

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.is_conv:
            return self.as_map(self.layer(self.as_map(h)))
        return self.back(self.layer(self.as_tokens(h)), h)


class Attention(Block):
    """Attention by hand or by PyTorch's function: masks of any kind, grouped queries."""

    def build(self, rng: Random) -> None:
        self.heads, self.width = rng.choice([(1, 4), (2, 4), (4, 2)])
        self.groups = rng.choice([self.heads, self.heads, 1])
        self.masking = rng.choice(["none", "bool", "float", "causal", "infinite", "by hand", "no rows"])
        self.q = nn.Linear(self.channels, self.heads * self.width)
        self.kv = nn.Linear(self.channels, 2 * self.groups * self.width, bias=rng.random() < 0.5)
        self.out = nn.Linear(self.heads * self.width, self.channels)

    def mask(self, h: Tensor) -> Tensor | None:
        size = h.shape[1]
        place = torch.arange(size, device=h.device)
        allowed = (place[:, None] - place[None, :]).abs() < 3
        if self.masking == "bool":
            return allowed
        if self.masking == "infinite":
            return torch.zeros(size, size, dtype=h.dtype, device=h.device).masked_fill(~allowed, float("-inf"))
        return -(place[:, None] - place[None, :]).abs().to(h.dtype) / 4 if self.masking == "float" else None

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        q = self.q(h).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
        k, v = self.kv(h).unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.masking == "by hand":
            k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k, v))
            y = ((q @ k.transpose(-1, -2)) / math.sqrt(self.width)).softmax(-1) @ v
        else:
            grouped = {"enable_gqa": True} if self.groups != self.heads else {}
            causal = self.masking == "causal"
            y = F.scaled_dot_product_attention(q, k, v, self.mask(h), is_causal=causal, **grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class Multihead(Block):
    def build(self, rng: Random) -> None:
        heads = divisor(self.channels, rng)
        self.is_layer = rng.random() < 0.4
        if self.is_layer:
            self.part = nn.TransformerEncoderLayer(
                self.channels, heads, 8, 0.0, batch_first=True, norm_first=rng.random() < 0.5
            )
        else:
            self.part = nn.MultiheadAttention(self.channels, heads, batch_first=True, add_bias_kv=rng.random() < 0.3)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        return self.part(h) if self.is_layer else self.part(h, h, h, need_weights=False)[0]


class Norm(Block):
    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["layer", "group", "batch", "rms", "instance"])
        size = self.channels
        batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[self.axes]
        self.norm = {
            "layer": lambda: nn.LayerNorm(size, elementwise_affine=rng.random() < 0.5),
            "group": lambda: nn.GroupNorm(divisor(size, rng), size),
            "batch": lambda: batch(size),
            "rms": lambda: nn.RMSNorm(size, eps=1e-6),
            "instance": lambda: nn.GroupNorm(size, size),
        }[self.kind]()
        self.conv = CONVOLUTIONS[self.axes](size, size, 1)

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind in ("layer", "rms"):
            return self.conv(self.norm(h.movedim(1, -1)).movedim(-1, 1))
        return self.conv(self.norm(h))


class Adaptive(Block):
    """Shift, scale and gate made of the timestep."""

    def build(self, rng: Random) -> None:
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(self.channels, 3 * self.channels))
        self.norm = nn.LayerNorm(self.channels, elementwise_affine=False)
        self.layer = nn.Linear(self.channels, self.channels)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vector).unsqueeze(1).chunk(3, -1)
        return h + gate * self.layer(self.norm(h) * (1 + scale) + shift)


class Made(Block):
    """Tensors that come to be in forward, or that no buffer holds."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["arange", "zeros", "lazy", "plain", "list", "vector", "full_like", "tensor", "eye"])
        self.layer = nn.Linear(self.channels, self.channels)
        self.cache: Tensor | None = None
        self.plain = torch.randn(self.channels)
        self.listed = [torch.randn(self.channels), {"deep": torch.randn(self.channels)}]
        self.vector = nn.Parameter(torch.randn(4, self.channels))

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "arange":
            h = h + torch.arange(h.shape[1], device=h.device, dtype=h.dtype)[:, None] / h.shape[1]
        elif self.kind == "zeros":
            h = torch.cat([torch.zeros(h.shape[0], 1, h.shape[2], dtype=h.dtype, device=h.device), h], 1)[:, 1:]
        elif self.kind == "lazy":
            if self.cache is None:
                self.cache = torch.linspace(0, 1, self.channels, dtype=h.dtype)
            h = h + self.cache
        elif self.kind == "plain":
            h = h * self.plain.to(h.dtype)
        elif self.kind == "list":
            h = h + (self.listed[0] - self.listed[1]["deep"]).to(h.dtype)
        elif self.kind == "vector":
            return h + self.layer(self.vector).mean(0)
        elif self.kind == "full_like":
            h = h + torch.full_like(h, 0.25) * torch.ones((), dtype=h.dtype)
        elif self.kind == "tensor":
            h = h * torch.tensor([1.0, 0.5] * (self.channels // 2), dtype=h.dtype)
        else:
            h = h @ (torch.eye(self.channels, dtype=h.dtype) * 2)
        return self.layer(h)


class Experts(Block):
    """A mixture: of all experts, or of those that the values of a row choose."""

    def build(self, rng: Random) -> None:
        self.is_sparse = rng.random() < 0.5
        self.gate = nn.Linear(self.channels, 2)
        self.experts = nn.ModuleList([nn.Linear(self.channels, self.channels) for _ in range(2)])

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        weights = self.gate(h).softmax(-1)
        if not self.is_sparse:
            return sum(expert(h) * weights[..., n : n + 1] for n, expert in enumerate(self.experts))
        rows, weights = h.flatten(0, 1), weights.flatten(0, 1)
        best, total = weights.argmax(-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = (best == number).nonzero()[:, 0]
            total = total.index_add(0, chosen, expert(rows[chosen]) * weights[chosen, number : number + 1])
        return total.reshape(h.shape)


class Joined(Block):
    """Channels split, worked on apart, and joined again; a product that reads the concatenation."""

    def build(self, rng: Random) -> None:
        kind = CONVOLUTIONS[self.axes]
        self.half = self.channels // 2
        self.one = kind(self.half, self.half, 3, padding=1)
        self.two = kind(self.channels - self.half, self.channels, 1)
        self.join = kind(self.half + 2 * self.channels, self.channels, 1)
        self.is_inner = rng.random() < 0.5

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        first, second = h.split([self.half, self.channels - self.half], 1)
        parts = [self.one(first), F.silu(self.two(second)) * 10, h]
        whole = torch.cat([torch.cat(parts[:2], 1), parts[2]] if self.is_inner else parts, 1)
        return self.join(whole)


class Rows(Block):
    """Rows that are no samples: guidance inside, windows, frames or columns folded in the batch."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["guidance", "columns", "stacked"])
        self.layer = CONVOLUTIONS[self.axes](self.channels, self.channels, 3, padding=1)
        self.line = nn.Conv1d(self.channels, self.channels, 3, padding=1)

    def on_map(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "guidance":
            one, two = self.layer(torch.cat([h, h * 0.5])).chunk(2)
            return two + 3 * (one - two)
        if self.kind == "columns" and self.axes > 1:
            columns = h.movedim(2, 1)
            return self.line(columns.flatten(0, 1).flatten(2)).reshape(columns.shape).movedim(1, 2)
        stacked = torch.stack([h, h * -0.5], 1)
        return self.layer(stacked.flatten(0, 1)).unflatten(0, (-1, 2)).mean(1)


class Buffers(Block):
    """Buffers of complex, integer and boolean type."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["complex64", "complex128", "int", "bool", "double", "fft"])
        self.layer = nn.Linear(self.channels, self.channels)
        angles = torch.arange(self.channels // 2).double()
        turns = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("turns", turns if self.kind == "complex128" else turns.to(torch.complex64))
        self.register_buffer("order", torch.randperm(self.channels), persistent=rng.random() < 0.5)
        self.register_buffer("chosen", torch.rand(self.channels) > 0.5)
        self.register_buffer("angles", torch.linspace(0, 1, self.channels, dtype=torch.float64))

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind.startswith("complex"):
            wide = h.to(torch.float64 if self.kind == "complex128" else torch.float32)
            pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
            h = torch.view_as_real(pairs * self.turns).flatten(-2).to(h.dtype)
        elif self.kind == "int":
            h = h[..., self.order]
        elif self.kind == "bool":
            h = torch.where(self.chosen, h, -h)
        elif self.kind == "double":
            h = (h.double() * self.angles).to(h.dtype)
        else:
            h = torch.fft.irfft(torch.fft.rfft(h.float(), dim=-1), n=self.channels, dim=-1).to(h.dtype)
        return self.layer(h)


class BySize(Block):
    """Code that does another thing for other sizes."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["longer", "even", "scaled"])
        self.layer = nn.Linear(self.channels, self.channels)

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "longer" and h.shape[1] > 9:
            h = h * 2
        if self.kind == "even" and h.shape[1] % 2:
            h = F.pad(h, (0, 0, 0, 1))[:, :-1] * 0.5
        if self.kind == "scaled":
            h = h * (math.log(h.shape[1] + 1) / 3)
        return self.layer(h)


class Mode(Block):
    """Layers under no_grad, inference_mode, autocast or a checkpoint, one region inside another at times."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["no_grad", "inference", "autocast", "checkpoint", "reentrant", "nested", "enable"])
        self.one, self.two = (nn.Linear(self.channels, self.channels) for _ in range(2))

    def layers(self, h: Tensor) -> Tensor:
        return self.two(F.silu(self.one(h)))

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.layers(h)
        if self.kind == "inference":
            with torch.inference_mode():
                return self.layers(h)
        if self.kind == "enable":
            with torch.enable_grad():
                return self.layers(h)
        if self.kind in ("autocast", "nested"):
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                low = self.one(h)
                if self.kind == "autocast":
                    return self.two(F.silu(low)).to(h.dtype)
                with torch.autocast("cpu", enabled=False):
                    return self.two(F.silu(low.to(h.dtype)))
        return checkpoint(self.layers, h, use_reentrant=self.kind == "reentrant")


class Squeezed(Block):
    """Pooled to a vector; gates, sums and in-place changes."""

    def build(self, rng: Random) -> None:
        self.kind = rng.choice(["gate", "inplace", "where", "scalar", "topk"])
        self.layer = nn.Linear(self.channels, self.channels)
        self.scalar = nn.Parameter(torch.tensor(0.5))

    def on_tokens(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.kind == "gate":
            return h * torch.sigmoid(self.layer(h.mean(1, keepdim=True)))
        h = self.layer(h)
        if self.kind == "inplace":
            h = h.clone()
            h[:, :1] = 0
            h += vector[:, None]
            return F.relu(h, inplace=True)
        if self.kind == "where":
            return torch.where(h > 0, h, h * 0.1).clamp(-5, 5)
        if self.kind == "topk":
            return h * (h >= h.topk(2, -1).values[..., -1:])
        return h * self.scalar


BLOCKS: dict[str, type[Block]] = {kind.__name__: kind for kind in Block.__subclasses__()}
