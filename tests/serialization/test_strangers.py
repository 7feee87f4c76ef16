"""Folders that somebody crafted: each way in that was found, with all checksums made anew, ends in ``InvalidFile``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import STEPS, edit_config, flow, record, relative, repeated_samples, reseal, scaled, seeded, without_graph
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao.config import InvalidFile, Ranges
from dmq_ao.pipelines.adapter import load_pipeline
from dmq_ao.recipes import minmax
from dmq_ao.serialization import signature
from dmq_ao.serialization.folder import CONFIG, GRAPH, KEY, TENSORS

pytestmark = pytest.mark.usefixtures("captures_are_shared")
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    recipe = scaled(minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True))
    dmq_ao.save(flow(model, recipe, samples)[0], folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def saved_dit(tiny_dit: tuple[nn.Module, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, inputs = tiny_dit
    folder = tmp_path_factory.mktemp("dit") / "out"
    dmq_ao.save(flow(net, minmax("w8a8", ranges=Ranges.DYNAMIC), repeated_samples(inputs))[0], folder)
    return folder


@pytest.fixture
def dit_folder(saved_dit: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved_dit, tmp_path / "dit")
    return tmp_path / "dit"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a file writes would lie here."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert os.listdir(tmp_path / "cwd") == []


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(3, 3, 8, 8), torch.tensor(STEPS[:3])


def edit_graph(folder: Path, change: Edit) -> None:
    parts = json.loads((folder / GRAPH).read_text())
    change(parts)
    (folder / GRAPH).write_text(json.dumps(parts))
    reseal(folder)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    reseal(folder)


def refused(folder: Path, match: str = "") -> None:
    with pytest.raises(InvalidFile, match=match) as caught:
        dmq_ao.load(folder)
    assert str(folder) in str(caught.value)


def node(parts: dict[str, Any], op: str, target: str = "") -> dict[str, Any]:
    """The first node of an operator."""
    return next(n for n in parts["graph"]["nodes"] if n["op"] == op and target in n.get("target", ""))


def put_before(parts: dict[str, Any], at: int, *nodes: dict[str, Any]) -> None:
    parts["graph"]["nodes"][at:at] = nodes


def call(name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    val = {"shape": [None, None, None, None], "dtype": "float32"}
    return {"name": name, "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs, "val": val}


def answer_with(parts: dict[str, Any], *nodes: dict[str, Any]) -> None:
    """Add operators at the end, and answer with the last."""
    parts["graph"]["nodes"] += nodes
    parts["graph"]["outputs"] = [{"node": nodes[-1]["name"]}]


# --- text that reaches source ------------------------------------------------

CODE = "open('ran', 'w').write('x')"
QUOTES = [f'"); {CODE}; ("', f"'); {CODE}; ('", f"x\n    {CODE}\n", f"x: {CODE}", f"x=({CODE})", "a b", "é", "", "9x"]


@pytest.mark.parametrize("text", QUOTES)
@pytest.mark.parametrize("where", ["placeholder", "get_attr", "call_function"])
def test_a_node_has_a_plain_name(folder: Path, where: str, text: str) -> None:
    def change(parts: dict[str, Any]) -> None:
        named = node(parts, where)
        old, named["name"] = named["name"], text
        parts["graph"] = json.loads(json.dumps(parts["graph"]).replace(json.dumps(old), json.dumps(text)))

    edit_graph(folder, change)
    refused(folder, "nodes have names of letters, digits and _")


@pytest.mark.parametrize("text", [*QUOTES, "__class__.forward", "__init__.__globals__.x", "class", "x.y.z"])
def test_a_path_in_the_graph_is_no_path_of_ours(folder: Path, text: str) -> None:
    before = dmq_ao.load(folder, backend="reference")(*inputs())
    edit_graph(folder, lambda parts: node(parts, "get_attr", "denoiser.").update(target=text))
    forward = nn.Module.forward
    loaded = dmq_ao.load(folder, backend="reference")
    assert torch.equal(loaded(*inputs()), before)
    assert text == "" or text not in loaded.graph_module.code
    assert nn.Module.forward is forward


@pytest.mark.parametrize("key", [*QUOTES, f"dim=1, x={CODE}, y", "self", "out", "__class__"])
def test_a_keyword_is_one_of_the_operator(folder: Path, key: str) -> None:
    edit_graph(folder, lambda parts: node(parts, "call_function", "aten.silu").update(kwargs={key: 1}))
    refused(folder, "takes no further arguments")


@pytest.mark.parametrize("text", [CODE, f"'+{CODE}+'", "tanh'", "\\", "x" * 10**6])
def test_a_word_is_one_that_operators_take(folder: Path, text: str) -> None:
    edit_graph(
        folder,
        lambda parts: answer_with(parts, call("y", "aten.gelu.default", {"node": "tensors_0"}, approximate=text)),
    )
    refused(folder, "knows no")


@pytest.mark.parametrize("text", [f'"); {CODE}; ("', f"x\n    {CODE}\n", "__class__.forward", "__dict__", "forward"])
def test_a_layer_or_parameter_may_have_any_name_and_no_power(folder: Path, text: str) -> None:
    for file in (CONFIG, GRAPH):
        told = (folder / file).read_text().replace('"conv', json.dumps(text)[:-1]).replace('"conv.', json.dumps(text))
        (folder / file).write_text(told)
    tensors = load_file(folder / TENSORS)
    save_file({name.replace("conv", text, 1): tensor for name, tensor in tensors.items()}, folder / TENSORS)
    reseal(folder)
    forward = nn.Module.forward
    try:
        loaded = dmq_ao.load(folder)
        loaded(*inputs())
    except InvalidFile as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        assert text not in loaded.graph_module.code
    assert nn.Module.forward is forward


# --- classes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [["subprocess", "Popen"], ["builtins", "eval"], ["plain", "Plain"], ["os", "_wrap_close"]]
    + [["diffusers.models.modeling_utils", "ModelMixin"], ["diffusers.models.modeling_utils", "torch"]]
    + [["diffusers.utils.hub_utils", "PushToHubMixin"], ["diffusers", "DiffusionPipeline"], ["x"], ["a;b", "c"]],
)
def test_the_answer_is_no_class_of_the_files_choice(
    folder: Path, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process"))
    edit_graph(folder, lambda parts: parts["signature"].update(return_type=path))
    refused(folder, "return_type")


def test_the_answer_of_diffusers_must_fit_its_class(dit_folder: Path) -> None:
    edit_graph(dit_folder, lambda parts: parts["graph"].update(outputs=parts["graph"]["outputs"] * 3, single=False))
    refused(dit_folder, "takes 1 values, got 3")


class Answering(nn.Module):
    """Answers with a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> Any:
        y = self.last(self.middle(self.first(x)).relu()) + t[:, None] / 1000
        return Answer(y) if return_dict else (y,)


@dataclass
class Answer:
    """What ``Answering`` answers with."""

    sample: Tensor


def test_a_class_of_ones_own_is_taken_from_the_code_that_is_given(tmp_path: Path) -> None:
    net = seeded(Answering)
    samples = record(net, lambda step: net(torch.randn(4, 4), torch.full((4,), step)))
    quantized, _ = flow(net, minmax("w8a8"), samples)
    dmq_ao.save(quantized, tmp_path / "own")
    x, t = torch.randn(2, 4), torch.tensor([1, 2])
    loaded = dmq_ao.load(tmp_path / "own", model=net, backend="reference")
    assert type(loaded(x, t)) is Answer
    assert torch.equal(loaded(x, t).sample, quantized(x, t).sample)
    refused(tmp_path / "own", r"is not of diffusers; .* give it, load\(folder, model=...\)")
    edit_graph(tmp_path / "own", lambda parts: parts["signature"].update(return_type=["subprocess", "Popen"]))
    with pytest.warns(UserWarning, match="Popen is not a dataclass .* exported again"):
        assert type(dmq_ao.load(tmp_path / "own", model=net)(x, t)) is Answer


# --- operators ---------------------------------------------------------------

X = {"node": "tensors_0"}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a file read": (call("y", "aten.from_file.default", "/etc/passwd", False, 16), "is not one that a stored"),
    "a file mapped": (call("y", "aten.from_file.default", "ran", True, 16), "is not one that a stored"),
    "memory outside": (call("y", "aten._reshape_alias.default", X, [999], [1]), "is not one that"),
    "strides": (call("y", "aten.as_strided.default", X, [999], [1]), "is not one that"),
    "memory not filled": (call("y", "aten.empty.memory_format", [9, 9, 9, 9]), "is not one that"),
    "memory not filled, of a shape": (call("y", "aten.new_empty.default", X, [9, 9, 9, 9]), "is not one that"),
    "another size": (call("y", "aten.resize_.default", X, [10**6]), "is not one that"),
    "another storage": (call("y", "aten.set_.source_Tensor", X, X), "is not one that"),
    "a draw": (call("y", "aten.randn_like.default", X), "is not one that"),
    "dropout": (call("y", "aten.dropout.default", X, 0.5, True), "train=True"),
    "dropout in attention": (
        call("y", "aten.scaled_dot_product_attention.default", X, X, X, None, 0.5),
        "dropout_p=0.5",
    ),
    "a process": (call("y", "os.system", "touch ran"), "is not one that"),
    "a power": (call("y", "operator.pow", 10, 10**9), "powers of 0 to 4"),
    "a power of a power": (call("y", "operator.pow", X, X), "powers of 0 to 4"),
    "a long text": (call("y", "operator.mul", "ran", 10**12), "knows no 'ran'"),
    "a format": (call("y", "operator.mod", "%1000000000d", 5), "knows no"),
    "a long list": (call("y", "operator.mul", [0], 10**12), "sizes must be numbers"),
    "a repetition": (call("y", "aten.repeat.default", X, [10**4, 10**4, 10**3, 1]), "too large"),
    "a size": (call("y", "aten.full.default", [10**6, 10**6, 1, 1], 1.0), "too large"),
    "a size beyond all": (call("y", "aten.full.default", [2**62, 2**62, 4, 1], 1.0), "overflow|too large"),
    "a sequence": (call("y", "aten.arange.default", 10**12), "too large"),
    "many pieces": (call("y", "aten.split.Tensor", {"node": "long"}, 1), "pieces, at most"),
    "a change of an input": (call("y", "aten.add_.Tensor", X, 1), "it changes its argument"),
    "a number for a dtype": (call("y", "aten.to.dtype", X, 1), "takes a dtype"),
    "another shape than described": (
        {**call("y", "aten.neg.default", X), "val": {"shape": [9], "dtype": "float32"}},
        "it is described as",
    ),
    "another dtype than described": (
        {
            **call("y", "aten.neg.default", X),
            "val": {"shape": [None] * 4, "dtype": "bfloat16"},
        },
        "it is described as",
    ),
    "nothing described": (
        {key: value for key, value in call("y", "aten.neg.default", X).items() if key != "val"},
        "not described",
    ),
    "a call that is none": (call("y", "aten.conv2d.default", X), "missing value"),
    "an argument that is none": (call("y", "aten.cat.default", {"node": "nobody"}), "nobody"),
    "an integer divided by a tensor": (
        call("y", "aten.div.Tensor_mode", {"node": "tensors_1"}, {"node": "tensors_1"}, rounding_mode="trunc"),
        "whole numbers are divided",
    ),
    "an integer divided by -1": (
        call("y", "aten.div.Scalar_mode", {"node": "tensors_1"}, -1, rounding_mode="trunc"),
        "whole numbers are divided",
    ),
    "an integer modulo 0": (call("y", "aten.remainder.Scalar", {"node": "tensors_1"}, 0), "whole numbers are divided"),
    "a scale of next to nothing": (call("y", "aten.upsample_nearest2d.vec", X, None, [1e-30, 1e-30]), "0.001 to 1000"),
    "a scale that is no number": (
        call("y", "aten.upsample_bilinear2d.vec", X, None, False, [{"float": "nan"}, 1.0]),
        "0.001 to 1000",
    ),
    "circles of less than nothing": (call("y", "aten.pad.default", X, [-1, 1, 3, -6], "circular"), "negative padding"),
    "arguments in arguments": (call("y", "aten.cat.default", [[[[[[[[[[X]]]]]]]]]]), "nested more than 8"),
    "many parts": (call("y", "aten.hsplit.int", X, 2**40), "pieces, at most"),
    "an unknown dtype": (call("y", "aten.to.dtype", X, {"dtype": "bits8"}), "not a dtype of stored graphs"),
    "memory that is pinned": (call("y", "aten.ones.default", [1, 1, 1, 1], pin_memory=True), "pin_memory"),
    "an einsum of everything": (
        call("y", "aten.einsum.default", "abcd,efgh->abcdefgh", [X, {"node": "long"}]),
        "too large",
    ),
    "a method": ({"name": "y", "op": "call_method", "target": "numpy", "args": [X]}, "a node of"),
    "a module": ({"name": "y", "op": "call_module", "target": "denoiser", "args": [X]}, "a node of"),
}


@pytest.mark.parametrize(("hostile", "match"), HOSTILE.values(), ids=HOSTILE)
def test_an_operator_is_pure_bounded_and_what_it_is_described_as(
    folder: Path, hostile: dict[str, Any], match: str
) -> None:
    long = call("long", "aten.repeat.default", X, [5000, 1, 1, 1])
    edit_graph(folder, lambda parts: answer_with(parts, long, hostile))
    refused(folder, match)


def test_what_is_copied_into_an_input_is_refused(folder: Path) -> None:
    edit_graph(folder, lambda parts: answer_with(parts, call("y", "aten.copy_.default", X, X)))
    refused(folder, "it changes its argument")


def test_graphs_are_bounded(folder: Path) -> None:
    def change(parts: dict[str, Any]) -> None:
        parts["graph"]["nodes"] += [{"name": f"x{n}", "op": "placeholder"} for n in range(40_001)]

    edit_graph(folder, change)
    refused(folder, "at most 40000")


def test_what_grows_with_the_inputs_is_refused_when_they_come(folder: Path) -> None:
    """The example has two rows, so the file is innocent until it is called with more."""
    size = {"name": "rows", "op": "call_function", "target": "aten.sym_size.int", "args": [X, 0], "val": None}

    def on_sizes(name: str, word: str, of: str, number: int) -> dict[str, Any]:
        return {**size, "name": name, "target": f"operator.{word}", "args": [{"node": of}, number]}

    full = call("y", "aten.full.default", [{"node": "big"}, 1, 1, 1], 1.0)
    cases = {"size": [on_sizes("less", "sub", "rows", 2), on_sizes("big", "mul", "less", 2**40), full]}
    powers = [on_sizes(f"p{n}", "pow", f"p{n - 1}", 4) for n in range(1, 60)]
    cases["power"] = [on_sizes("p0", "sub", "rows", 1), *powers, call("y", "aten.neg.default", X)]
    for name, nodes in cases.items():
        changed = folder.parent / name
        shutil.copytree(folder, changed)
        edit_graph(changed, lambda parts, nodes=nodes: answer_with(parts, size, *nodes))  # type: ignore[misc]
        loaded = dmq_ao.load(changed, backend="reference")
        loaded(*(x[:2] for x in inputs()))
        with pytest.raises(InvalidFile, match=r"does not take inputs of shapes \[\(3, 3, 8, 8\)"):
            loaded(*inputs())


def test_a_file_that_is_read_without_end_is_not(folder: Path) -> None:
    (folder / GRAPH).unlink()
    with (folder / GRAPH).open("wb") as file:
        file.truncate(2**40)
    refused(folder, "at most 33554432 bytes")


def test_an_error_of_the_graph_is_one_of_the_file(folder: Path) -> None:
    index = {"name": "k", "op": "get_attr", "target": "k", "from": {"constant": "k"}}
    edit_tensors(folder, lambda tensors: tensors.update({"graph.k": torch.tensor([99])}))
    look_up = call("y", "aten.index_select.default", X, 0, {"node": "k"})
    edit_graph(folder, lambda parts: answer_with(parts, index, look_up))
    loaded = dmq_ao.load(folder, backend="reference")
    with pytest.raises(InvalidFile, match="the graph of .* fails on inputs .* or the file was edited"):
        loaded(*inputs())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested too deeply|JSON"),
        ('{"a": ' * 50_000, "nested too deeply|JSON"),
        ('{"signature": NaN}', "NaN is not a JSON number"),
        ('{"signature": 1e999}', "out of range of float64"),
        ('{"signature": ' + "9" * 5000 + "}", "out of range of int64"),
        ('{"signature": 1, "signature": 2}', "duplicate key"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ("", "Expecting value"),
    ],
)
def test_json_is_what_the_standard_says(folder: Path, text: str, match: str) -> None:
    (folder / GRAPH).write_text(text)
    reseal(folder)
    refused(folder, match)


def test_a_config_is_a_regular_file_of_bounded_size(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    refused(folder, "not a regular file")
    (folder / CONFIG).unlink()
    with (folder / CONFIG).open("wb") as file:
        file.truncate(2**40)
    refused(folder, "at most 33554432 bytes")


def test_a_graph_that_the_config_forgot_is_missed(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[KEY]["graph_sha256"] = None
    (folder / CONFIG).write_text(json.dumps(config))
    reseal(folder)
    refused(folder, "knows no graph.json, and manifest.json does")


# --- records -----------------------------------------------------------------

WRONG_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "a weight scale of NaN": ("conv.weight_scale", lambda x: x * torch.nan, "positive, finite and no denormal"),
    "one weight scale of infinity": (
        "conv.weight_scale",
        lambda x: x.index_fill(0, torch.tensor([3]), torch.inf),
        "fin",
    ),
    "one weight scale of zero": ("conv.weight_scale", lambda x: x.index_fill(0, torch.tensor([3]), 0.0), "positive"),
    "a negative weight scale": ("conv.weight_scale", lambda x: -x, "positive"),
    "a denormal weight scale": ("conv.weight_scale", lambda x: torch.full_like(x, 1e-45), "denormal"),
    "a weight scale of another shape": ("conv.weight_scale", lambda x: x.T.clone(), r"must be \[16, groups\]"),
    "scales of groups that do not divide": ("conv.weight_scale", lambda x: x.expand(16, 7).clone(), "dividing 144"),
    "a weight scale in half": ("conv.weight_scale", lambda x: x.half(), "float32"),
    "a weight zero point beyond the codes": ("conv.weight_zero_point", lambda x: x + 16, "codes of 4 bits"),
    "float zero points": ("conv.weight_zero_point", lambda x: x.float(), "uint8"),
    "an input scale of NaN": ("conv.input_scale", lambda x: x * torch.nan, "positive"),
    "a negative input scale": ("conv.input_scale", lambda x: -x, "positive"),
    "another number of input scales": ("conv.input_scale", lambda x: x[:-1].clone(), r"\[3\]"),
    "input zero points in 16 bits": ("conv.input_zero_point", lambda x: x.to(torch.int16) + 300, "uint8"),
    "exponents below 0": ("merge.part0.input_exponents", lambda x: x - 100, "0 to 3"),
    "exponents above 3": ("merge.part0.input_exponents", lambda x: x + 100, "0 to 3"),
    "exponents of another number of channels": ("merge.part0.input_exponents", lambda x: x[:5].clone(), "must be"),
    "exponents in float": ("merge.part0.input_exponents", lambda x: x.float(), "int8"),
    "timesteps out of order": ("conv.input_timesteps", lambda x: x.flip(0), "each below the one before"),
    "a timestep of NaN": ("conv.input_timesteps", lambda x: x * torch.nan, "finite"),
    "a timestep twice": ("conv.input_timesteps", lambda x: x.clamp_min(400), "each below the one before"),
    "a negative channel scale": ("conv.input_channel_scale", lambda x: -x, "positive"),
    "a channel scale too few": ("conv.input_channel_scale", lambda x: x[1:].clone(), r"\[16\] float32"),
    "scales whose product is infinite": ("conv.weight_scale", lambda x: x * 0 + 1e16, "finite"),
    "a bias of infinity": ("conv.corrected_bias", lambda x: x + torch.inf, "finite"),
    "codes too few": ("conv.weight", lambda x: x[1:].clone(), "codes of 4 bits take 1152 uint8"),
    "codes that are signed": ("conv.weight", lambda x: x.view(torch.int8), "uint8"),
}


@pytest.mark.parametrize(("key", "change", "match"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_tensor_is_what_its_layer_means(
    folder: Path, key: str, change: Callable[[Tensor], Tensor], match: str
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({key: change(tensors[key])}))
    refused(folder, match)


def layer(**changes: Any) -> Edit:
    return lambda config: config[KEY]["layers"]["conv"].update(changes)


def input_of(**changes: Any) -> Edit:
    return lambda config: config[KEY]["layers"]["conv"]["input"].update(changes)


WRONG_FIELDS: dict[str, tuple[Edit, str]] = {
    "symmetric": (layer(symmetric=True), r"unexpected \['conv.weight_zero_point'\]"),
    "symmetric of another type": (layer(symmetric=0), "expected bool, got int"),
    "a kind": (layer(kind="conv2D"), "kind must be one of"),
    "a kind of other axes": (layer(kind="linear"), "2 sizes"),
    "no bits": (layer(bits=0), "bits must be 1 to 8"),
    "bits as a number of another type": (layer(bits=4.0), "expected int, got float"),
    "a shape of zero": (layer(shape=[16, 16, 3, 0]), "sizes of 1 or more"),
    "a shape below zero": (layer(shape=[-16, -16, 3, 3]), "sizes of 1 or more"),
    "a shape beyond all": (layer(shape=[2**40, 2**40, 3, 3]), "sizes of 1 or more"),
    "segments that do not add up": (layer(segments=[[4, 15]]), "adding up to 16"),
    "segments that descend": (layer(segments=[[4, 8], [3, 8]]), "ascending widths"),
    "segments without widths": (layer(segments=[[4, 16]]), r"missing \['conv.weight_bits'\]"),
    "float8 of 4 bits": (layer(float8=True), "symmetric codes of 8 bits"),
    "an unknown key": (layer(codebook=[1]), "unknown keys"),
    "an input of the batch axis": (input_of(ch_axis=0), "the channel axis of the input"),
    "an input of another axis": (input_of(ch_axis=3), "the channel axis of the input"),
    "an input of more bits": (input_of(bits=12), "int16"),
    "an input of other bits": (input_of(bits=7), "limits of its input|codes of 7 bits"),
    "static with rows": (input_of(ranges="static"), "unexpected"),
    "dynamic with tables": (input_of(ranges="dynamic"), "unexpected"),
    "no input": (layer(input=None), "unexpected"),
    "an sqnr that is none": (lambda config: config[KEY]["sqnr_db"].update(conv="many"), "number of dB"),
    "constants that are none": (lambda config: config[KEY]["constants"].update(gain=[1]), "constants must be numbers"),
    "constants inside others": (lambda config: config[KEY]["constants"].update({"x.y": 1}), "x"),
    "an example beyond all": (lambda config: config[KEY]["example"]["x"].update(shape=[2**40] * 4), "example"),
    "a dtype that is a function": (lambda config: config[KEY]["example"]["x"].update(dtype="load"), "load"),
    "another timestep": (lambda config: config[KEY].update(timestep_arg="y"), "timestep_arg"),
    "a larger exponent": (
        lambda config: config[KEY]["recipe"]["config"]["power_of_two"].update(max_exponent=0),
        "max_",
    ),
}


@pytest.mark.parametrize(("change", "match"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_field_is_what_it_means(folder: Path, change: Edit, match: str) -> None:
    edit_config(folder, change)
    refused(folder, match)


def _quantize(parts: dict[str, Any]) -> dict[str, Any]:
    return node(parts, "call_function", "dmq_ao.quantize.default")


def _swapped_codes(parts: dict[str, Any]) -> None:
    homes = {tuple(n["from"]["record"]): n["from"] for n in parts["graph"]["nodes"] if "record" in n.get("from", {})}
    one, two = homes["merge.part0", "codes"], homes["merge.part1", "codes"]
    one["record"], two["record"] = two["record"], one["record"]


def _layer(parts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(n for n in parts["graph"]["nodes"] if n.get("layer") == name)


def _set(named: dict[str, Any], place: int, value: Any) -> None:
    named["args"] = [*named["args"][:place], value, *named["args"][place + 1 :]]


WRONG_GRAPHS: dict[str, tuple[Edit, str]] = {
    "other limits": (lambda p: _quantize(p).update(args=[*_quantize(p)["args"][:6], 127]), "limits of its input"),
    "another lower limit": (lambda p: _set(_quantize(p), 5, 5), "codes are 0 to"),
    "another axis": (lambda p: _set(_quantize(p), 4, 2), "axis|a channel_scale for each"),
    "no step": (
        lambda p: _quantize(p).update(args=[*_quantize(p)["args"][:3], None, *_quantize(p)["args"][4:]]),
        "quantize_step is in the graph or in the record",
    ),
    "codes of another layer": (_swapped_codes, "in the place of its codes"),
    "the name of another layer": (
        lambda p: next(n for n in p["graph"]["nodes"] if n.get("layer") == "conv").update(layer="first"),
        "each layer is one operator|no operator of the graph",
    ),
    "a layer that nobody planned": (
        lambda p: next(n for n in p["graph"]["nodes"] if n.get("layer") == "first").update(layer="x9"),
        r"layers \['x9'\] are not in the plan",
    ),
    "a plan of another kind": (
        lambda p: next(i for i in p["plan"] if i["name"] == "conv").update(kind="linear"),
        "the plan does not quantize it so",
    ),
    "a plan of other codes": (
        lambda p: next(i for i in p["plan"] if i["name"] == "conv")["weight"].update(symmetric=True),
        "symmetric",
    ),
    "a table looked up by another input": (
        lambda p: node(p, "call_function", "dmq_ao.row").update(
            args=[{"node": "tensors_0"}, *node(p, "call_function", "dmq_ao.row")["args"][1:]]
        ),
        "",
    ),
    "a weight of whole numbers": (
        lambda p: _set(node(p, "call_function", "dmq_ao.dequantize_weight"), 3, {"dtype": "int32"}),
        "values are in floating point",
    ),
    "an input in complex numbers": (
        lambda p: _set(node(p, "call_function", "dmq_ao.dequantize.default"), 5, {"dtype": "complex64"}),
        "values are in floating point",
    ),
    "a weight in double": (
        lambda p: _set(node(p, "call_function", "dmq_ao.dequantize_weight"), 3, {"dtype": "float64"}),
        "factors of one dtype",
    ),
    "a stride that is computed": (
        lambda p: _set(_layer(p, "conv"), 3, [{"node": node(p, "call_function", "aten.sym_size")["name"]}] * 2),
        "its geometry in numbers|described|invalid for input",
    ),
    "a bias of another shape": (
        lambda p: _set(_layer(p, "first"), 2, {"node": _layer(p, "first")["args"][1]["node"]}),
        "a bias of shape",
    ),
    "a plan of other exponents": (
        lambda p: next(i for i in p["plan"] if i["name"] == "merge.part0")["power_of_two"].update(per_step=True),
        "exponents that the plan does not have",
    ),
    "a plan of a float input": (
        lambda p: next(i for i in p["plan"] if i["name"] == "conv").update(activation=None),
        "whether its input is quantized",
    ),
    "a rule that its own example breaks": (lambda p: p["signature"]["rules"].append("shape['x'][1] == 4"), "rules"),
    "a rule that is none": (lambda p: p["signature"]["rules"].append("__import__('os')"), "not a condition"),
    "a rule without end": (lambda p: p["signature"]["rules"].append("-" * 19000 + "1"), "2000 characters each"),
    "rules without end": (lambda p: p["signature"]["rules"].extend(["1 == 1" + " " * 1900] * 99), "100000 together"),
    "other names": (lambda p: p["signature"].update(names=["x", "y"]), "signature.names"),
    "another batch": (lambda p: p["signature"].update(batch="y"), "signature.batch"),
}


@pytest.mark.parametrize(("change", "match"), WRONG_GRAPHS.values(), ids=WRONG_GRAPHS)
def test_a_graph_says_of_its_layers_what_their_records_say(folder: Path, change: Edit, match: str) -> None:
    edit_graph(folder, change)
    refused(folder, match)


# --- the model's own config --------------------------------------------------

WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a class that is none": ({"_class_name": "utils"}, "has no utils"),
    "a class that is no model": ({"_class_name": "DDIMScheduler"}, "has no DDIMScheduler"),
    "a class by another type": ({"_class_name": ["DiTTransformer2DModel"]}, "has no"),
    "layers without number": ({"num_layers": 10**6}, "builds more"),
    "layers beyond all": ({"num_layers": 10**12}, "at most"),
    "a text for a number": ({"num_layers": "two"}, "does not take this config"),
    "a width of nothing": ({"attention_head_dim": 0}, "does not take this config|of another model"),
    "a wide model": ({"attention_head_dim": 10**6}, "builds more|of another model"),
}


@pytest.mark.parametrize(("changes", "match"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_diffusers_builds_within_the_size_of_the_file(dit_folder: Path, changes: dict[str, Any], match: str) -> None:
    edit_config(dit_folder, lambda config: config.update(changes))
    refused(dit_folder, match)


WITHOUT_GRAPH: dict[str, tuple[Edit, str]] = {
    "inputs beyond all": (lambda q: q["example"]["hidden_states"].update(shape=[2**40] * 4), "of an example input"),
    "inputs of whole numbers": (
        lambda q: [one.update(dtype="int64") for one in q["example"].values()],
        "cannot be (exp|called)",
    ),
    "inputs of another shape": (lambda q: q["example"]["hidden_states"].update(shape=[2, 5, 8]), "cannot be called"),
    "an input too few": (lambda q: q["example"].pop("class_labels"), "cannot be called"),
    "an input too many": (lambda q: q["example"].update(y=q["example"]["hidden_states"]), "cannot be called"),
}


@pytest.mark.parametrize(("change", "match"), WITHOUT_GRAPH.values(), ids=WITHOUT_GRAPH)
def test_a_folder_without_a_graph_is_no_way_around(dit_folder: Path, change: Edit, match: str) -> None:
    without_graph(dit_folder)
    edit_config(dit_folder, lambda config: change(config[KEY]))
    refused(dit_folder, match)


def test_a_model_far_larger_than_its_file_is_not_built(dit_folder: Path) -> None:
    without_graph(dit_folder)
    edit_config(dit_folder, lambda config: config[KEY]["parameters"].update(more=[2**20, 2**20]))
    refused(dit_folder, "a model of 10995.* numbers, of which the file holds")


# --- pipelines ----------------------------------------------------------------

INDEXES: dict[str, Any] = {
    "a pipeline of its own code": {"_class_name": ["evil", "Evil"], "_diffusers_version": "0.42.1"},
    "a part of its own code": {"_class_name": "DDIMPipeline", "unet": ["evil", "Evil"]},
    "a part of any module": {"_class_name": "DDIMPipeline", "unet": ["this", "Zen"]},
    "a part of any class": {"_class_name": "DDIMPipeline", "unet": ["subprocess", "Popen"]},
    "a pipeline that is none": {"_class_name": "utils"},
    "a list": [],
    "no parts": {"_class_name": "DDIMPipeline"},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_a_pipeline_runs_no_code_that_lies_in_it(index: Any, tmp_path: Path) -> None:
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{}")
    for place in ("pipe", "pipe/unet"):
        (tmp_path / place / "evil.py").write_text(f"{CODE}\nclass Evil:\n    pass\n")
    with pytest.raises(
        InvalidFile, match="does not load this pipeline|parts of .* are loaded|not a pipeline index"
    ) as caught:
        load_pipeline(tmp_path / "pipe")
    assert str(tmp_path / "pipe") in str(caught.value)


# --- what was honest before --------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["golden", "golden_in_place"])
def test_a_folder_of_november_2026_gives_the_same_answer(name: str, backend: str) -> None:
    """Written before there were manifests; the second, a Wan, computes in place and in memory that it fills itself."""
    folder = Path(__file__).parent / name
    arguments = load_file(folder / "expected.safetensors")
    expected = arguments.pop("answer")
    loaded = dmq_ao.load(folder, backend=backend)
    answer = loaded(**arguments)
    assert relative(answer if isinstance(answer, Tensor) else answer[0], expected) < 1e-6
    assert len(loaded.records) > 3


def test_what_a_signature_does_not_say_comes_from_the_rest(saved: Path) -> None:
    loaded = dmq_ao.load(saved)
    again = signature.signature_to_json(loaded.signature)
    assert again == json.loads((saved / GRAPH).read_text())["signature"]
