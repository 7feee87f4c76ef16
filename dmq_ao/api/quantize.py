"""The verbs: prepare, calibrate, convert, and ``quantize``, which is all three in one; ``saving`` has the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dmq_ao import graph
from dmq_ao.api import arguments
from dmq_ao.api.calibrate import CalibrationReport, calibrate
from dmq_ao.api.optional import check_neutral, optional_names
from dmq_ao.api.roles import check_roles, say_layer_roles
from dmq_ao.backends.backend import Backend
from dmq_ao.backends.registry import choose_backend
from dmq_ao.config import Ranges, Recipe
from dmq_ao.denoiser import DenoiserParts, QuantizedDenoiser
from dmq_ao.graph import values
from dmq_ao.graph.arguments import TIMESTEP_NAMES
from dmq_ao.graph.noise import noise_tensors
from dmq_ao.graph.roles import roles_by_plan
from dmq_ao.observers import ActivationObserver
from dmq_ao.passes import out_of_place, own_tensors
from dmq_ao.quantizer.plan import make_plan
from dmq_ao.quantizer.prepared import float_weight, observers, require_prepared, state_of, tables
from dmq_ao.quantizer.quantizer import DiffusionQuantizer
from dmq_ao.records import LayerRecord, PackedRecords, on_device, packed_record
from dmq_ao.samples import CalibrationSet
from dmq_ao.serialization.storable import storable


def prepare(
    denoiser: nn.Module,
    recipe: Recipe,
    example_inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    timestep_arg: str | None = None,
    backend: str = "auto",
    optional: Sequence[str] = (),
    roles: Mapping[str, str | Sequence[str]] | None = None,
) -> GraphModule:
    """Export a denoiser and put an observer on every tensor that the recipe quantizes. The denoiser is not changed.

    Args:
        denoiser: any ``torch.export``-able module in eval mode.
        recipe: what to quantize and how.
        example_inputs: keyword arguments (or a tuple of positionals) of one call; ``samples.example()`` gives them.
        timestep_arg: name of the timestep argument, when it is not ``timestep``, ``timesteps`` or ``t``.
        backend: where the result is going to run: checked now, not after an hour of calibration.
        optional: arguments among the example inputs that a call may leave out, all together, as a ControlNet's
            ``["down_block_additional_residuals", "mid_block_additional_residual"]``. The denoiser is called to see
            that zeros in their place are as if they were left out.
        roles: of layers, by name, where dataflow shows others: ``{"stem": "@input", "adapter": "@none"}``; of
            ``@input``, ``@output``, ``@embedding`` and ``@none``.

    Returns:
        A graph that computes what the denoiser computes and observes.

    Raises:
        TypeError: for a pipeline, a quantized or compiled model, a recipe's name, or inputs of no call.
        ValueError: for patterns that match nothing, unknown names, training mode, hooks, inputs that the denoiser
            fails on, groups that do not divide a layer's inputs, per-step ranges without a timestep; for a denoiser
            that cannot be exported, or of which nothing would be quantized; for ``optional`` arguments that it
            cannot do without.
        UnsupportedByBackend: when the backend cannot run the recipe, with the reasons.
    """
    arguments.check_prepare(denoiser, recipe, example_inputs, timestep_arg)
    callers_roles = check_roles(denoiser, roles)
    captured = graph.capture(denoiser, example_inputs, timestep_arg)
    if callers_roles:
        say_layer_roles(captured, callers_roles)
    plan = make_plan(captured, recipe.config)
    arguments.check_not_all_float(type(denoiser).__name__, captured, plan, recipe)
    arguments.check_group_sizes(captured, plan)
    choose_backend(backend, graph.device_of(denoiser), plan)
    signature = graph.signature_of(captured)
    if optional:
        signature = replace(signature, optional=optional_names(captured, optional))
        check_neutral(denoiser, example_inputs, signature.optional)
    prepared = prepare_pt2e(captured, DiffusionQuantizer(recipe))
    graph.set_signature(prepared, signature)
    state_of(prepared).skeleton = graph.skeleton(denoiser)
    _pass_timestep(prepared)
    return graph.allow_train_eval(prepared)


def _pass_timestep(prepared: GraphModule) -> None:
    """Give the timestep to every observer that keeps a row per step."""
    timestep = graph.placeholders(prepared).get(graph.signature_of(prepared).timestep or "")
    for node in prepared.graph.nodes:
        if node.op != "call_module":
            continue
        observer = prepared.get_submodule(str(node.target))
        if isinstance(observer, ActivationObserver) and observer.config.ranges is Ranges.PER_STEP:
            if timestep is None:
                raise ValueError(
                    f"{observer.layer}: per_step ranges need the timestep, and no argument is called"
                    f" {', '.join(TIMESTEP_NAMES)}; name it with timestep_arg=, or use static ranges"
                )
            node.args = (node.args[0], timestep)
            if node < timestep:  # it watches another input, and stands between the two
                timestep.append(node)
    prepared.recompile()


def convert(
    prepared: GraphModule,
    backend: str = "auto",
    *,
    packed: bool = False,
    latency_aware: bool = False,
    share_float: bool = False,
) -> QuantizedDenoiser:
    """Turn a calibrated graph into integers, and lower it to a backend. ``prepared`` can be converted again.

    Args:
        prepared: from ``prepare``, after ``calibrate``.
        backend: ``"reference"`` (the q/dq graph), ``"onednn"`` (int8 on CPUs), ``"cuda"`` (int8 and packed weights on
            NVIDIA GPUs, by Triton) or ``"auto"``, which takes ``"onednn"`` where it runs and else ``"reference"``.
        packed: keep codes of at most 4 bits two a byte in memory and unpack them in every call, which takes time;
            integer layers compute the same bits. Linears of weight-only layers then run on PyTorch's int4 kernel where
            they are bfloat16: in a bfloat16 denoiser, or under ``dmq_ao.compile(mode="max")``.
        latency_aware: time every integer layer here and now, uncompiled, on noise in the shapes of the example inputs
            and on as many threads as torch has, and run it in float on dequantized values where that is faster by a
            tenth; on a GPU, linears of 8-bit weights by PyTorch's int8 product where that is faster. The result means
            the same, up to rounding; ``layer_reports`` gives both times of those layers. They come from a clock:
            another run may choose others. Takes about twenty calls' time and a second lowering.
        share_float: read what stays in float (norms, embeddings, first and last layers) from the float model's own
            tensors, which saves their memory while both are there; a change of the model then changes the result.

    Raises:
        TypeError: when ``prepared`` is not prepared.
        MissingStatistics: for an input that was never observed, by layer; after a calibration that failed.
        ValueError, UnsupportedByBackend: for a backend that is unknown, cannot run it, cannot keep codes packed, or
            has no choice of kernels; for ``packed`` and ``latency_aware`` at once.
    """
    state = require_prepared(prepared, "convert")
    if state.skeleton is None:  # torchao's prepare_pt2e alone: torchao's convert_pt2e goes on from there
        raise TypeError("convert takes what dmq_ao.prepare returned, got a graph that prepare_pt2e prepared alone")
    arguments.check_calibrated(state)
    device_backend = choose_backend(backend, graph.device_of(prepared), state.plan, packed, latency_aware)
    records = _records(prepared) | _table_records(prepared)
    shared = {id(tensor): tensor for tensor in [*prepared.parameters(), *prepared.buffers()]}
    with torch.random.fork_rng(devices=[]):  # torchao traces its patterns on random tensors
        copied = copy.deepcopy(prepared, dict(shared))
        for target, tensor in state.tuned.items():
            graph.set_tensor(copied, target, tensor)
        quantized = convert_pt2e(_with_biases(copied, records), fold_quantize=False)
    graph.set_signature(quantized, graph.signature_of(prepared))
    values.replace_fake_tensors(quantized, keep=(graph.LAYER, graph.SOURCE))
    out_of_place(quantized)
    if not share_float:
        own_tensors(quantized)
    float_tensors = _float_tensors(quantized, state.skeleton)
    if packed:
        records = {name: packed_record(record) for name, record in records.items()}
    parts = DenoiserParts(
        stored_graph=storable(quantized, float_tensors, state.plan),
        signature=graph.signature_of(prepared),
        skeleton=state.skeleton,
        recipe=state.recipe,
        plan=state.plan,
        records=records,
        float_tensors=float_tensors,
        sqnr_db=state.sqnr_db,
        merged=state.merged,
    )
    return lower(quantized, device_backend, parts, packed=packed, latency_aware=latency_aware)


def lower(
    gm: GraphModule, backend: Backend, parts: DenoiserParts, *, packed: bool, latency_aware: bool
) -> QuantizedDenoiser:
    """A quantize/dequantize graph on a backend; ``parts`` is what is known before that."""
    records = parts.records
    graph.set_signature(gm, parts.signature)
    roles = roles_by_plan(gm, {name: item.kind for name, item in parts.plan.items()})
    parts = replace(parts, roles={name: item.roles or roles.get(name, ()) for name, item in parts.plan.items()})
    if latency_aware:
        assert backend.measured is not None  # choose_backend asked
        lowered, kernels = backend.measured(gm, records, list(noise_tensors(parts.signature).values()))
    else:
        lowered, kernels = backend.lower(gm, PackedRecords(records) if packed else records)
    graph.drop_unused(lowered)
    graph.allow_train_eval(lowered)
    return QuantizedDenoiser(lowered, replace(parts, kernels=kernels, backend=backend.name)).eval()


def _records(prepared: GraphModule) -> dict[str, LayerRecord]:
    records, plan = {}, state_of(prepared).plan
    nodes, device = graph.layer_nodes(prepared), graph.device_of(prepared)
    for name, (weight, activation) in observers(prepared).items():
        decided = weight.record(float_weight(prepared, nodes[name]))
        weight.restore(decided, weight.bias)
        if activation is not None:
            activation.decide()
        kind = plan[name].kind
        inputs = activation.record() if activation is not None else None
        record = LayerRecord(name, kind, decided, inputs, weight.bias)
        records[name] = on_device(record, device)  # ranges are kept on the CPU while they are observed
    return records


def _table_records(prepared: GraphModule) -> dict[str, LayerRecord]:
    """Embedding tables as they were tuned, rounded to nearest."""
    records, nodes = {}, graph.layer_nodes(prepared)
    for name, watcher in tables(prepared).items():
        table = float_weight(prepared, nodes[name])
        tuned = state_of(prepared).tuned.get(str(graph.weight_of(nodes[name]).all_input_nodes[0].target))
        records[name] = LayerRecord(name, graph.TABLE, watcher.record(table if tuned is None else tuned), None)
    return records


def _with_biases(gm: GraphModule, records: Mapping[str, LayerRecord]) -> GraphModule:
    """Give layers the biases of their records, in place."""
    for name, node in graph.layer_nodes(gm).items():
        bias = records[name].bias if name in records else None
        if bias is not None:
            with gm.graph.inserting_before(node):
                read = graph.add_record_tensor(gm, name, "corrected_bias", bias.to(node.meta["val"].dtype))
            node.args = (*node.args[:2], read, *node.args[3:])
    gm.recompile()
    return gm


def _float_tensors(gm: GraphModule, skeleton: nn.Module) -> dict[str, Tensor]:
    """What the q/dq graph still reads from the original model, by original name."""
    original = set(skeleton.state_dict())
    reads = [node for node in gm.graph.nodes if node.op == "get_attr"]
    return {
        graph.parameter_name(node): graph.attribute(gm, node).detach()
        for node in reads
        if graph.parameter_name(node) in original and node.users
    }


@overload
def quantize(
    target: Any,
    recipe: Recipe,
    samples: CalibrationSet,
    *,
    backend: str = ...,
    packed: bool = ...,
    latency_aware: bool = ...,
    state_dir: str | Path | None = ...,
    seed: int = ...,
    progress: bool = ...,
    batch_size: int = ...,
    max_memory: int | None = ...,
) -> CalibrationReport: ...


@overload
def quantize(
    target: Any,
    recipe: Recipe,
    samples: Mapping[str, CalibrationSet],
    *,
    backend: str = ...,
    packed: bool = ...,
    latency_aware: bool = ...,
    state_dir: str | Path | None = ...,
    seed: int = ...,
    progress: bool = ...,
    batch_size: int = ...,
    max_memory: int | None = ...,
) -> dict[str, CalibrationReport]: ...


def quantize(
    target: Any,
    recipe: Recipe,
    samples: CalibrationSet | Mapping[str, CalibrationSet],
    *,
    backend: str = "auto",
    packed: bool = False,
    latency_aware: bool = False,
    state_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 8,
    max_memory: int | None = None,
) -> CalibrationReport | dict[str, CalibrationReport]:
    """Quantize a pipeline's denoiser, or its denoisers, in place: prepare, calibrate, convert.

    Args:
        target: a diffusers pipeline, or anything with a denoiser as ``unet`` or ``transformer``, and a second one as
            ``transformer_2`` (Wan 2.2).
        recipe: what to quantize and how.
        samples: recorded from the same denoiser. Of two denoisers those of each, by its name in the pipeline, as
            ``dmq_ao.pipelines.adapter.record_denoisers`` gives them; one that is left out stays in float.
        backend: as for ``convert``.
        packed: as for ``convert``.
        latency_aware: as for ``convert``.
        state_dir: as for ``calibrate``, and so are the rest; of samples by name, each has a folder of that name in it.
        seed: chooses the samples on which the layers' noise is measured.
        progress: show a progress bar.
        batch_size: rows per forward pass.
        max_memory: as for ``calibrate``.

    Returns:
        What calibration found; of samples by name, by name.

    Raises:
        TypeError: when ``target`` has no denoiser, or a quantized one, and for what is no recipe or calibration set;
            for the samples of one denoiser where ``target`` has two.
        ValueError: for samples of a denoiser that ``target`` does not have.
    """
    arguments.check_quantize(target, recipe, samples)
    by_name = samples if isinstance(samples, Mapping) else {arguments.denoiser_name(target): samples}
    reports, quantized = {}, {}
    for name, own in by_name.items():
        prepared = prepare(
            getattr(target, name), recipe, own.example(), timestep_arg=own.timestep_arg, backend=backend
        )
        folder = state_dir if state_dir is None or by_name is not samples else Path(state_dir) / name
        reports[name] = calibrate(
            prepared,
            own,
            state_dir=folder,
            seed=seed,
            progress=progress,
            batch_size=batch_size,
            max_memory=max_memory,
        )
        quantized[name] = convert(prepared, backend, packed=packed, latency_aware=latency_aware)
    for name, denoiser in quantized.items():  # all, or none where one fails
        setattr(target, name, denoiser)
    return reports if by_name is samples else next(iter(reports.values()))
