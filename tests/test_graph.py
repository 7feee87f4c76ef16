"""Capture is exact: real denoisers as graphs, at sizes they were not captured at, with names, roles and blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import OWN, TINY, Case, Inputs, built, latents
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph import patch_embed
from dmq_ao.graph.arguments import flatten_inputs, unflatten_inputs
from dmq_ao.graph.roles import blocks_of, roles_of


class Plain(nn.Module):
    """A denoiser of no library, called by position: every kind of layer, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.labels = nn.Embedding(5, 8)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.word = nn.Conv2d(8, 8, 3, padding="same")
        self.tokens = nn.Linear(8, 8)
        self.merge = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, gain: float = 1.0) -> Tensor:
        skip = self.first(x)
        vector = self.time(t.float()[:, None] / 1000) + self.labels(label)
        h = self.shared(self.shared(skip + vector[:, :, None, None]).sigmoid())
        h = self.word(nn.functional.avg_pool2d(self.up(h), 2))
        h = self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(skip.shape)
        return self.last(self.merge(torch.cat([h * gain, skip], 1)).sigmoid())


def plain_inputs(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 4 * size, 6 * size), torch.arange(batch) * 100 + 1, torch.arange(batch)


@pytest.fixture(scope="module")
def case_of(request: pytest.FixtureRequest) -> Callable[[str], Case]:
    """Cases by name, each model built once."""
    found: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in found:
            pytest.importorskip("diffusers")
            torch.manual_seed(0)
            found[name] = TINY[name](request.getfixturevalue(name)[0]) if name in TINY else built(name)
        return found[name]

    return case


@pytest.fixture(
    scope="module",
    params=[*TINY, *(name if name == "flux" else pytest.param(name, marks=pytest.mark.slow) for name in OWN)],
)
def captured(
    request: pytest.FixtureRequest, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> tuple[Case, GraphModule]:
    case = case_of(request.param)
    return case, capture_once(case.model, case.example)


@pytest.fixture(scope="module")
def plain() -> tuple[Plain, GraphModule]:
    torch.manual_seed(0)
    model = Plain().eval()
    return model, graph.capture(model, plain_inputs(2, 2))


def run(gm: GraphModule, inputs: Inputs) -> Tensor:
    flat = flatten_inputs(inputs)
    with torch.no_grad():
        return gm(*[flat[name] for name in graph.signature_of(gm).names])


def eager(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


# --- the same numbers --------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size"),
    [(2, 2), (1, 2), (3, 2), (2, 3), (1, 1)],
    ids=["the example's size", "batch 1", "batch 3", "larger and not square", "smaller, batch 1"],
)
def test_the_graph_computes_what_the_model_computes(captured: tuple[Case, GraphModule], batch: int, size: int) -> None:
    case, gm = captured
    inputs = case.inputs(batch, size)
    expected = eager(case.model, inputs)
    assert expected.isfinite().all()
    assert expected.std() > 0
    assert torch.equal(run(gm, inputs), expected)


@pytest.mark.parametrize(("batch", "size"), [(2, 2), (1, 2), (3, 2), (2, 3), (1, 1)])
def test_a_plain_module_called_by_position(plain: tuple[Plain, GraphModule], batch: int, size: int) -> None:
    model, gm = plain
    inputs = plain_inputs(batch, size)
    with torch.no_grad():
        assert torch.equal(gm(*inputs), model(*inputs))


def test_what_is_upstream_of_layers_has_one_downstream(captured: tuple[Case, GraphModule]) -> None:
    _, gm = captured
    targets = {layer.node for layer in graph.find_layers(gm)}
    upstream = graph.reach_back(gm, targets)
    nodes = list(gm.graph.nodes)
    assert upstream == {node for node in nodes if graph.reach(gm, {node}) & (targets - {node})}
    assert 0 < len(upstream) < len(nodes)


def test_every_input_reaches_the_output(captured: tuple[Case, GraphModule]) -> None:
    case, gm = captured
    inputs = flatten_inputs(case.inputs(2, 2))
    names = graph.signature_of(gm).names
    expected = run(gm, inputs)
    for name in names:
        value = inputs[name]
        other = 1 - value if "mask" in name else value + 1
        moved = {**inputs, name: other}
        if name != "txt_ids":  # rotary angles of the text: equal shifts cancel
            assert not torch.equal(run(gm, moved), expected), name


def test_the_model_is_left_as_it_was(captured: tuple[Case, GraphModule]) -> None:
    case, _ = captured
    assert not any("forward" in vars(module) for module in case.model.modules())
    assert all(tensor.device.type == "cpu" for tensor in case.model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_those_of_the_table_in_half_precision(
    dtype: torch.dtype, case_of: Callable[[str], Case]
) -> None:
    case = case_of("pixart")
    table = copy.deepcopy(case.model.pos_embed).to(dtype)
    latent = latents(2, 4, 2).to(dtype)
    assert torch.equal(patch_embed._embed_patches(table, latent), table(latent))


# --- what the signature says -------------------------------------------------


def test_a_batch_of_one_is_doubled_and_ids_without_a_batch_are_not(
    case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    case = case_of("flux")
    example = graph.signature_of(capture_once(case.model, case.example)).example
    assert {name: shape for name, (shape, _) in example.items()} == {
        "hidden_states": (2, 16, 4),
        "encoder_hidden_states": (2, 7, 12),
        "pooled_projections": (2, 10),
        "timestep": (2,),
        "img_ids": (16, 3),
        "txt_ids": (7, 3),
        "guidance": (2,),
    }


@pytest.mark.parametrize(
    "name", ["tiny_dit", pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("unet3d", marks=pytest.mark.slow)]
)
def test_every_form_of_timestep_becomes_one_a_row(
    name: str, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    case = case_of(name)
    signature = graph.signature_of(capture_once(case.model, case.example))
    assert (signature.timestep, signature.timestep_per_row) == ("timestep", True)
    assert signature.example["timestep"] == ((2,), torch.int64)


def test_return_types_and_constants(
    case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule], plain: tuple[Plain, GraphModule]
) -> None:
    pixart = case_of("pixart")
    signature = graph.signature_of(capture_once(pixart.model, pixart.example))
    assert signature.return_type is not None
    assert signature.return_type.__name__ == "Transformer2DModelOutput"
    assert signature.constants == {"added_cond_kwargs.resolution": None, "added_cond_kwargs.aspect_ratio": None}
    assert signature.batch == "hidden_states"
    signature = graph.signature_of(plain[1])
    assert (signature.return_type, signature.returns_tuple) == (None, False)
    assert (signature.names, signature.batch) == (("x", "t", "label"), "x")


class Small(nn.Module):
    """One linear; what it is given and what it returns is up to the test."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.given = forward


class TupleOut(Small):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), t + 1


class Scalar(Small):
    """Takes one timestep for the whole batch, and no other."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) * t.view(1, 1)


class Sigma(Small):
    def forward(self, x: Tensor, sigma: Tensor, **conditions: Tensor) -> Tensor:
        return self.linear(x) * sigma[:, None] + conditions["shift"]


class Timeless(Small):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return self.linear(x) * factor


def small(kind: type[Small]) -> Small:
    return kind(lambda: None).eval()


def test_a_tuple_comes_back_as_a_tuple() -> None:
    model = small(TupleOut)
    gm = graph.capture(model, (torch.randn(2, 4), torch.tensor([1, 2])))
    x, t = torch.randn(5, 4), torch.arange(5)
    first, second = gm(x, t)
    assert graph.signature_of(gm).returns_tuple
    assert torch.equal(first, model.linear(x))
    assert torch.equal(second, t + 1)


@pytest.mark.parametrize("timestep", [3, torch.tensor(3), 0.5])
def test_a_model_that_takes_only_one_timestep_gets_one(timestep: Any) -> None:
    model = small(Scalar)
    gm = graph.capture(model, {"x": torch.randn(1, 4), "t": timestep})
    signature = graph.signature_of(gm)
    assert not signature.timestep_per_row
    assert signature.example["t"][0] == ()
    x = torch.randn(3, 4)
    assert torch.equal(gm(x, torch.as_tensor(timestep)), model(x, torch.as_tensor(timestep)))


def test_the_timestep_may_be_named_and_keywords_may_be_free() -> None:
    model = small(Sigma)
    inputs = {"x": torch.randn(2, 4), "sigma": torch.rand(2), "shift": torch.randn(2, 4)}
    assert graph.signature_of(graph.capture(model, inputs)).timestep is None
    gm = graph.capture(model, inputs, timestep_arg="sigma")
    assert graph.signature_of(gm).timestep == "sigma"
    assert torch.equal(run(gm, inputs), model(**inputs))


def test_a_model_without_timestep_and_with_a_constant() -> None:
    gm = graph.capture(small(Timeless), {"x": torch.randn(2, 4), "factor": 2.5})
    signature = graph.signature_of(gm)
    assert (signature.timestep, signature.names, signature.constants) == (None, ("x",), {"factor": 2.5})


class Integers(Small):
    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.linear(y.float())


@pytest.mark.parametrize(
    ("kind", "inputs", "timestep_arg", "error", "message"),
    [
        (Scalar, {"x": 1}, None, TypeError, r"do not fit Scalar.forward\(x: .*argument: 't'. Give a dict of its key"),
        (Scalar, (1, 2, 3), None, TypeError, "do not fit Scalar.forward.*too many positional arguments"),
        (Scalar, {"x": 1, "t": 2, "z": 3}, None, TypeError, "unexpected keyword argument 'z'"),
        (
            Scalar,
            {"x": torch.randn(2, 4), "t": 1},
            "sigma",
            ValueError,
            r"timestep_arg='sigma' is not an argument of the denoiser; it takes \['x', 't'\]",
        ),
        (
            Integers,
            {"y": torch.ones(2, 4, dtype=torch.int64), "t": 1},
            None,
            TypeError,
            r"no floating tensor with a batch axis besides the timestep; got \[\('y', \(2, 4\), 'torch.int64'\)",
        ),
    ],
)
def test_what_cannot_be_captured_says_why(
    kind: type[Small], inputs: Any, timestep_arg: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        graph.capture(small(kind), inputs, timestep_arg)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Scalar is in training mode; call \.eval\(\) on it first"):
        graph.capture(small(Scalar).train(), (torch.randn(2, 4), 1))


def test_a_model_that_does_not_export_raises_its_own_error() -> None:
    class Branches(Small):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(x) if t.sum() > 3 else x

    message = (
        r"Branches cannot be exported with inputs {'x': \(2, 4\), 't': \(2,\)}: .*data-dependent"
        r".*test_graph.py:\d+: return self.linear\(x\) if t.sum\(\) > 3 else x.*torch.where or torch.cond"
    )
    with pytest.raises(graph.CaptureError, match=message):
        graph.capture(small(Branches), (torch.randn(2, 4), torch.tensor([1, 2])))


class SizeAsKey(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tables = {4: 1.0}
        return self.linear(x) * tables.setdefault(x.shape[1] * x.shape[0], 2.0)


class WrongCall(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x.nothing)


class Mismatch(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(torch.cat([x, x], 1))


class Number(Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) * (1 / float(t.max()) if float(t.max()) > 2 else 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (SizeAsKey, r"unhashable.*tables.setdefault.*as a key: write int\(size\)"),
        (WrongCall, r"no attribute 'nothing', at .*self.linear\(x.nothing\)"),
        (Mismatch, r"Mismatch cannot be exported.*at .*self.linear\(torch.cat"),
        (Number, "Number cannot be exported.*makes it a Python number"),
    ],
)
def test_every_failure_of_an_export_is_one_error_that_names_the_line(kind: type[Small], message: str) -> None:
    with pytest.raises(graph.CaptureError, match=message) as caught:
        graph.capture(small(kind), (torch.randn(2, 4), torch.tensor([1, 2])))
    assert caught.value.__cause__ is not None


def test_of_two_forms_of_the_timestep_the_first_error_is_told_first() -> None:
    class Neither(Small):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert t.dim() == 0, "one timestep"
            return self.linear(x) * x.missing

    with pytest.raises(graph.CaptureError, match="AssertionError: one timestep.*with 't' as one number: .*missing"):
        graph.capture(small(Neither), (torch.randn(2, 4), 3))


# --- which argument is denoised ----------------------------------------------


class ConditionFirst(nn.Module):
    """The picture comes second, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.enter = nn.Linear(6, 8), nn.Conv2d(3, 8, 1)
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, text: Tensor, picture: Tensor, t: Tensor) -> Tensor:
        vector = self.embed(text).reshape(len(text), -1, 8).mean(1)
        return self.leave(torch.tanh(self.enter(picture) + vector[:, :, None, None]) * t[:, None, None, None])


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 3, 4, 6), (2, 3, 8, 6)])
def test_what_is_denoised_is_what_looks_like_the_answer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gm = graph.capture(ConditionFirst().eval(), (torch.randn(shape), torch.randn(2, 3, 8, 10), torch.ones(2)))
    assert graph.signature_of(gm).batch == "picture"
    roles = roles_of(gm, graph.find_layers(gm))
    assert roles["enter"] == {"@input"}
    assert "@input" not in roles["embed"]
    assert roles["leave"] == {"@output"}


# --- nested inputs -----------------------------------------------------------


def test_nested_inputs_flatten_and_come_back() -> None:
    nested = {"a": 1, "b": {"c": 2, "d": [3, {"e": 4}]}, "f": (5, 6)}
    flat = {"a": 1, "b.c": 2, "b.d.0": 3, "b.d.1.e": 4, "f.0": 5, "f.1": 6}
    assert flatten_inputs(nested) == flat
    assert unflatten_inputs(flat) == {**nested, "f": [5, 6]}
    assert flatten_inputs({"empty": {}, "none": None}) == {"none": None}


# --- names -------------------------------------------------------------------

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def test_layers_are_the_weighted_modules_of_the_model(captured: tuple[Case, GraphModule]) -> None:
    case, gm = captured
    modules = dict(case.model.named_modules())
    layers = graph.find_layers(gm)
    names = {layer.name.partition("#")[0] for layer in layers}
    assert names == {name for name, module in modules.items() if isinstance(module, WEIGHTED)}
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        module = modules[layer.name.partition("#")[0]]
        [source] = [
            node for node in layer.node.all_input_nodes if node.op == "get_attr" and "weight" in str(node.target)
        ]
        assert graph.attribute(gm, source).data_ptr() == module.weight.data_ptr()
        assert layer.numel == module.weight.numel()
        kind = type(module).__name__.lower()
        assert layer.kind == ("embedding table" if kind == "embedding" else kind)
    assert set(graph.layer_nodes(gm)) == {layer.name for layer in layers}


def test_a_module_used_twice_is_two_layers(
    plain: tuple[Plain, GraphModule], case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    names = [layer.name for layer in graph.find_layers(plain[1])]
    assert [name for name in names if "#" in name] == ["shared#2"]
    dit = case_of("tiny_dit")
    twice = [
        layer.name for layer in graph.find_layers(capture_once(dit.model, dit.example)) if layer.name.endswith("#2")
    ]
    embedder = "transformer_blocks.0.norm1.emb"
    assert twice == [
        f"{embedder}.timestep_embedder.linear_1#2",
        f"{embedder}.timestep_embedder.linear_2#2",
        f"{embedder}.class_embedder.embedding_table#2",
    ]


def test_kinds_and_channel_axes(plain: tuple[Plain, GraphModule]) -> None:
    found = {
        layer.name: (layer.kind, layer.ch_axis, layer.quantizable, layer.numel)
        for layer in graph.find_layers(plain[1])
    }
    assert found == {
        "first": ("conv2d", 1, True, 216),
        "time": ("linear", 1, True, 8),
        "labels": ("embedding table", 1, True, 40),
        "shared": ("conv2d", 1, True, 576),
        "shared#2": ("conv2d", 1, True, 576),
        "up": ("transposed convolution", 1, False, 256),
        "word": ("conv2d", 1, True, 576),
        "tokens": ("linear", 2, True, 64),
        "merge": ("conv2d", 1, True, 128),
        "last": ("conv2d", 1, True, 216),
    }


# --- roles -------------------------------------------------------------------


def by_role(gm: GraphModule) -> dict[str, set[str]]:
    """Layers by role, for those that have one."""
    found: dict[str, set[str]] = {}
    for name, roles in roles_of(gm, graph.find_layers(gm)).items():
        for role in roles:
            found.setdefault(role, set()).add(name)
    return found


def of_kind(model: nn.Module, suffix: str) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith(suffix)}


@pytest.mark.parametrize("name", ["tiny_unet2d", "tiny_unet2d_condition"])
def test_roles_of_a_unet(name: str, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]) -> None:
    case = case_of(name)
    shortcuts = {name for name in of_kind(case.model, "conv_shortcut") if name.startswith("up_blocks")}
    assert len(shortcuts) >= 3
    assert by_role(capture_once(case.model, case.example)) == {
        "@input": {"conv_in"},
        "@output": {"conv_out"},
        "@embedding": {"time_embedding.linear_1", "time_embedding.linear_2"} | of_kind(case.model, "time_emb_proj"),
        "@concat": shortcuts,
    }


def test_roles_of_a_dit(case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]) -> None:
    case = case_of("tiny_dit")
    embedders = of_kind(case.model, "timestep_embedder.linear_1") | of_kind(case.model, "timestep_embedder.linear_2")
    twice = {f"{name}#2" for name in embedders if name.startswith("transformer_blocks.0.")}
    tables = of_kind(case.model, "embedding_table")
    tables |= {f"{name}#2" for name in tables if name.startswith("transformer_blocks.0.")}
    assert by_role(capture_once(case.model, case.example)) == {
        "@input": {"pos_embed.proj"},
        "@output": {"proj_out_2"},
        "@embedding": embedders | twice | of_kind(case.model, "norm1.linear") | {"proj_out_1"} | tables,
        "@table": tables,
    }


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_modulated_text_stream_is_no_embedding(
    name: str, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    case = case_of(name)
    embeddings = by_role(capture_once(case.model, case.example))["@embedding"]
    vectors = {path for path in embeddings if path.startswith("time_text_embed.")}
    modulations = {path for path in embeddings if path.endswith((".norm1.linear", ".norm1_context.linear"))}
    rest = {"norm_out.linear"} | ({"single_transformer_blocks.0.norm.linear"} if name == "flux" else set())
    assert embeddings == vectors | modulations | rest
    assert len(vectors) == (6 if name == "flux" else 4)
    assert modulations


def test_roles_of_a_plain_module(plain: tuple[Plain, GraphModule]) -> None:
    assert by_role(plain[1]) == {
        "@input": {"first"},
        "@output": {"last"},
        "@embedding": {"time", "labels"},
        "@table": {"labels"},
        "@concat": {"merge"},
    }


# --- blocks ------------------------------------------------------------------


def block_nodes(gm: GraphModule, path: str) -> list[int]:
    """Places in the graph of what runs inside a module, by ``nn_module_stack``."""
    inside = f"denoiser.{path}"
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    return [
        place
        for place, node in enumerate(calls)
        if any(
            name == inside or name.startswith(inside + ".")
            for name, _ in node.meta.get("nn_module_stack", {}).values()
        )
    ]


@pytest.mark.parametrize("name", ["tiny_unet2d", "tiny_unet2d_condition", "tiny_dit"])
def test_blocks_partition_the_layers_and_follow_the_module_tree(
    name: str, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    case = case_of(name)
    gm = capture_once(case.model, case.example)
    names = [layer.name for layer in graph.find_layers(gm)]
    blocks = blocks_of(case.model, names)
    assert sorted(layer for layers in blocks.values() for layer in layers) == sorted(names)
    assert all(layers == [name for name in names if name in layers] for layers in blocks.values())
    whole = {
        path
        for path, module in case.model.named_modules()
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock", "Downsample2D", "Upsample2D")
    }
    assert len(whole) == {"tiny_unet2d": 10, "tiny_unet2d_condition": 14, "tiny_dit": 2}[name]
    for path in whole:
        inside = [layer for layer in names if layer.startswith(path + ".")]
        assert inside in blocks.values(), path


@pytest.mark.parametrize("name", ["tiny_unet2d", "tiny_unet2d_condition"])
def test_the_nodes_of_a_block_stand_together(
    name: str, case_of: Callable[[str], Case], capture_once: Callable[..., GraphModule]
) -> None:
    case = case_of(name)
    gm = capture_once(case.model, case.example)
    blocks = blocks_of(case.model, [layer.name for layer in graph.find_layers(gm)])
    for path in blocks:
        places = block_nodes(gm, path)
        assert places, path
        assert places == list(range(places[0], places[-1] + 1)), path


# --- graphs of one's own, and tools ------------------------------------------


def test_a_graph_that_capture_did_not_make_gets_a_signature(plain: tuple[Plain, GraphModule]) -> None:
    shapes = tuple({0: Dim.AUTO} for _ in range(3))
    gm = torch.export.export(plain[0], plain_inputs(2, 2), dynamic_shapes=shapes, strict=False).module()
    assert isinstance(gm, GraphModule)
    graph.ensure_signature(gm)
    signature = graph.signature_of(gm)
    assert (signature.names, signature.timestep, signature.batch) == (("x", "t", "label"), "t", "x")
    assert set(graph.layer_nodes(gm)) == set(graph.layer_nodes(plain[1]))
    assert by_role(gm) == by_role(plain[1])


def test_ensure_signature_keeps_the_one_that_is_there(plain: tuple[Plain, GraphModule]) -> None:
    before = graph.signature_of(plain[1])
    graph.ensure_signature(plain[1])
    assert graph.signature_of(plain[1]) is before


def test_a_skeleton_has_the_names_and_shapes_and_no_bytes(plain: tuple[Plain, GraphModule]) -> None:
    model = plain[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = graph.skeleton(model)
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert {tensor.device.type for tensor in [*bare.parameters(), *bare.buffers()]} == {"meta"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def gm(plain: tuple[Plain, GraphModule]) -> Iterator[GraphModule]:
    return copy.deepcopy(plain[1])


def test_added_tensors_get_free_names(gm: GraphModule) -> None:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        nodes = [graph.add_tensor(gm, "shared#2.scale", torch.tensor(float(i))) for i in range(3)]
    assert [node.target for node in nodes] == ["shared_2_scale", "shared_2_scale_1", "shared_2_scale_2"]
    assert [float(graph.attribute(gm, node)) for node in nodes] == [0.0, 1.0, 2.0]
    assert not any("scale" in name for name in gm.state_dict())


def test_parameters_are_set_and_deleted_at_any_depth(gm: GraphModule) -> None:
    graph.set_tensor(gm, "denoiser.merge.part0.weight", torch.ones(2))
    assert gm.get_parameter("denoiser.merge.part0.weight").sum() == 2
    graph.delete_parameter(gm, "denoiser.merge.part0.weight")
    with pytest.raises(AttributeError):
        gm.get_parameter("denoiser.merge.part0.weight")


def test_example_inputs_may_be_on_another_device_than_the_denoiser(case_of: Callable[[str], Case]) -> None:
    case = case_of("tiny_dit")
    captured = graph.capture(copy.deepcopy(case.model).to("meta"), case.example)
    assert set(graph.signature_of(captured).names) == set(case.example)
