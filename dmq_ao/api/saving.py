"""Save and load: a quantized denoiser as a model folder, and back from it without exporting the model again."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.api import arguments
from dmq_ao.api.quantize import convert, lower, prepare
from dmq_ao.backends.registry import choose_backend
from dmq_ao.config import InvalidFile, as_json
from dmq_ao.denoiser import DenoiserParts, QuantizedDenoiser
from dmq_ao.graph import Signature, private
from dmq_ao.graph.arguments import nested
from dmq_ao.passes import out_of_place, place_on
from dmq_ao.quantizer.prepared import float_weight, observers, state_of, weight_observers
from dmq_ao.records import LayerPlan, outline
from dmq_ao.serialization import agreement, signature, trial
from dmq_ao.serialization import folder as model_folder
from dmq_ao.serialization import graph as stored_graph
from dmq_ao.serialization.folder import GRAPH, Stored
from dmq_ao.serialization.operators import Forbidden, NotReadable
from dmq_ao.serialization.records import StoredRecords
from dmq_ao.serialization.skeleton import float_model, identity, stored_skeleton
from dmq_ao.serialization.tensors import GraphTensors


def save(quantized: QuantizedDenoiser, folder: str | Path) -> None:
    """Write packed integers, config and graph to a diffusers model folder. Nothing half-written stays behind.

    Raises:
        TypeError: when ``quantized`` is not a converted denoiser.
        ValueError: for what could not be loaded again, modules added to a diffusers model among them.
    """
    quantized = private.uncompiled(quantized)
    if not isinstance(quantized, QuantizedDenoiser):
        raise TypeError(f"save takes what dmq_ao.convert or dmq_ao.load returned, got {type(quantized).__name__}")
    stored = contents(quantized)
    _check_rebuilt(stored, quantized, folder)
    model_folder.write(stored, folder)


def contents(quantized: QuantizedDenoiser) -> Stored:
    """What a folder holds of a denoiser."""
    original, call = quantized.skeleton, quantized.signature
    config = dict(original.config) if hasattr(original, "from_config") else {}
    return Stored(
        recipe=quantized.recipe,
        records=quantized.records,
        float_tensors=quantized.float_tensors,
        model_config={**config, "_class_name": type(original).__name__} if config else {},
        parameters=identity(original),
        example=call.example,
        constants=call.constants,
        timestep_arg=call.timestep,
        sqnr_db=quantized.sqnr_db,
        merged=quantized.merged,
        graph=None if quantized.stored_graph is None else _graph_text(quantized, quantized.stored_graph.text),
        graph_constants={} if quantized.stored_graph is None else quantized.stored_graph.constants,
        nesting=call.nesting,
    )


def _check_rebuilt(stored: Stored, quantized: QuantizedDenoiser, folder: str | Path) -> None:
    """Refuse what ``load`` would not build: modules that diffusers' class does not make from its config alone.

    Raises:
        ValueError: naming them, and what to do.
    """
    if not hasattr(import_module("diffusers"), stored.model_config.get("_class_name", "")):
        return  # a class of the caller's own, which load is given
    try:
        stored_skeleton(stored, None, folder)
    except InvalidFile as error:
        kind = type(quantized.skeleton).__name__
        raise ValueError(
            f"{kind} was changed since it was built, and {folder} could not be loaded: diffusers builds it from its"
            f" config without what was added ({error}). Before dmq_ao.prepare: of LoRA, fuse_lora() and"
            " unload_lora_weights(); of joined projections, unfuse_qkv_projections(); of an IP-Adapter,"
            " unload_ip_adapter()"
        ) from error


def _graph_text(quantized: QuantizedDenoiser, text: str) -> str:
    rows = [as_json.plain(item) for item in quantized.plan.values()]
    plan = [{key: x for key, x in row.items() if key != "roles" or x} for row in rows if isinstance(row, dict)]
    call = signature.signature_to_json(quantized.signature)
    return json.dumps({"signature": call, "plan": plan, "graph": json.loads(text)}, allow_nan=False)


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    backend: str = "auto",
    packed: bool = False,
    latency_aware: bool = False,
    device: torch.device | str = "cpu",
) -> QuantizedDenoiser:
    """Read a saved denoiser and lower it to a backend; the integers are those that were saved, bit for bit.

    The codes stay in the file until somebody asks for ``records``: memory holds one copy of them, the kernels'. A file
    is data: none of its text is run, its operators are those of ``serialization.operators``, and every number is
    checked against what it means before anything is computed (``docs/security.md``).

    Args:
        folder: what ``save`` wrote.
        model: the float module that was quantized; its weights are not used. Wanted for models that are not diffusers'
            and answer with a class of their own, or whose graph could not be stored, or not be read by this PyTorch.
        backend: as for ``convert``.
        packed: as for ``convert``.
        latency_aware: as for ``convert``; a file has no choice of kernels, which are timed anew at each load.
        device: to run on, whichever it was quantized on.

    Raises:
        InvalidFile: for a damaged or foreign folder, or one of another model.
        ValueError: when the model is wanted and not given, or there is no such device.
    """
    device = usable_device(device)
    stored = model_folder.read(folder)
    how = {"packed": packed, "latency_aware": latency_aware}
    why_not = ""
    if stored.graph is not None:
        try:
            parts = _read_graph(stored, stored.graph, model, folder)
        except NotReadable as error:  # of another PyTorch: the model's code can still be exported
            why_not = str(error)
        except Forbidden as error:
            if model is None:
                raise InvalidFile(
                    f"{Path(folder) / GRAPH}: {error}; it was edited, or written by another version. To take the"
                    f" model's own code instead, give the float module: load({str(folder)!r}, model=...)"
                ) from error
            why_not = str(error)
        else:
            return _from_graph(parts, stored, model, folder, backend, how, device)
    denoiser = float_model(stored, model, folder)
    if why_not:
        warnings.warn(f"{folder}: {why_not}; the model is exported again, which takes longer", stacklevel=2)
    if model is not None:
        # The stored float tensors replace the model's own: on a copy, for the caller's stays as it is.
        denoiser = copy.deepcopy(denoiser)
    try:
        return _exported_again(stored, denoiser, folder, backend, how, device)
    except ValueError:  # ours: a backend, a pattern, another model
        raise
    except Exception as error:  # of any type: the file's inputs and records do not go with the model
        raise InvalidFile(
            f"{folder}: {type(denoiser).__name__} cannot be exported again as the file describes it ({error!r}); it is"
            " damaged or was edited, or of another version of the model"
        ) from error


def check(folder: str | Path) -> dict[str, int]:
    """Do all that ``load`` does before it lowers, and read every tensor.

    Returns:
        How much was checked: ``tensors`` by their own checksums (0 for folders without a manifest), ``layers``,
        ``operators`` of the graph (0 without one), ``bytes`` of all files.

    Raises:
        InvalidFile: for anything that ``load`` would refuse without being given the model.
    """
    stored = model_folder.read(folder)
    operators = 0
    if stored.graph is not None:
        try:
            operators = len(_read_graph(stored, stored.graph, None, folder).gm.graph.nodes)
        except (NotReadable, Forbidden) as error:
            raise InvalidFile(f"{Path(folder) / GRAPH}: {error}") from error
    stored_skeleton(stored, None, folder)
    records = stored.records
    assert isinstance(records, StoredRecords)
    for name in records:
        records[name]
    return {
        "tensors": records.checksums,
        "layers": len(records),
        "operators": operators,
        "bytes": sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file()),
    }


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: when there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is unavailable: {error}; use 'cpu'") from error


@dataclass(frozen=True, eq=False)
class _Graph:
    """What ``graph.json`` says, checked.

    Attributes:
        gm: the q/dq graph; codes of weights are on the meta device.
        text: of the graph, as it is saved again.
        call: its signature.
        plan: of its layers.
        tensors: where those of the graph come from.
        program: the graph as it was tried.
    """

    gm: GraphModule
    text: str
    call: Signature
    plan: Mapping[str, LayerPlan]
    tensors: GraphTensors
    program: trial.Program


def _read_graph(stored: Stored, text: str, model: nn.Module | None, folder: str | Path) -> _Graph:
    """Build the graph, and refuse what does not fit itself, its example or its records before it is run.

    Raises:
        NotReadable, Forbidden: as ``graph.from_json`` and ``signature_from_json`` of ``serialization``.
        InvalidFile: for anything else.
    """
    with _damage_is_named(folder):
        parts = as_json.parse(text)
        call = signature.signature_from_json(parts["signature"], stored, model)
        plan = {item["name"]: as_json.typed(LayerPlan, item, "plan") for item in parts["plan"]}
        tensors = GraphTensors(stored)
        gm = stored_graph.from_json(parts["graph"], tensors.tensor)
        tensors.mark(gm)
        out_of_place(gm)  # files of earlier versions hold what was computed in place
        shapes = [call.example[name] for name in call.names]
        program = trial.Program(gm, trial.example_inputs(shapes))
        answer = program.answer
        signature.check_answer(call, len(answer) if isinstance(answer, (tuple, list)) else 1)
        timestep = dict(zip(call.names, gm.graph.find_nodes(op="placeholder"), strict=True)).get(call.timestep or "")
        agreement.check_agreement(gm, tensors.outlines, plan, timestep)
        return _Graph(gm, json.dumps(parts["graph"]), call, plan, tensors, program)


def _from_graph(
    parts: _Graph,
    stored: Stored,
    model: nn.Module | None,
    folder: str | Path,
    backend: str,
    how: Mapping[str, bool],
    device: torch.device,
) -> QuantizedDenoiser:
    whole = stored_skeleton(stored, model, folder)
    target = choose_backend(backend, device, parts.plan, **how)
    if how["latency_aware"]:
        parts.tensors.fill_codes(parts.gm)  # the graph is run to time it, and layers in float read theirs
    with _damage_is_named(folder):
        denoiser_parts = DenoiserParts(
            stored_graph=stored_graph.StoredGraph(parts.text, stored.graph_constants),
            signature=parts.call,
            skeleton=whole,
            recipe=stored.recipe,
            plan=parts.plan,
            records=stored.records,
            float_tensors=stored.float_tensors,
            sqnr_db=stored.sqnr_db,
            merged=stored.merged,
        )
        quantized = lower(parts.gm, target, denoiser_parts, **how)
        parts.tensors.fill_codes(quantized.graph_module)
        place_on(quantized.graph_module, device)
    quantized.guard(parts.program, folder)
    return quantized


@contextmanager
def _damage_is_named(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except (InvalidFile, NotReadable, Forbidden):
        raise
    except Exception as error:  # of any type: all that is read here is the file's
        raise InvalidFile(f"{Path(folder) / GRAPH}: {error!r}; it is damaged or was edited, save again") from error


def _exported_again(
    stored: Stored,
    denoiser: nn.Module,
    folder: str | Path,
    backend: str,
    how: Mapping[str, bool],
    device: torch.device,
) -> QuantizedDenoiser:
    """Export the module, with the file's tensors in it, and take the records for what was calibrated."""
    with _damage_is_named(folder):
        trial.example_inputs(stored.example.values())  # their size is known before they take memory
    _set_float_tensors(denoiser, stored)
    _tie(denoiser, stored.merged)
    denoiser.to(device)
    example = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in stored.example.items()}
    inputs = nested(stored.nesting, {**stored.constants, **example})
    try:
        arguments.check_example(denoiser.eval(), inputs, stored.timestep_arg)
    except ValueError as error:
        raise InvalidFile(f"{folder}: {error}; the folder is damaged or was edited, or of another model") from error
    prepared = prepare(denoiser, stored.recipe, inputs, timestep_arg=stored.timestep_arg, backend=backend)
    weights, nodes = weight_observers(prepared), graph.layer_nodes(prepared)
    if set(weights) != set(stored.records):
        raise InvalidFile(
            f"{folder}: quantized layers differ; only in the file: {sorted(set(stored.records) - set(weights))}, only"
            f" in the model: {sorted(set(weights) - set(stored.records))}. Load with the model that was quantized"
        )
    for name, weight in weights.items():
        record, shape = stored.records[name], float_weight(prepared, nodes[name]).shape
        if record.weight.shape != shape:
            stored_shape = tuple(record.weight.shape)
            raise InvalidFile(f"{folder}: {name} is {stored_shape} in the file, {tuple(shape)} in the model")
        weight.restore(record.weight, record.bias)
    for name, (_, activation) in observers(prepared).items():
        restored = outline(stored.records, name).activation
        if activation is not None and restored is not None:
            activation.restore(restored)
    state_of(prepared).sqnr_db = dict(stored.sqnr_db)
    return convert(prepared, backend, **how)


def _tie(denoiser: nn.Module, merged: Mapping[str, str]) -> None:
    """Give layers that were copies the numbers of those that stand for them: a file holds one layer's numbers."""
    own = dict(denoiser.named_parameters(remove_duplicate=False))
    for copied_layer, layer in merged.items():
        copied, first = (name.partition("#")[0] for name in (copied_layer, layer))
        for what in ("weight", "bias"):
            if f"{first}.{what}" in own and f"{copied}.{what}" in own:
                own[f"{copied}.{what}"].data = own[f"{first}.{what}"].data


def _set_float_tensors(denoiser: nn.Module, stored: Stored) -> None:
    """Give a float model the stored tensors, each in its own dtype: some models keep a part of them in float32."""
    denoiser.to(stored.dtype)
    own = denoiser.state_dict(keep_vars=True)
    for name, tensor in stored.float_tensors.items():
        own[name].data = tensor.to(own[name].device)
