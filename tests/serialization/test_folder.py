"""What is saved is what is loaded, bit for bit; what is damaged is refused by name; nothing is pickled."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import (
    STEPS,
    Plain,
    assert_same,
    assert_same_records,
    edit_config,
    flow,
    plain_samples,
    record,
    relative,
    reseal,
    scaled,
    seeded,
    without_graph,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao.config import Granularity, InvalidFile, Override, Ranges, Recipe, TensorConfig
from dmq_ao.serialization import folder as model_folder
from dmq_ao.serialization.folder import CONFIG, GRAPH, KEY, TENSORS
from dmq_ao.serialization.manifest import MANIFEST

minmax = dmq_ao.recipes.minmax
MIXED = dataclasses.replace(
    minmax("w4a8"),
    config=dataclasses.replace(
        minmax("w4a8").config,
        keep_float=("time",),
        overrides=(
            Override("tokens", weight=TensorConfig(8, Granularity.PER_TENSOR, symmetric=True)),
            Override("first", weight=TensorConfig(1, Granularity.PER_CHANNEL), activation=TensorConfig(16)),
            Override("conv", weight=TensorConfig(7, Granularity.PER_CHANNEL, observer="mse")),
        ),
    ),
)


RECIPES = {
    "w8a8": minmax("w8a8"),
    "w4a8 with votes": minmax("w4a8", power_of_two=True),
    "w3a6": minmax("w3a6"),
    "w2a4": minmax("w2a4"),
    "w5a8": minmax("w5a8"),
    "w6a8": minmax("w6a8"),
    "w7a7": minmax("w7a7"),
    "w1a8": minmax("w1a8"),
    "per step": minmax("w8a8", ranges=Ranges.PER_STEP),
    "per step with votes": minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True),
    "dynamic": minmax("w8a8", ranges=Ranges.DYNAMIC),
    "dynamic with votes": minmax("w4a8", ranges=Ranges.DYNAMIC, power_of_two=True),
    "weights only": minmax("w4a16"),
    "groups": minmax("w4a16", group_size=8),
    "groups and activations": minmax("w8a8", group_size=16),
    "percentile": minmax("w8a8", observer="percentile"),
    "mixed": MIXED,
    "scaled": scaled(minmax("w4a8", ranges=Ranges.PER_STEP, power_of_two=True)),
    "scaled and dynamic": scaled(minmax("w8a8", ranges=Ranges.DYNAMIC)),
}


pytestmark = pytest.mark.usefixtures("captures_are_shared")


@pytest.fixture(scope="module")
def quantized(model: nn.Module, samples: dmq_ao.CalibrationSet) -> dmq_ao.QuantizedDenoiser:
    return flow(model, RECIPES["per step with votes"], samples)[0]


@pytest.fixture
def folder(quantized: dmq_ao.QuantizedDenoiser, tmp_path: Path) -> Path:
    dmq_ao.save(quantized, tmp_path / "out")
    return tmp_path / "out"


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randn(batch, 3, 8, 8), torch.tensor(STEPS[:batch])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- load after save is the identity -----------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_load_after_save_is_the_identity(
    recipe: Recipe, model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    saved, report = flow(model, recipe, samples)
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=model, backend="reference")
    assert_same_records(loaded, saved)
    assert torch.equal(loaded(*inputs()), saved(*inputs()))
    assert loaded.recipe == recipe
    assert loaded.sqnr_db == report.sqnr_db
    assert loaded.plan == saved.plan
    assert loaded.signature == saved.signature
    before = contents(tmp_path)
    dmq_ao.save(loaded, tmp_path)
    assert contents(tmp_path) == before


def test_any_backend_saves_and_loads(
    quantized: dmq_ao.QuantizedDenoiser, model: nn.Module, samples: dmq_ao.CalibrationSet, folder: Path, tmp_path: Path
) -> None:
    if dmq_ao.load(folder, model=model).backend == "reference":
        pytest.skip("this PyTorch has no oneDNN int8 kernels")
    prepared = dmq_ao.prepare(model, quantized.recipe, samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    lowered = dmq_ao.convert(prepared, "onednn")
    dmq_ao.save(lowered, tmp_path / "onednn")
    assert contents(tmp_path / "onednn") == contents(folder)
    loaded = dmq_ao.load(tmp_path / "onednn", model=model, backend="onednn")
    assert loaded.kernels == lowered.kernels
    assert torch.equal(loaded(*inputs()), lowered(*inputs()))


def test_a_diffusers_model_needs_no_model(tiny_dit: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path) -> None:
    model, example = tiny_dit
    samples = record(model, lambda step: model(**example | {"timestep": torch.full((2,), step)}))
    saved, _ = flow(model, RECIPES["per step with votes"], samples)
    dmq_ao.save(saved, tmp_path)
    torch.manual_seed(3)  # the loader builds a model with random weights first
    loaded = dmq_ao.load(tmp_path, backend="reference")
    assert_same_records(loaded, saved)
    assert torch.equal(loaded(**example).sample, saved(**example).sample)
    assert loaded.config.num_layers == model.config.num_layers
    assert {key: loaded.config[key] for key in model.config} == dict(model.config)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert {key: config[key] for key in ("num_layers", "in_channels", "sample_size")} == {
        key: model.config[key] for key in ("num_layers", "in_channels", "sample_size")
    }


@pytest.mark.parametrize("stored_graph", [True, False])
def test_a_denoiser_is_loaded_on_any_device(
    tiny_dit: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path, stored_graph: bool
) -> None:
    net, inputs = tiny_dit
    samples = record(net, lambda step: net(**inputs | {"timestep": torch.full((2,), step)}))
    quantized = flow(net, minmax("w4a8"), samples, backend="reference")[0]
    dmq_ao.save(quantized, tmp_path / "out")
    if not stored_graph:
        without_graph(tmp_path / "out")
    # The meta device computes nothing, and refuses to mix: what is not moved shows.
    moved = dmq_ao.load(tmp_path / "out", backend="reference", device="meta")
    assert moved.device == torch.device("meta")
    result = moved(**{name: value.to("meta") for name, value in inputs.items()}).sample
    assert (result.device.type, result.shape) == ("meta", quantized(**inputs).sample.shape)
    with pytest.raises(ValueError, match="'cuda' is unavailable: it runs on CUDA devices and the denoiser is on meta"):
        dmq_ao.load(tmp_path / "out", backend="cuda", device="meta")


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device 'cuda' is unavailable: .*; use 'cpu'"):
        dmq_ao.load(folder, device="cuda")


def test_a_compiled_denoiser_is_saved_as_what_it_was_compiled_from(
    quantized: dmq_ao.QuantizedDenoiser, folder: Path, tmp_path: Path
) -> None:
    dmq_ao.save(torch.compile(quantized, backend="eager"), tmp_path / "compiled")  # type: ignore[arg-type]
    assert contents(tmp_path / "compiled") == contents(folder)


class MixedDtypes(nn.Module):
    """Half precision but for its embedding, as diffusers keeps parts of some models in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.first, self.middle, self.last = (nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))
        self.register_buffer("table", torch.rand(8))

    def forward(self, x: Tensor, t: Tensor, gain: float = 1.0) -> Tensor:
        vector = self.time(t[:, None] / 1000) * self.table
        return self.last(self.middle(self.first(x) + vector.to(x.dtype))) * gain


def test_tensors_keep_their_own_dtype_and_arguments_their_value(tmp_path: Path) -> None:
    model = seeded(MixedDtypes)
    samples = record(model, lambda s: model(torch.randn(4, 8, dtype=torch.bfloat16), torch.full((4,), s), gain=2.5))
    saved, _ = flow(model, minmax("w8a8"), samples)
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, model=seeded(MixedDtypes), backend="reference")
    assert loaded.float_tensors["time.weight"].dtype is torch.float32
    assert loaded.float_tensors["table"].dtype is torch.float32
    x, t = torch.randn(2, 8, dtype=torch.bfloat16), torch.tensor([1, 900])
    assert torch.equal(loaded(x, t), saved(x, t))
    assert torch.equal(loaded(x, t, gain=2.5), saved(x, t))
    with pytest.raises(TypeError, match="argument 'gain' is 2.5 in the exported graph, got 1.0"):
        loaded(x, t, gain=1.0)


class Tied(nn.Module):
    """Two names for one weight, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.other, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.other.weight = self.first.weight
        self.config = {"layers": 4}  # an attribute of its own that diffusers has no say in

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.twice(self.twice(self.first(x)).relu()) + t[:, None] / 1000
        return self.last(self.other(h).relu())


@pytest.mark.parametrize("keep_float", [("other", "other#2"), ("@output",)])
def test_shared_weights(keep_float: tuple[str, ...], tmp_path: Path) -> None:
    model = seeded(Tied)
    recipe = minmax("w8a8")
    recipe = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, keep_float=keep_float))
    saved, _ = flow(model, recipe, record(model, lambda s: model(torch.randn(4, 8), torch.full((4,), s))))
    assert {"twice", "twice#2"} <= set(saved.records)
    dmq_ao.save(saved, tmp_path)
    torch.manual_seed(1)
    loaded = dmq_ao.load(tmp_path, model=Tied().eval(), backend="reference")
    assert_same_records(loaded, saved)
    x, t = torch.randn(3, 8), torch.tensor([1, 2, 3])
    assert torch.equal(loaded(x, t), saved(x, t))
    assert relative(loaded(x, t), model(x, t)) < 0.05
    assert loaded.config == {"layers": 4}


def test_a_layer_without_noise_is_told_in_plain_json(
    model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path
) -> None:
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.tokens.weight.zero_()
    saved, report = flow(silent, minmax("w4a16"), samples)
    assert report.sqnr_db["tokens"] == math.inf
    dmq_ao.save(saved, tmp_path)
    json.loads((tmp_path / CONFIG).read_text(), parse_constant=pytest.fail)
    assert dmq_ao.load(tmp_path, model=silent).sqnr_db == report.sqnr_db


# --- what is in the files ----------------------------------------------------


def test_only_json_and_safetensors_are_written(folder: Path) -> None:
    assert sorted(contents(folder)) == [CONFIG, TENSORS, GRAPH, MANIFEST]
    json.loads((folder / CONFIG).read_text())
    with safe_open(folder / TENSORS, "pt") as opened:
        assert opened.keys()
    for name, data in contents(folder).items():
        assert b"torch._utils" not in data, name
        assert not data.startswith((b"PK", b"\x80")), name


def test_files_can_be_read_by_whoever_reads_other_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    modes = {path.stat().st_mode for path in (*folder.iterdir(), tmp_path / "other")}
    assert len(modes) == 1


def test_keys_are_original_names_and_codes_are_packed(
    quantized: dmq_ao.QuantizedDenoiser, model: nn.Module, folder: Path
) -> None:
    tensors = load_file(folder / TENSORS)
    float_names = {"time.weight", "time.bias", "first.weight", "first.bias", "last.weight", "last.bias"}
    float_names |= {"conv.bias", "tokens.bias", "merge.bias"}
    parts = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "input_timesteps")
    of_layers = {f"{layer}.{part}" for layer in quantized.records for part in parts}
    exponents = {f"{layer}.input_exponents" for layer in ("merge.part0", "merge.part1")}
    assert set(tensors) == float_names | of_layers | exponents
    for name in float_names:
        assert torch.equal(tensors[name], model.state_dict()[name])
    for name, layer in quantized.records.items():
        assert tensors[f"{name}.weight"].dtype is torch.uint8
        assert tensors[f"{name}.weight"].numel() == layer.weight.codes.numel() // 2
        assert tensors[f"{name}.input_timesteps"].tolist() == sorted(STEPS, reverse=True)
        low, high = tensors[f"{name}.weight"] & 15, tensors[f"{name}.weight"] >> 4
        unpacked = torch.stack([low, high], dim=1).flatten()
        assert torch.equal(unpacked, layer.weight.codes.flatten())  # least significant bits first


class Wide(nn.Module):
    """Nearly all bytes in two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 256), nn.Linear(256, 4)
        self.one, self.two = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.two(self.one(self.first(x)).relu()) + t[:, None] / 1000)


def test_files_are_as_small_as_their_bits(tmp_path: Path) -> None:
    model = seeded(Wide)
    samples = record(model, lambda step: model(torch.randn(4, 4), torch.full((4,), step)))
    numel = 2 * 256 * 256
    sizes = {}
    for bits in (2, 3, 4, 5, 6, 8):
        saved, _ = flow(model, minmax(f"w{bits}a8"), samples)
        dmq_ao.save(saved, tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / TENSORS).stat().st_size
        overhead = sizes[bits] - numel * bits // 8
        assert 0 < overhead < 20_000, bits
    assert sorted(sizes.values()) == list(sizes.values())
    assert len(set(sizes.values())) == len(sizes)
    assert sizes[4] / (numel * 4) < 0.16  # of the float file


# --- models ------------------------------------------------------------------


def test_the_stored_graph_needs_no_module(
    quantized: dmq_ao.QuantizedDenoiser, folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    loaded = dmq_ao.load(folder, backend="reference")
    assert torch.equal(loaded(*inputs()), quantized(*inputs()))
    assert set(loaded.skeleton.state_dict()) == set(model.state_dict())
    assert loaded.mean_bits == quantized.mean_bits
    dmq_ao.save(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


class Placed(nn.Module):
    """Tensors of its own beside modules: a parameter, a buffer of whole numbers and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()
        self.place = nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("table", torch.randn(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = (x + self.place).index_select(1, self.order) * self.table
        result: Tensor = self.inner(x, t)
        return result


def test_tensors_beside_modules_need_no_module_either(tmp_path: Path) -> None:
    model = seeded(Placed)
    saved = flow(model, RECIPES["w8a8"], plain_samples(model))[0]
    dmq_ao.save(saved, tmp_path)
    loaded = dmq_ao.load(tmp_path, backend="reference")
    assert torch.equal(loaded(*inputs()), saved(*inputs()))
    assert set(loaded.skeleton.state_dict()) == set(model.state_dict())


def test_without_a_graph_a_plain_module_must_be_given(
    quantized: dmq_ao.QuantizedDenoiser, folder: Path, model: nn.Module
) -> None:
    without_graph(folder)
    assert torch.equal(dmq_ao.load(folder, model=model, backend="reference")(*inputs()), quantized(*inputs()))
    with pytest.raises(ValueError, match=r"out is not of a diffusers model; give the float module: load\('.*out', mo"):
        dmq_ao.load(folder)
    with pytest.raises(ValueError, match="is not of a diffusers model"):
        dmq_ao.load(str(folder))


def test_loading_does_not_touch_the_module_that_is_given(folder: Path) -> None:
    torch.manual_seed(9)
    given = Plain().eval()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in given.state_dict().items()}
    loaded = dmq_ao.load(folder, model=given, backend="reference")
    assert torch.equal(loaded.float_tensors["time.weight"], load_file(folder / TENSORS)["time.weight"])
    now = given.state_dict()
    assert all(now[name].data_ptr() == pointer for name, (pointer, _) in before.items())
    assert all(torch.equal(now[name], tensor) for name, (_, tensor) in before.items())
    assert not torch.equal(now["time.weight"], loaded.float_tensors["time.weight"])


def _renamed() -> nn.Module:
    model = seeded(Plain)
    model.add_module("other", model.tokens)
    del model.tokens
    return model


def _wider() -> nn.Module:
    model = seeded(Plain)
    model.tokens = nn.Linear(16, 17)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_renamed, r"missing from the model \['tokens.bias', 'tokens.weight'\], not in the file \['other.bias', 'ot"),
        (_wider, r"shapes \(file != model\) \['tokens.bias \(16,\) != \(17,\)', 'tokens.weight \(16, 16\) != \(17"),
        (lambda: nn.Linear(3, 3), r"is of another model than Linear: .*Load with the model that was quantized"),
    ],
)
def test_another_model_is_refused_with_the_differences(
    folder: Path, other: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(InvalidFile, match=message) as caught:
        dmq_ao.load(folder, model=other())
    assert str(folder) in str(caught.value)


def test_a_model_that_computes_something_else_is_refused(folder: Path) -> None:
    class Shorter(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(self.merge(torch.cat([self.first(x), self.first(x)], 1))) * t.view(-1, 1, 1, 1)

    without_graph(folder)
    with pytest.raises(InvalidFile, match=r"quantized layers differ; only in the file: \['conv', 'tokens'\], only in"):
        dmq_ao.load(folder, model=seeded(Shorter))


def test_an_unknown_diffusers_class_is_named(folder: Path) -> None:
    pytest.importorskip("diffusers")
    edit_config(folder, lambda config: config.update(_class_name="UNet9D"))
    with pytest.raises(InvalidFile, match=r"has no UNet9D; install one that has, or give the float module"):
        dmq_ao.load(folder)


# --- damage ------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrite the config, and the checksums with it: what they cannot find must be found otherwise."""

    def damage(folder: Path) -> None:
        edit_config(folder, change)

    return damage


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def _flip(place: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / TENSORS).read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        (folder / TENSORS).write_bytes(bytes(data))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the tensors, and the checksums with them."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        reseal(folder)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), r"config.json is missing; give a folder that dmq_ao.save wrote"),
    "no tensors": (
        lambda f: (f / TENSORS).unlink(),
        r"safetensors is missing; .* must hold config.json, diffusion",
    ),
    "half the tensors": (_cut(TENSORS, 0.5), "safetensors: not a safetensors file"),
    "no bytes": (_cut(TENSORS, 0), "safetensors: not a safetensors file"),
    "a flipped bit at the start": (_flip(0), "safetensors: not a safetensors file"),
    "a flipped bit in the middle": (_flip(0.5), "the checksum of .* is not the one in manifest.json: truncated, alt"),
    "a flipped bit at the end": (_flip(1), "the checksum of .* is not the one in manifest.json"),
    "no checksums": (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json: not a manifest"),
    "half the checksums": (_cut(MANIFEST, 0.5), "manifest.json: not a manifest"),
    "an edited config": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"bits": 4', '"bits": 3')),
        "config.json: its checksum is not the one in manifest.json: truncated, altered",
    ),
    "an edited graph": (
        lambda f: (f / GRAPH).write_text((f / GRAPH).read_text().replace('"single"', ' "single"')),
        "graph.json: its checksum is not the one in config.json: truncated, altered",
    ),
    "half the config": (_cut(CONFIG, 0.5), "config.json: not JSON .* it is truncated or foreign"),
    "an empty config": (_cut(CONFIG, 0), "config.json: not JSON"),
    "a binary config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "config.json: not JSON"),
    "a float model": (
        lambda f: (f / CONFIG).write_text(json.dumps({"_class_name": "UNet2DModel"})),
        "no quantization_config of dmq_ao in it; this is a float model or another tool's",
    ),
    "another tool's": (_edit(lambda c: c[KEY].update(quant_method="gguf")), "no quantization_config of dmq_ao"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "no quantization_config of dmq_ao"),
    "another version": (
        _edit(lambda c: c[KEY].update(format_version=99)),
        r"format_version 99, this dmq_ao reads 1; it was written by \{.*'dmq_ao': .* install that version",
    ),
    "no checksum": (_edit(lambda c: c[KEY].pop("sha256")), r"missing keys \['sha256'\]"),
    "no layers": (_edit(lambda c: c[KEY].pop("layers")), "layers"),
    "no recipe": (_edit(lambda c: c[KEY].pop("recipe")), "recipe"),
    "a recipe of the future": (
        _edit(lambda c: c[KEY]["recipe"].update(reasoning=True)),
        r"recipe: unknown keys \['reasoning'\]",
    ),
    "no example": (_edit(lambda c: c[KEY].pop("example")), "example"),
    "a dtype that is none": (_edit(lambda c: c[KEY]["example"]["x"].update(dtype="float77")), "float77"),
    "layers that are none": (_edit(lambda c: c[KEY].update(layers=[])), "layers: expected an object, got list"),
    "a layer of other bits": (_edit(lambda c: c[KEY]["layers"]["conv"].update(bits=5)), "2304 codes of 5 bits take"),
    "a layer of another shape": (
        _edit(lambda c: c[KEY]["layers"]["conv"].update(shape=[16, 16, 3, 4])),
        r"3072 codes of 4 bits take 1536 uint8, got \[1152\]",
    ),
    "a layer too few": (_tensors(lambda t: t.pop("conv.weight")), "conv.weight"),
    "a scale too few": (_tensors(lambda t: t.pop("conv.input_scale")), "conv.input_scale"),
    "a float tensor too few": (
        _tensors(lambda t: t.pop("time.weight")),
        r"tensors missing \['time.weight'\], unexpected \[\]",
    ),
    "a tensor too many": (_tensors(lambda t: t.update(x=torch.zeros(2))), r"missing \[\], unexpected \['x'\]"),
    "a float tensor of another shape": (
        _tensors(lambda t: t.update({"time.bias": torch.zeros(3)})),
        r"time.bias must be \(16,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(folder: Path, model: nn.Module, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(InvalidFile, match=message) as caught:
        dmq_ao.load(folder, model=model)
    assert str(folder) in str(caught.value)


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=re.escape(str(tmp_path / "absent" / CONFIG)) + " is missing"):
        dmq_ao.load(tmp_path / "absent")


# --- writing -----------------------------------------------------------------


def test_a_file_is_no_folder(quantized: dmq_ao.QuantizedDenoiser, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file; give a folder to save into"):
        dmq_ao.save(quantized, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_other_files_of_the_folder_stay(quantized: dmq_ao.QuantizedDenoiser, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    dmq_ao.save(quantized, tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, TENSORS, GRAPH, MANIFEST]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "replace", "json"])
def test_a_failed_save_leaves_what_was_there(
    where: str,
    error: BaseException,
    model: nn.Module,
    samples: dmq_ao.CalibrationSet,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(folder)
    other, _ = flow(model, minmax("w8a8"), samples)

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half a file")
        raise error

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    if where == "save_file":
        monkeypatch.setattr(model_folder, "save_file", half)
    else:
        monkeypatch.setattr(os if where == "replace" else json, {"json": "dumps"}.get(where, where), fail)
    (folder.parent / "new").mkdir()
    for target in (folder, folder.parent / "new"):
        with pytest.raises(type(error)):
            dmq_ao.save(other, target)
    monkeypatch.undo()
    assert contents(folder) == before
    assert contents(folder.parent / "new") == {}
    assert dmq_ao.load(folder, model=model).recipe == RECIPES["per step with votes"]


def test_a_kill_between_the_two_files_is_noticed(
    model: nn.Module, samples: dmq_ao.CalibrationSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = flow(model, minmax("w8a8"), samples)
    replace, done = os.replace, []

    def once(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        dmq_ao.save(other, folder)
    monkeypatch.undo()
    assert sorted(contents(folder)) == [CONFIG, TENSORS, GRAPH, MANIFEST]
    with pytest.raises(InvalidFile, match="safetensors: tensors missing .* by manifest.json; copy all files"):
        dmq_ao.load(folder, model=model)


def test_a_folder_without_a_manifest_is_known_by_the_checksums_in_its_config(
    quantized: dmq_ao.QuantizedDenoiser, folder: Path
) -> None:
    (folder / MANIFEST).unlink()
    assert torch.equal(dmq_ao.load(folder, backend="reference")(*inputs()), quantized(*inputs()))
    _flip(0.9)(folder)
    with pytest.raises(InvalidFile, match="its checksum is not the one in config.json"):
        dmq_ao.load(folder)


# --- the graph in the folder -------------------------------------------------


def _graph(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrite the graph, and the checksums with it."""

    def damage(folder: Path) -> None:
        parts = json.loads((folder / GRAPH).read_text())
        change(parts)
        (folder / GRAPH).write_text(json.dumps(parts))
        reseal(folder)

    return damage


def _first(parts: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in parts["graph"]["nodes"] if node["op"] == op)


GRAPH_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda f: (f / GRAPH).unlink(), "graph.json is missing"),
    "half the graph": (_cut(GRAPH, 0.5), "graph.json: its checksum is not the one in config.json"),
    "no nodes": (_graph(lambda p: p["graph"].pop("nodes")), "graph.json: KeyError"),
    "no plan": (_graph(lambda p: p.pop("plan")), "graph.json: KeyError"),
    "a plan that is none": (_graph(lambda p: p["plan"][0].update(numel="many")), "graph.json: TypeError"),
    "an unknown node": (_graph(lambda p: _first(p, "call_function").update(args=[{"node": "x9"}])), "x9"),
    "an unknown layer": (_graph(lambda p: _first(p, "get_attr").update({"from": {"record": ["x9", "codes"]}})), "x9"),
    "an unknown word": (_graph(lambda p: _first(p, "call_function").update(args=[{"pickle": "x9"}])), "not a pickle"),
    "another kind of node": (_graph(lambda p: _first(p, "call_function").update(op="call_module")), "call_module"),
}


@pytest.mark.parametrize(("damage", "message"), GRAPH_DAMAGE.values(), ids=GRAPH_DAMAGE)
def test_damage_of_the_graph_is_named(
    folder: Path, model: nn.Module, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(InvalidFile, match=message) as caught:
        dmq_ao.load(folder, model=model)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["aten.no_such_thing.default", "os.system", "c10d.allreduce_.default", "aten.__class__.x"]
)
def test_a_graph_of_another_pytorch_is_exported_again(
    quantized: dmq_ao.QuantizedDenoiser, folder: Path, model: nn.Module, name: str
) -> None:
    _graph(lambda p: _first(p, "call_function").update(target=name))(folder)
    loaded = dmq_ao.load(folder, model=model, backend="reference")
    assert torch.equal(loaded(*inputs()), quantized(*inputs()))
    with pytest.raises(ValueError, match="give the float module"):
        dmq_ao.load(folder)


# --- codes stay in the file --------------------------------------------------


def test_codes_are_read_when_asked_for(quantized: dmq_ao.QuantizedDenoiser, folder: Path, tmp_path: Path) -> None:
    loaded = dmq_ao.load(folder)
    assert "conv" in loaded.records
    assert "time" not in loaded.records
    assert_same_records(loaded, quantized)
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data)  # the same, written again
    assert_same_records(loaded, quantized)
    (folder / TENSORS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InvalidFile, match="has changed since it was loaded; load again"):
        loaded.records["conv"]
    (folder / TENSORS).unlink()
    with pytest.raises(InvalidFile, match="is gone, and the codes were still in it"):
        dmq_ao.save(loaded, tmp_path / "elsewhere")
    with pytest.raises(KeyError):
        loaded.records["time"]


def test_stored_parts_compare(quantized: dmq_ao.QuantizedDenoiser, folder: Path) -> None:
    stored = model_folder.read(folder)
    for name, layer in quantized.records.items():
        assert_same(stored.records[name], layer, name)
    assert stored.example == quantized.signature.example
    assert stored.timestep_arg == "t"


class Looking(nn.Module):
    """Reads its embedding off a table by timestep, as home-made denoisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)
        self.middle = nn.Linear(16, 16)
        self.register_buffer("table", torch.randn(1000, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x) + self.table[t]).relu())


class Drawing(Looking):
    """Adds noise of its own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + torch.zeros_like(x).bernoulli(0.0), t)


def test_a_table_that_is_looked_into_is_stored(tmp_path: Path) -> None:
    model = seeded(Looking)
    saved, _ = flow(model, minmax("w8a8"), record(model, lambda s: model(torch.randn(4, 8), torch.full((4,), s))))
    dmq_ao.save(saved, tmp_path)
    x, t = torch.randn(2, 8), torch.tensor([5, 999])
    loaded = dmq_ao.load(tmp_path)
    assert torch.equal(dmq_ao.load(tmp_path, backend="reference")(x, t), saved(x, t))
    with pytest.raises(InvalidFile, match="a value is outside of what the model knows, such as a class"):
        loaded(x, torch.tensor([5, 1000]))


def test_a_graph_that_draws_is_not_stored_and_says_so(tmp_path: Path) -> None:
    model = seeded(Drawing)
    samples = record(model, lambda s: model(torch.randn(4, 8), torch.full((4,), s)))
    with pytest.warns(UserWarning, match=r"cannot be stored \(the operator aten.bernoulli.*load\(folder, model="):
        saved, _ = flow(model, minmax("w8a8"), samples)
    dmq_ao.save(saved, tmp_path)
    with pytest.raises(ValueError, match="give the float module"):
        dmq_ao.load(tmp_path)
    x, t = torch.randn(2, 8), torch.tensor([5, 999])
    with pytest.warns(UserWarning, match="cannot be stored"):
        assert torch.equal(dmq_ao.load(tmp_path, model=model, backend="reference")(x, t), saved(x, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_of_fractional_timesteps_is_exported_again_in_its_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = seeded(Plain).to(dtype)

    def call(step: int) -> None:
        model(torch.randn(4, 3, 8, 8, dtype=dtype), torch.full((4,), step / 1000 + 0.01))

    quantized, _ = flow(model, minmax("w8a8"), record(model, call))
    dmq_ao.save(quantized, tmp_path)
    without_graph(tmp_path)
    loaded = dmq_ao.load(tmp_path, model=model, backend="reference")
    x, t = torch.randn(2, 3, 8, 8, dtype=dtype), torch.full((2,), 0.31)
    assert loaded.dtype == dtype
    assert torch.equal(loaded(x, t), quantized(x, t))
