"""A zoo of small denoisers, drawn by Hypothesis: what each consists of, how it is called, and its inputs.

A ``Spec`` is plain data, so that a case prints, and is built again from its number alone (``drawn``). What must hold
of every case is in ``zoo_checks``.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_blocks import AXES, BLOCKS, CONVOLUTIONS, Block

PAGE = 100  # cases that are drawn together
APART = 20  # neighbours are often changed copies of one another: of so many, one is taken
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"tokens": ((6,), (9,)), "line": ((8,), (10,)), "image": ((6, 4), (4, 8)), "video": ((2, 4, 4), (3, 4, 2))}
# Each value that is drawn, the plain ones more often.
JOINS = ("plain", "residual", "concat", "adaptive")
TIMES = (
    *("[B]", "[B]", "[B]", "[B]", "int", "int", "float", "float", "[]", "[]", "[1]", "[1]", "fraction", "fraction"),
    *("[B,1,1,1]", "per token", "none"),
)
CALLS = ("positional", "positional", "keyword", "first condition", "named timestep", "any keyword", "keyword only")
ANSWERS = ("tensor", "tensor", "tuple", "pair", "list", "dict", "namedtuple", "dataclass", "nested", "with None")
EXTRAS = (
    *("context", "mask", "infinite mask", "number", "flag", "count", "word", "optional", "missing", "pair", "named"),
    *("nested", "numbered", "labels", "guidance", "shared", "empty"),
)
VALUES = ("normal",) * 6 + ("constant", "one sample", "zero weights", "dead channels", "huge", "tiny", "one step")
RECIPES = (
    *("w8a8", "w8a8", "w4a8", "per step", "dynamic", "groups", "embeddings", "attention", "mse", "weights", "votes"),
    *("default", "dmq", "eda_dm", "mpq_dm"),
)


@dataclass(frozen=True)
class Spec:
    """One case of the zoo; numbers are seeds of what is drawn inside."""

    form: str
    blocks: tuple[tuple[str, str, int], ...]
    time: str
    call: str
    answer: str
    extras: tuple[str, ...]
    values: str
    recipe: str
    dtype: str
    batch: int
    number: int


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Cases, the simplest first."""
    numbers = st.integers(0, 2**31)
    block = st.tuples(st.sampled_from(JOINS), st.sampled_from(list(BLOCKS)), numbers)
    form = draw(st.sampled_from(list(SIZES)))
    return Spec(
        form=form,
        blocks=tuple(draw(st.lists(block, min_size=1, max_size=2))),
        time=draw(st.sampled_from(TIMES)),
        call=draw(st.sampled_from(CALLS)),
        answer=draw(st.sampled_from(ANSWERS)),
        extras=tuple(draw(st.lists(st.sampled_from(EXTRAS), max_size=2, unique=True))),
        values=draw(st.sampled_from(VALUES)),
        recipe=draw(st.sampled_from(RECIPES)),
        dtype=draw(st.sampled_from(["float32"] * 5 + ["bfloat16", "float16"])),
        batch=draw(st.integers(1, 3)),
        number=draw(numbers),
    )


def drawn(page: int) -> list[Spec]:
    """The cases ``page * PAGE`` and following."""
    cases: list[Spec] = []

    @seed(page)
    @settings(
        max_examples=PAGE * APART,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def collect(spec: Spec) -> None:
        cases.append(spec)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect()
    return cases[::APART][:PAGE]


Named = collections.namedtuple("Named", "shift scale")  # noqa: PYI024  what people write
Answer = collections.namedtuple("Answer", "eps logvar")  # noqa: PYI024


@dataclass
class Output:
    sample: Tensor
    other: Tensor | None = None


class Joined(nn.Module):
    """A block, and how it is set among the others."""

    def __init__(self, how: str, block: Block, channels: int) -> None:
        super().__init__()
        self.how, self.block = how, block
        tokens = block.form == "tokens"
        if how == "concat":
            self.merge = (
                nn.Linear(2 * channels, channels) if tokens else CONVOLUTIONS[block.axes](2 * channels, channels, 1)
            )

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        if self.how == "plain":
            return self.block(h, vector)
        if self.how == "residual":
            return h + self.block(h, vector)
        if self.how == "adaptive":
            return self.block(F.silu(h + self.block.along(vector)), vector)
        return self.merge(torch.cat([h, self.block(h, vector)], -1 if self.block.form == "tokens" else 1))


class Net(nn.Module):
    """A projection, blocks, a projection; the subclasses have signatures."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        rng = Random(spec.number)
        self.spec, self.channels = spec, rng.choice([4, 6, 8])
        tokens, axes = spec.form == "tokens", AXES[spec.form]
        kind: Callable[..., nn.Module] = nn.Linear if tokens else CONVOLUTIONS[axes]
        size = () if tokens else (rng.choice([1, 3]),)
        padding = {} if tokens else {"padding": "same"}
        self.first = kind(3, self.channels, *size, **padding)
        self.time = nn.Sequential(nn.Linear(4, self.channels), nn.SiLU(), nn.Linear(self.channels, self.channels))
        self.parts = nn.ModuleList(
            Joined(how, BLOCKS[name](self.channels, spec.form, Random(number)), self.channels)
            for how, name, number in spec.blocks
        )
        self.context = nn.Linear(5, self.channels)
        self.label = nn.Embedding(4, self.channels)
        self.norm = nn.LayerNorm(self.channels) if rng.random() < 0.5 else nn.Identity()
        self.last = kind(self.channels, 3, *size, **padding)

    def vector(self, t: Any, x: Tensor) -> Tensor:
        """[B, C] of a timestep of any form."""
        if t is None:
            return x.new_zeros(len(x), self.channels)
        t = torch.as_tensor(t, device=x.device).to(x.dtype)
        t = t.reshape(-1, t.shape[-1]).mean(1) if self.spec.time == "per token" and t.dim() == 2 else t.reshape(-1)
        t = t.expand(len(x)) * (1 if self.spec.time == "fraction" else 0.001)
        return self.time(torch.stack([t.sin(), t.cos(), t, t * t], 1))

    def extra(self, vector: Tensor, given: dict[str, Any]) -> Tensor:
        """The vector [B, C] with what further arguments say."""
        one = vector.new_ones(())
        for name, value in given.items():
            if name == "context":
                mask = given.get("mask", given.get("infinite_mask"))
                words = self.context(value)
                if mask is not None:
                    scores = words.mean(-1)
                    scores = scores.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else scores + mask
                    words = words * scores.softmax(-1)[..., None]
                vector = vector + words.mean(1)
            elif name == "number":
                one = one * value
            elif name == "flag":
                one = one + 1 if value else one
            elif name == "count":
                for _ in range(value):
                    one = one * 0.9
            elif name == "word":
                one = one * {"double": 2.0, "single": 1.0}[value]
            elif name == "pair":
                assert isinstance(value, tuple), "must be a tuple"
                vector = vector + self.context(value[0]) * value[1]
            elif name == "named":
                vector = vector * value.scale + value.shift.mean(1, keepdim=True)
            elif name == "nested":
                vector = vector + self.context(value["text.embeds"]) * value["ids"]["a.b"][:, None]
            elif name == "numbered":
                vector = vector + self.context(value[0]) - self.context(value[1])
            elif name == "labels":
                vector = vector + self.label(value)
            elif name == "guidance":
                vector = vector + self.context(value[:, None] * torch.arange(5, device=value.device).to(value.dtype))
            elif name == "shared" or name == "optional" and value is not None:
                vector = vector + self.context(value)
        return vector * one

    def run(self, x: Tensor, t: Any, given: dict[str, Any]) -> Any:
        vector = self.extra(self.vector(t, x), {name: value for name, value in given.items() if value is not None})
        h = self.first(x)
        for part in self.parts:
            h = part(h, vector)
        h = h + self.parts[0].block.along(vector)
        tokens = self.spec.form == "tokens"
        h = self.norm(h if tokens else h.movedim(1, -1))
        return self.answer(self.last(h if tokens else h.movedim(-1, 1)))

    def answer(self, y: Tensor) -> Any:
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y,),
            "pair": lambda: (y, y * 2),
            "list": lambda: [y, y.mean(1)],
            "dict": lambda: {"sample": y, "log.var": y + 1},
            "namedtuple": lambda: Answer(y, -y),
            "dataclass": lambda: Output(y),
            "nested": lambda: {"sample": y, "hidden": [y * 2, (y.mean(), 3)]},
            "with None": lambda: (y, None),
        }[self.spec.answer]()


class Positional(Net):
    def forward(
        self,
        x: Tensor,
        t: Any,
        context: Any = None,
        mask: Any = None,
        infinite_mask: Any = None,
        number: Any = None,
        flag: Any = None,
        count: Any = None,
        word: Any = None,
        optional: Any = None,
        pair: Any = None,
        named: Any = None,
        nested: Any = None,
        numbered: Any = None,
        labels: Any = None,
        guidance: Any = None,
        shared: Any = None,
        empty: Any = None,
    ) -> Any:
        names = {name: value for name, value in locals().items() if name not in ("self", "x", "t", "__class__")}
        return self.run(x, t, names)


class Untimed(Net):
    def forward(self, x: Tensor, context: Any = None, **given: Any) -> Any:
        return self.run(x, None, {"context": context, **given})


class ConditionFirst(Net):
    def forward(self, context: Tensor, x: Tensor, t: Any, **given: Any) -> Any:
        return self.run(x, t, {"context": context, **given})


class NamedTimestep(Net):
    def forward(self, x: Tensor, noise_level: Any, context: Any = None, **given: Any) -> Any:
        return self.run(x, noise_level, {"context": context, **given})


class AnyKeyword(Net):
    def forward(self, hidden_states: Tensor, timestep: Any, **given: Any) -> Any:
        return self.run(hidden_states, timestep, given)


class KeywordOnly(Net):
    def forward(self, *, sample: Tensor, timestep: Any, context: Any = None, labels: Any = None, **given: Any) -> Any:
        return self.run(sample, timestep, {"context": context, "labels": labels, **given})


KINDS: dict[str, tuple[type[Net], str, str]] = {
    "positional": (Positional, "x", "t"),
    "keyword": (Positional, "x", "t"),
    "first condition": (ConditionFirst, "x", "t"),
    "named timestep": (NamedTimestep, "x", "noise_level"),
    "any keyword": (AnyKeyword, "hidden_states", "timestep"),
    "keyword only": (KeywordOnly, "sample", "timestep"),
    "untimed": (Untimed, "x", ""),
}


def kind_of(spec: Spec) -> str:
    return "untimed" if spec.time == "none" else spec.call


def build(spec: Spec) -> Net:
    """The net of a case, in eval mode and in its dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.number % 1000)
        net = KINDS[kind_of(spec)][0](spec)
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
            if spec.values == "zero weights":
                for parameter in net.parts[0].parameters():
                    parameter.zero_()
    return net.eval().to(DTYPES[spec.dtype])


def call(
    spec: Spec, step: int = 0, batch: int | None = None, other_size: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positionals and keywords of one call of a case's net."""
    batch = spec.batch if batch is None else batch
    repeats = spec.values == "constant"
    generator = torch.Generator().manual_seed(spec.number % 1000 + (0 if repeats else step))
    dtype = DTYPES[spec.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = SIZES[spec.form][other_size]
    x = normal(batch, *sizes, 3) if spec.form == "tokens" else normal(batch, 3, *sizes)
    if repeats:
        x = x[:1].expand_as(x).clone()
    x = x * {"huge": 1e6 if dtype != torch.float16 else 1e2, "tiny": 1e-6 if dtype != torch.float16 else 1e-2}.get(
        spec.values, 1
    )
    if spec.values == "dead channels":
        x.select(-1 if spec.form == "tokens" else 1, 1).zero_()
    place = 0 if spec.values == "one step" else step
    times = {"fraction": (0.9, 0.55, 0.3, 0.02)}.get(spec.time, (900, 600, 300, 0))[place % 4]
    t = {
        "int": lambda: times,
        "float": lambda: float(times),
        "[]": lambda: torch.tensor(times),
        "[1]": lambda: torch.tensor([times]),
        "[B,1,1,1]": lambda: torch.full((batch, 1, 1, 1), float(times), dtype=dtype),
        "per token": lambda: torch.full((batch, 4), float(times), dtype=dtype),
    }.get(spec.time, lambda: torch.full((batch,), times))()
    makers: dict[str, Callable[[], Any]] = {
        "context": lambda: normal(batch, 4, 5),
        "mask": lambda: torch.arange(4) < torch.arange(batch)[:, None] % 4 + 1,
        "infinite mask": lambda: torch.zeros(batch, 4).masked_fill(torch.arange(4) > 2, float("-inf")).to(dtype),
        "number": lambda: 1.5,
        "flag": lambda: True,
        "count": lambda: 2,
        "word": lambda: "double",
        "optional": lambda: normal(batch, 5),
        "missing": lambda: None,
        "pair": lambda: (normal(batch, 5), normal(batch, 1)),
        "named": lambda: Named(normal(batch, 2), normal(batch, 1)),
        "nested": lambda: {"text.embeds": normal(batch, 5), "ids": {"a.b": normal(batch)}},
        "numbered": lambda: {0: normal(batch, 5), 1: normal(batch, 5)},
        "labels": lambda: torch.arange(batch) % 4,
        "guidance": lambda: torch.full((batch,), 3.5, dtype=dtype),
        "shared": lambda: torch.arange(5).to(dtype) / 5,
        "empty": lambda: {},
    }
    given = {name.replace(" ", "_"): makers[name]() for name in spec.extras if name != "missing"}
    if "missing" in spec.extras:
        given["optional"] = given.get("optional")
    kind = kind_of(spec)
    _, sample, time = KINDS[kind]
    if kind == "positional":
        return (x, t), given
    if kind == "first condition":
        return (given.pop("context", None) if "context" in given else normal(batch, 4, 5), x, t), given
    if kind == "untimed":
        return (x,), given
    return (), {sample: x, time: t, **given}


def small(spec: Spec) -> dict[str, Any]:
    """A case as JSON."""
    return dataclasses.asdict(spec)
