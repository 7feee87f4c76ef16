"""The verbs misused: what cannot work is refused at once, and the error says what would."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, flow, record, seeded
from torch import Tensor, nn

import dmq_ao
from dmq_ao import CalibrationSet, Granularity, MissingStatistics, Recipe, TensorConfig, graph, recipes
from dmq_ao.quantizer.prepared import state_of

RECIPE = recipes.minmax("w8a8")
INPUTS = {"x": torch.ones(2, 3, 8, 8), "t": torch.tensor([1, 2])}


class Boxed(Tensor):
    """A tensor of another library."""


def boxed(model: nn.Module) -> nn.Module:
    model.conv.weight = nn.Parameter(model.conv.weight.detach().as_subclass(Boxed), requires_grad=False)
    return model


def with_codes(model: nn.Module) -> nn.Module:
    model.conv.weight = nn.Parameter(torch.ones(16, 16, 3, 3, dtype=torch.int8), requires_grad=False)
    return model


def with_layers_of(library: str, model: nn.Module) -> nn.Module:
    kind = type("Linear4bit", (nn.Linear,), {"__module__": library})
    model.tokens.__class__ = kind
    return model


def quantized_by_torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "tokens")
    return model


def with_attribute(name: str, value: Any, model: nn.Module, path: str = "conv") -> nn.Module:
    setattr(model.get_submodule(path), name, value)
    return model


@pytest.fixture(scope="module")
def quantized(model: nn.Module, samples: CalibrationSet) -> dmq_ao.QuantizedDenoiser:
    return flow(model, RECIPE, samples)[0]


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused at once is refused before the export."""

    def exported(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr(graph, "capture", exported)


# --- what is no float denoiser -----------------------------------------------


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("subject", "words"),
    [
        pytest.param(lambda: SimpleNamespace(unet=Plain()), r"pass its denoiser: prepare\(pipe.unet", id="pipeline"),
        pytest.param(lambda: SimpleNamespace(transformer=Plain()), r"prepare\(pipe.transformer", id="of transformers"),
        pytest.param(lambda: "unet", "takes a torch.nn.Module, got str", id="path"),
        pytest.param(lambda: None, "takes a torch.nn.Module, got NoneType", id="nothing"),
        pytest.param(
            lambda: torch.compile(seeded(Plain)), "pass the module that torch.compile was given", id="compiled"
        ),
        pytest.param(lambda: quantized_by_torchao(seeded(Plain)), "torchao's .* quantized already", id="torchao"),
        pytest.param(lambda: boxed(seeded(Plain)), "conv.weight of Plain is .*Boxed.* quantized", id="subclass"),
        pytest.param(lambda: with_codes(seeded(Plain)), "conv.weight of Plain is torch.int8", id="codes"),
        pytest.param(lambda: with_layers_of("bitsandbytes.nn", seeded(Plain)), "bitsandbytes's Linear4bit", id="4"),
        pytest.param(lambda: with_layers_of("optimum.quanto.nn", seeded(Plain)), "optimum's Linear4bit", id="quanto"),
        pytest.param(lambda: nn.LazyLinear(3).eval(), "has none yet; call it once", id="lazy"),
    ],
)
def test_what_is_no_float_denoiser_is_not_prepared(subject: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        dmq_ao.prepare(subject(), RECIPE, INPUTS)


@pytest.mark.usefixtures("no_export")
def test_a_quantized_denoiser_is_not_quantized_again(
    quantized: dmq_ao.QuantizedDenoiser, samples: CalibrationSet
) -> None:
    for call in (
        lambda: dmq_ao.prepare(quantized, RECIPE, INPUTS),
        lambda: dmq_ao.quantize(SimpleNamespace(unet=quantized), RECIPE, samples),
        lambda: dmq_ao.quantize(quantized, RECIPE, samples),
    ):
        with pytest.raises(TypeError, match="this one is quantized; load the float model again"):
            call()


def test_a_prepared_graph_is_not_prepared_again() -> None:
    prepared = dmq_ao.prepare(seeded(Plain), RECIPE, INPUTS)
    with pytest.raises(TypeError, match="this graph is prepared; calibrate and convert it"):
        dmq_ao.prepare(prepared, RECIPE, INPUTS)


# --- states that are switched off first --------------------------------------


def sliced(model: nn.Module) -> nn.Module:
    processor = type("SlicedAttnProcessor", (), {})()
    return with_attribute("processor", processor, model)


def in_float8(model: nn.Module) -> nn.Module:
    model.conv.weight.data = model.conv.weight.data.to(torch.float8_e4m3fn)
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    model.conv.compile()
    return model


def hooked(name: str, model: nn.Module) -> nn.Module:
    return with_attribute("_diffusers_hook", SimpleNamespace(hooks={name: object()}), model)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.train(), r"Plain is in training mode; call .eval\(\)"),
        (lambda m: with_attribute("training", True, m), r"Plain.conv is in training mode"),
        (lambda m: with_attribute("gradient_checkpointing", True, m), r"call disable_gradient_checkpointing\(\)"),
        (lambda m: with_attribute("_hf_hook", object(), m), r"Plain.conv is offloaded .* pipe.remove_all_hooks\(\)"),
        (lambda m: hooked("group_offloading", m), "again without enable_group_offload"),
        (lambda m: hooked("layerwise_casting", m), "again without enable_layerwise_casting"),
        (lambda m: hooked("pyramid_attention_broadcast", m), r"call disable_cache\(\)"),
        (lambda m: hooked("layer_skip_hook", m), "or remove the hook"),
        (sliced, r"computes attention in slices; call pipe.disable_attention_slicing\(\)"),
        (lambda m: with_attribute("_chunk_size", 2, m), r"call disable_forward_chunking\(\)"),
        (in_float8, "keeps weight as torch.float8_e4m3fn; cast it"),
        (compiled_inside, "Plain.conv is compiled; load the model again"),
    ],
)
def test_states_are_switched_off_first(change: Callable[[nn.Module], nn.Module], words: str) -> None:
    model = seeded(Plain)
    change(model)
    with pytest.raises(ValueError, match=words):
        dmq_ao.prepare(model, RECIPE, INPUTS)


def test_states_of_diffusers_models_are_recognised(tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, example = tiny_unet2d_condition
    for change, words in (
        (lambda m: m.set_attention_slice("max"), "computes attention in slices"),
        (lambda m: m.enable_gradient_checkpointing(), "gradient checkpointing"),
        (lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "layerwise_casting"),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        with pytest.raises(ValueError, match=words):
            dmq_ao.prepare(changed, RECIPE, example)


# --- recipes, samples, inputs ------------------------------------------------


@pytest.mark.usefixtures("no_export")
def test_a_recipe_is_not_a_word(model: nn.Module, samples: CalibrationSet) -> None:
    for call in (
        lambda: dmq_ao.prepare(model, "w8a8", INPUTS),
        lambda: dmq_ao.quantize(SimpleNamespace(unet=model), "w8a8", samples),
    ):
        with pytest.raises(TypeError, match=r"takes a Recipe, got str 'w8a8'; dmq_ao.recipes.default\('w8a8'\)"):
            call()
    with pytest.raises(TypeError, match="takes a Recipe, got QuantConfig"):
        dmq_ao.prepare(model, RECIPE.config, INPUTS)
    with pytest.raises(TypeError, match="quantize takes a CalibrationSet, got dict"):
        dmq_ao.quantize(SimpleNamespace(unet=model), RECIPE, INPUTS)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({"x": INPUTS["x"]}, TypeError, "example_inputs do not fit Plain.forward.*missing a required argument: 't'"),
        (INPUTS | {"y": 1}, TypeError, "got an unexpected keyword argument 'y'"),
        (INPUTS["x"], TypeError, "example_inputs must be a dict .* or a tuple .*, got Tensor"),
        ([*INPUTS.values()], TypeError, "got list; samples.example"),
        (
            INPUTS | {"x": torch.ones(2, 5, 8, 8)},
            ValueError,
            r"cannot be called .*\(2, 5, 8, 8\).*this very model",
        ),
        (
            INPUTS | {"x": torch.ones(2, 3, 8, 8).double()},
            ValueError,
            "Plain cannot be called with the example inputs",
        ),
        (INPUTS | {"t": torch.ones(3)}, ValueError, "cannot be called with the example inputs"),
    ],
)
def test_inputs_that_the_denoiser_fails_on_are_refused_at_once(
    model: nn.Module, inputs: Any, error: type[Exception], words: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=words):
        dmq_ao.prepare(model, RECIPE, inputs)
    assert time.monotonic() - started < 5


def test_a_calibration_set_is_not_an_example(model: nn.Module, samples: CalibrationSet) -> None:
    with pytest.raises(TypeError, match=r"got a CalibrationSet; give samples.example\(\)"):
        dmq_ao.prepare(model, RECIPE, samples)


@pytest.mark.usefixtures("no_export")
def test_a_timestep_for_all_rows_is_told_before_calibration() -> None:
    class Scalar(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if t.dim():
                raise AssertionError
            return super().forward(x, t.expand(len(x)))

    model = seeded(Scalar)
    samples = record(model, lambda step: model(torch.randn(4, 3, 8, 8), torch.tensor(step)))
    with pytest.raises(ValueError, match=r"Scalar takes t as one number for all rows, .* t.reshape\(-1, 1, ...\)"):
        dmq_ao.prepare(model, RECIPE, samples.example())


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("more", "calls"),
    [
        ({}, 1),
        ({"size": (8, 8)}, 1),
        ({"size": {"height": torch.ones(2)}}, 1),
        ({"size": [8, 8]}, 2),
        ({"size": {"sides": [torch.ones(2)]}}, 2),
        ({"size": ([8], 8)}, 2),
    ],
)
def test_a_denoiser_that_fails_is_called_again_only_with_other_arguments(more: dict[str, Any], calls: int) -> None:
    class Failing(Plain):
        def forward(self, x: Tensor, t: Tensor, size: Any = None) -> Tensor:
            seen.append(x.device.type)
            raise RuntimeError("never")

    seen: list[str] = []
    with pytest.raises(ValueError, match="Failing cannot be called .*RuntimeError: never"):
        dmq_ao.prepare(seeded(Failing), RECIPE, {"x": INPUTS["x"], "t": torch.tensor(1), **more})
    assert seen.count("cpu") == calls


def test_a_denoiser_that_reads_values_is_called_to_find_out() -> None:
    class Reading(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if x.is_meta or torch.compiler.is_exporting():
                raise RuntimeError("no values")
            return super().forward(x, t)

    with pytest.raises(ValueError, match="cannot be exported .*no values"):  # the call itself is right
        dmq_ao.prepare(seeded(Reading), RECIPE, INPUTS)


def samples_of(*x: int, timestep: int = 1, **shared: Tensor) -> CalibrationSet:
    """Eight samples whose inputs ``x`` are of these sizes, two a step."""
    step = torch.arange(4).repeat_interleave(2)
    name = "t" if timestep else "s"
    return CalibrationSet({"x": torch.randn(8, *x)}, shared, torch.tensor(STEPS)[step], step, name)


TAKERS = pytest.mark.parametrize(
    "verb",
    [
        lambda prepared, samples: dmq_ao.calibrate(prepared, samples, progress=False),
        lambda prepared, samples: dmq_ao.search_bits(prepared, samples, progress=False),
    ],
    ids=["calibrate", "search_bits"],
)


@TAKERS
@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (
            samples_of(5, 8, 8),
            r"samples' shapes .*'x' dimension 1 is 5 \(3 in the example.*model that was prepared",
        ),
        (samples_of(1, 16, 4), r"samples' shapes .*'x' dimension 1 is 1 \(3 in the example"),
        (
            samples_of(6, 8),
            r"of another model: x is \(2, 6, 8\) there, \(2, 3, 8, 8\) in the prepared denoiser; record",
        ),
        (samples_of(3, 4, 8, 8), r"of another model: x is \(2, 3, 4, 8, 8\) there"),
        (samples_of(3, 8, 8, timestep=0), r"the samples lack \['t'\]"),
        (samples_of(), r"of another model: x is \(2,\) there"),
    ],
)
def test_samples_of_another_model_are_refused(
    verb: Callable[[Any, Any], object], foreign: CalibrationSet, words: str, model: nn.Module
) -> None:
    prepared = dmq_ao.prepare(model, RECIPE, INPUTS)
    with pytest.raises(ValueError, match=words):
        verb(prepared, foreign)


@TAKERS
def test_samples_that_are_none_are_refused(
    verb: Callable[[Any, Any], object], model: nn.Module, samples: CalibrationSet
) -> None:
    prepared = dmq_ao.prepare(model, RECIPE, INPUTS)
    for other in (INPUTS, samples.inputs, list(samples.batches(4)), None):
        with pytest.raises(TypeError, match=r"takes a CalibrationSet, got \w+; dmq_ao.record makes one"):
            verb(prepared, other)


@TAKERS
def test_a_graph_of_one_number_of_samples_is_refused(verb: Callable[[Any, Any], object]) -> None:
    class Fixed(Plain):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x.reshape(4, 3, 8, 8), t)

    prepared = dmq_ao.prepare(seeded(Fixed), RECIPE, samples_of(3, 8, 8).example(4))
    with pytest.raises(ValueError, match=r"captured for some numbers of samples alone: .*shape.*example\(4\)"):
        verb(prepared, samples_of(3, 8, 8))


# --- patterns and groups -----------------------------------------------------


def keeping(pattern: str) -> Recipe:
    config = dataclasses.replace(RECIPE.config, keep_float=(*RECIPE.config.keep_float, pattern))
    return dataclasses.replace(RECIPE, config=config)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("pattern", "near"), [("frist", "first"), ("tokens.weight", "tokens"), ("conv1", "conv"), ("zzz*", "conv")]
)
def test_patterns_without_a_layer_are_told_before_the_export(model: nn.Module, pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"keep_float: pattern '{pattern[:3]}.*matches no layer; near .*'{near}'"):
        dmq_ao.prepare(model, keeping(pattern), INPUTS)


@pytest.mark.parametrize("pattern", ["merge.part1", "merge", "tok*", "[tm]*"])
def test_patterns_with_a_layer_are_taken(model: nn.Module, pattern: str) -> None:
    plan = state_of(dmq_ao.prepare(model, keeping(pattern), INPUTS)).plan
    assert any(pattern in item.why for item in plan.values())


@pytest.mark.parametrize(("size", "fit"), [(5, r"\[3, 4, 6\]"), (32, r"\[18, 24, 36\]"), (7, r"\[6, 8, 9\]")])
def test_groups_that_do_not_divide_are_told_before_calibration(model: nn.Module, size: int, fit: str) -> None:
    weight = TensorConfig(4, granularity=Granularity.PER_GROUP, group_size=size)
    recipe = recipes.minmax("w4a16")
    recipe = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, weight=weight))
    with pytest.raises(ValueError, match=rf"group_size {size} does not divide the 144 inputs of conv; {fit} would do"):
        dmq_ao.prepare(model, recipe, INPUTS)


# --- a calibration that failed -----------------------------------------------


def test_a_calibration_that_failed_is_not_converted(model: nn.Module, samples: CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, RECIPE, INPUTS)
    spoiled = {name: x.clone() for name, x in samples.inputs.items()}
    spoiled["x"][9] = 3e38  # the sums overflow
    step = samples.step
    bad = CalibrationSet(spoiled, {}, torch.tensor(STEPS)[step], step, "t")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        dmq_ao.calibrate(prepared, bad, progress=False)
    with pytest.raises(MissingStatistics, match="failed or was interrupted, .* run calibrate"):
        dmq_ao.convert(prepared)
    dmq_ao.calibrate(prepared, samples, progress=False)
    dmq_ao.convert(prepared)


def test_an_interrupted_calibration_is_not_converted(
    model: nn.Module, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = dmq_ao.prepare(model, RECIPE, INPUTS)
    dmq_ao.calibrate(prepared, samples, progress=False)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dmq_ao.api.stages.observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dmq_ao.calibrate(prepared, samples, progress=False)
    with pytest.raises(MissingStatistics, match="failed or was interrupted"):
        dmq_ao.convert(prepared)


def test_a_wrong_argument_leaves_an_earlier_calibration_whole(model: nn.Module, samples: CalibrationSet) -> None:
    prepared = dmq_ao.prepare(model, RECIPE, INPUTS)
    dmq_ao.calibrate(prepared, samples, progress=False)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        dmq_ao.calibrate(prepared, samples, progress=False, batch_size=0)
    dmq_ao.convert(prepared)
