"""What the verbs are asked for, checked before anything takes long: each error says what came and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.config import MissingStatistics, Recipe
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.graph import private
from dmq_ao.graph.arguments import bind, find_timestep, flatten_inputs
from dmq_ao.graph.containers import with_tuples
from dmq_ao.graph.roles import whole_name
from dmq_ao.quantizer.patterns import no_match, patterns
from dmq_ao.quantizer.prepared import Prepared, is_prepared
from dmq_ao.records import LayerPlan
from dmq_ao.samples import CalibrationSet

DENOISER_NAMES = ("unet", "transformer", "transformer_2")
_QUANTIZERS = ("torchao", "bitsandbytes", "optimum.quanto", "quanto", "torch.ao.nn.quantized", "diffusers.quantizers")
_HOOKS = {
    "layerwise_casting": "load it again without enable_layerwise_casting()",
    "group_offloading": "load it again without enable_group_offload()",
}


def denoiser_name(pipeline: Any) -> str:
    """Attribute under which a pipeline keeps its denoiser; the first of several.

    Raises:
        TypeError: when it has none.
    """
    return denoiser_names(pipeline)[0]


def denoiser_names(pipeline: Any) -> tuple[str, ...]:
    """Attributes under which a pipeline keeps its denoisers: most have one, Wan 2.2 has two.

    Raises:
        TypeError: when it has none.
    """
    present = tuple(name for name in DENOISER_NAMES if isinstance(getattr(pipeline, name, None), nn.Module))
    if not present:
        raise TypeError(
            f"{type(pipeline).__name__} has no denoiser under {' or '.join(DENOISER_NAMES)}; give a pipeline, or use"
            " prepare, calibrate and convert on the module itself"
        )
    return present


def check_prepare(denoiser: Any, recipe: Any, example_inputs: Any, timestep_arg: str | None) -> None:
    """Refuse what ``prepare`` cannot use.

    Raises:
        TypeError: for a pipeline, a quantized or compiled model, a recipe's name, a calibration set.
        ValueError: for a denoiser in a state that is not exported, a pattern without a layer, or example inputs that
            it cannot be called with.
    """
    check_float(denoiser, "prepare")
    check_recipe(recipe, "prepare")
    if isinstance(example_inputs, CalibrationSet):
        raise TypeError("example_inputs must be those of one call, got a CalibrationSet; give samples.example()")
    if not isinstance(example_inputs, (Mapping, tuple)):
        raise TypeError(
            "example_inputs must be a dict of keyword arguments or a tuple of positionals, got"
            f" {type(example_inputs).__name__}; samples.example() gives them"
        )
    _check_state(denoiser)
    _check_patterns_of_modules(denoiser, recipe)
    check_example(denoiser, bind(denoiser, example_inputs), timestep_arg)


def check_quantize(target: Any, recipe: Any, samples: Any) -> None:
    """Refuse what ``quantize`` cannot use, as ``check_prepare`` does.

    Raises:
        TypeError: naming the argument.
        ValueError: for samples of a denoiser that ``target`` does not have.
    """
    check_recipe(recipe, "quantize")
    by_name = isinstance(samples, Mapping) and all(isinstance(one, CalibrationSet) for one in samples.values())
    if not by_name:
        check_samples(samples, "quantize")
    if isinstance(target, QuantizedDenoiser):
        check_float(target, "quantize")
    names, kind = denoiser_names(target), type(target).__name__
    if not by_name and len(names) > 1:
        raise TypeError(
            f"{kind} has the denoisers {' and '.join(names)}, and quantize got samples of one; give those of each by"
            f" its name, {{{names[0]!r}: ..., {names[1]!r}: ...}}, or of one alone, {{{names[0]!r}: samples}}"
        )
    if by_name and not (samples and samples.keys() <= set(names)):
        raise ValueError(f"samples must be of the denoisers of {kind}, {list(names)}; got {list(samples)}")


def check_float(denoiser: Any, verb: str) -> None:
    """Refuse what is no float denoiser.

    Raises:
        TypeError: with what to pass instead.
    """
    kind = type(denoiser).__name__
    if isinstance(denoiser, QuantizedDenoiser):
        raise TypeError(f"{verb} takes a float denoiser, and this one is quantized; load the float model again")
    if not isinstance(denoiser, nn.Module):
        names = [name for name in DENOISER_NAMES if isinstance(getattr(denoiser, name, None), nn.Module)]
        instead = f"of a pipeline, pass its denoiser: {verb}(pipe.{names[0]}, ...)" if names else "pass the denoiser"
        raise TypeError(f"{verb} takes a torch.nn.Module, got {kind}; {instead}")
    if private.uncompiled(denoiser) is not denoiser:
        raise TypeError(f"{verb} takes a denoiser that is not compiled; pass the module that torch.compile was given")
    if is_prepared(denoiser):
        raise TypeError(f"{verb} takes the float denoiser, and this graph is prepared; calibrate and convert it")
    for name, part in denoiser.named_modules():
        if type(part).__module__.startswith(_QUANTIZERS):
            raise TypeError(_quantized_by(verb, kind, name, type(part)))
    for name, parameter in denoiser.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise TypeError(
                f"{verb} takes a denoiser with weights, and {kind}.{name} has none yet; call it once first"
            )
        if type(parameter) not in (nn.Parameter, Tensor) or type(parameter.data) is not Tensor:
            raise TypeError(_quantized_by(verb, kind, name, type(parameter)))
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(_quantized_by(verb, kind, name, parameter.dtype))


def _quantized_by(verb: str, kind: str, name: str, what: object) -> str:
    word = what.__module__.partition(".")[0] + "'s " + what.__name__ if isinstance(what, type) else what
    return (
        f"{verb} takes a float denoiser, and {name or 'all'} of {kind} is {word}: it is quantized already; load the"
        " model without quantization_config, in float32, bfloat16 or float16"
    )


def check_recipe(recipe: Any, verb: str) -> None:
    """Refuse what is no recipe.

    Raises:
        TypeError: naming what makes one.
    """
    if not isinstance(recipe, Recipe):
        example = recipe if isinstance(recipe, str) else "w4a8"
        raise TypeError(
            f"{verb} takes a Recipe, got {type(recipe).__name__} {recipe!r:.60}; dmq_ao.recipes.default({example!r})"
            " makes one"
        )


def check_samples(samples: Any, verb: str) -> None:
    """Refuse what is no calibration set.

    Raises:
        TypeError: naming what makes one.
    """
    if not isinstance(samples, CalibrationSet):
        raise TypeError(
            f"{verb} takes a CalibrationSet, got {type(samples).__name__}; dmq_ao.record makes one from any sampling"
            " loop"
        )


def _check_state(denoiser: nn.Module) -> None:
    """Refuse a denoiser in a state that an export would write down, or stumble over."""
    for path, part in denoiser.named_modules():
        for state, remedy in _states(part):
            where = f"{type(denoiser).__name__}" + (f".{path}" if path else "")
            raise ValueError(f"{where} {state}; {remedy} before dmq_ao.prepare")


def _states(part: nn.Module) -> Iterator[tuple[str, str]]:
    if part.training:
        yield "is in training mode", "call .eval() on the denoiser first,"
    if getattr(part, "gradient_checkpointing", False) is True:
        yield "has gradient checkpointing on", "call disable_gradient_checkpointing()"
    if private.offload_hook(part) is not None:
        yield "is offloaded by hooks of accelerate", "call pipe.remove_all_hooks()"
    for name in private.diffusers_hooks(part):
        yield f"has diffusers' hook {name!r}", _HOOKS.get(name, "call disable_cache(), or remove the hook,")
    processor = getattr(part, "processor", None)
    if type(processor).__name__.startswith("Sliced"):
        yield "computes attention in slices", "call pipe.disable_attention_slicing()"
    if private.computes_in_chunks(part):
        yield "computes in chunks", "call disable_forward_chunking()"
    if private.is_compiled(part):
        yield "is compiled", "load the model again, and compile the quantized denoiser instead,"
    for name, parameter in part.named_parameters(recurse=False):
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize < 2:
            yield f"keeps {name} as {parameter.dtype}", "cast it to float32, bfloat16 or float16"


def _check_patterns_of_modules(denoiser: nn.Module, recipe: Recipe) -> None:
    """Refuse patterns that can match no layer; the graph's layers, known after the export, tell of the rest."""
    tensors = [*denoiser.named_parameters(remove_duplicate=False), *denoiser.named_buffers(remove_duplicate=False)]
    layers = {name.removesuffix(".weight") for name, tensor in tensors if tensor.dim() > 1}
    modules = {name for name, _ in denoiser.named_modules() if name}
    scaled = [] if recipe.scaling is None else [("scaling", pattern) for pattern in recipe.scaling.layers]
    for field, pattern in (*patterns(recipe.config), *scaled):
        if not pattern.startswith("@") and not _may_match(pattern, layers | modules):
            raise no_match(field, pattern, layers)


def _may_match(pattern: str, names: Collection[str]) -> bool:
    """Whether a pattern matches a name, or a part or a copy of what has that name."""
    forms = {pattern, whole_name(pattern), pattern.partition("#")[0]}
    return any(fnmatchcase(f"{name}{end}", form) for form in forms for name in names for end in ("", ".part0", "#2"))


def check_example(denoiser: nn.Module, arguments: Mapping[str, Any], timestep_arg: str | None) -> None:
    """Refuse inputs that the denoiser itself fails on; tried without values first, which costs next to nothing.

    Raises:
        ValueError: with the inputs' shapes, and the denoiser's own error.
    """
    error = None if _runs_without_values(denoiser, arguments) else _error_of_call(denoiser, arguments)
    if error is None:
        return
    flat, kind = flatten_inputs(arguments), type(denoiser).__name__
    tuples = with_tuples(dict(arguments))  # samples hold lists where a call had tuples
    if not private.same_nesting(arguments, tuples) and _error_of_call(denoiser, tuples) is None:
        return
    timestep = arguments.get(find_timestep(list(arguments), timestep_arg) or "")
    if isinstance(timestep, Tensor) and timestep.dim() == 1:
        name = next(name for name, value in arguments.items() if value is timestep)
        if _error_of_call(denoiser, {**arguments, name: timestep[0]}) is None:
            raise ValueError(
                f"{kind} takes {name} as one number for all rows, and the rows of a calibration batch are at timesteps"
                f" of their own, [B]: let its forward take both, as by {name}.reshape(-1, 1, ...), and prepare again"
            ) from error
    shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in flat.items()}
    raise ValueError(
        f"{kind} cannot be called with the example inputs {shapes}: {type(error).__name__}: {error}. Give inputs of"
        " one of its calls: samples of this very model, one timestep a row [B], in its dtype"
    ) from error


def _error_of_call(denoiser: nn.Module, arguments: Mapping[str, Any]) -> Exception | None:
    device = graph.device_of(denoiser)
    inputs = private.map_leaves(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(arguments))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            denoiser(**inputs)
    except Exception as error:  # of any type: it is the model's own code
        return error
    return None


def _runs_without_values(denoiser: nn.Module, arguments: Mapping[str, Any]) -> bool:
    try:
        with private.fake_tensor_mode(), torch.no_grad():
            empty = private.map_leaves(
                lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x,
                dict(arguments),
            )
            graph.skeleton(denoiser)(**empty)
    except Exception:  # of any type; code that reads values fails too, so that the real call decides
        return False
    return True


def check_group_sizes(captured: GraphModule, plan: Mapping[str, LayerPlan]) -> None:
    """Refuse group sizes that do not divide a layer's inputs.

    Raises:
        ValueError: naming the layer, and sizes that would do.
    """
    for layer in graph.find_layers(captured):
        config = plan[layer.name].weight
        if config is None or config.group_size is None or not layer.quantizable:
            continue
        weight = graph.attribute(captured, graph.weight_of(layer.node))
        inputs, size = weight[0].numel(), config.group_size
        if inputs % size:
            fit = [divisor for divisor in range(1, inputs + 1) if inputs % divisor == 0]
            nearest = sorted(sorted(fit, key=lambda divisor: abs(divisor - size))[:3])
            raise ValueError(
                f"group_size {size} does not divide the {inputs} inputs of {layer.name}; {nearest} would do, or keep"
                " the layer in float: keep_float, or an override with per_channel weights"
            )


def check_not_all_float(name: str, captured: GraphModule, plan: Mapping[str, LayerPlan], recipe: Recipe) -> None:
    """Refuse a denoiser that would stay as it is: it has been misread, or the recipe has.

    Raises:
        ValueError: with what the graph calls, and why each layer stays in float.
    """
    products = recipe.config.attention is not None and "scaled_dot_product_attention" in graph.operators_of(captured)
    if products or any(item.weight is not None for item in plan.values()):
        return
    reasons = Counter(item.why for item in plan.values())
    causes = "; ".join(f"{count} kept in float: {why}" for why, count in reasons.most_common())
    calls = ", ".join(f"{count} {word}" for word, count in list(graph.operators_of(captured).items())[:12])
    raise ValueError(
        f"nothing of {name} would be quantized. Convolutions, linear layers and embedding tables that read a stored"
        f" weight were looked for: {causes or 'there are none'}. The exported graph calls {calls or 'no operator'}."
        " Change keep_float or the overrides of the recipe, or write the products as nn.Linear or convolutions"
    )


def check_calibrated(state: Prepared) -> None:
    """Refuse a graph whose calibration did not come to its end.

    Raises:
        MissingStatistics: with what to do.
    """
    if state.incomplete:
        raise MissingStatistics(
            "the last calibration of this graph failed or was interrupted, so its ranges are of a part of the samples;"
            " run calibrate(prepared, samples) to its end, then convert"
        )
