"""Save and load: a quantized denoiser as a model folder, and back from it without exporting the model again."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import as_json, graph, graph_file, layer, serialization
from dmq_ao.annotate import observers, weight_observers
from dmq_ao.arguments import unflatten_inputs
from dmq_ao.backends import choose
from dmq_ao.calibrate import SQNR
from dmq_ao.config import InvalidFile
from dmq_ao.graph import Signature
from dmq_ao.layer import LayerPlan
from dmq_ao.module import QuantizedDenoiser
from dmq_ao.passes import place_on
from dmq_ao.quantize import convert, lower, prepare


def save(quantized: QuantizedDenoiser, folder: str | Path) -> None:
    """Write packed integers, config and graph to a diffusers model folder. Nothing half-written stays behind.

    Raises:
        TypeError: when ``quantized`` is not a converted denoiser.
    """
    quantized = getattr(quantized, "_orig_mod", quantized)
    if not isinstance(quantized, QuantizedDenoiser):
        raise TypeError(f"save takes what dmq_ao.convert or dmq_ao.load returned, got {type(quantized).__name__}")
    skeleton, signature, stored_graph = quantized.skeleton, quantized.signature, quantized.stored_graph
    config = dict(skeleton.config) if hasattr(skeleton, "from_config") else {}
    stored = serialization.Stored(
        recipe=quantized.recipe,
        records=quantized.records,
        float_tensors=quantized.float_tensors,
        model_config={**config, "_class_name": type(skeleton).__name__} if config else {},
        parameters=_identity(skeleton),
        example=signature.example,
        constants=signature.constants,
        timestep_arg=signature.timestep,
        sqnr_db=quantized.sqnr_db,
        merged=quantized.merged,
        graph=None if stored_graph is None else _graph_text(quantized, stored_graph),
        graph_constants={} if stored_graph is None else stored_graph.constants,
    )
    serialization.write(stored, folder)


def _graph_text(quantized: QuantizedDenoiser, stored_graph: graph_file.StoredGraph) -> str:
    plan = [as_json.plain(item) for item in quantized.plan.values()]
    parts = {"signature": _signature_to_json(quantized.signature), "plan": plan}
    return json.dumps({**parts, "graph": json.loads(stored_graph.text)}, allow_nan=False)


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

    The codes stay in the file until somebody asks for ``records``: memory holds one copy of them, the kernels'.

    Args:
        folder: what ``save`` wrote.
        model: the float module that was quantized; its weights are not used. Wanted only for models that are not
            diffusers' and whose graph could not be stored, or not be read by this PyTorch.
        backend: as for ``convert``.
        packed: as for ``convert``.
        latency_aware: as for ``convert``; a file has no choice of kernels, which are timed anew at each load.
        device: to run on, whichever it was quantized on.

    Raises:
        InvalidFile: for a damaged or foreign folder, or one of another model.
        ValueError: when the model is wanted and not given, or there is no such device.
    """
    device = usable_device(device)
    stored = serialization.read(folder)
    how = {"packed": packed, "latency_aware": latency_aware}
    if stored.graph is not None:
        try:
            return _from_graph(stored, stored.graph, model, folder, backend, how, device)
        except graph_file.NotReadable:
            pass  # of another PyTorch: the model's code can still be exported
    return _exported_again(stored, model, folder, backend, how, device)


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: when there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} is not to be had here: {error}; take 'cpu'") from error


def _from_graph(
    stored: serialization.Stored,
    text: str,
    model: nn.Module | None,
    folder: str | Path,
    backend: str,
    how: Mapping[str, bool],
    device: torch.device,
) -> QuantizedDenoiser:
    with _damage_is_named(folder):
        parts = json.loads(text)
        signature = _signature_from_json(parts["signature"], stored)
        plan = {item["name"]: as_json.typed(LayerPlan, item, "plan") for item in parts["plan"]}
        kept = _Kept(stored)
        gm = graph_file.from_json(parts["graph"], kept.tensor)
    skeleton = _skeleton(stored, model, folder)
    _check_identity(stored, skeleton, folder)
    chosen = choose(backend, device, plan, **how)
    if how["latency_aware"]:
        kept.fill_codes(gm)  # the graph is run to time it, and layers in float read theirs
    quantized = lower(
        gm,
        chosen,
        **how,
        stored_graph=graph_file.StoredGraph(json.dumps(parts["graph"]), stored.graph_constants),
        signature=signature,
        skeleton=skeleton,
        recipe=stored.recipe,
        plan=plan,
        records=stored.records,
        float_tensors=stored.float_tensors,
        sqnr_db=stored.sqnr_db,
        merged=stored.merged,
    )
    kept.fill_codes(quantized.graph_module)
    place_on(quantized.graph_module, device)
    return quantized


@contextmanager
def _damage_is_named(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except graph_file.NotReadable:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidFile(
            f"{Path(folder) / serialization.GRAPH}: {error!r}; it is damaged or was edited, save again"
        ) from error


class _Kept:
    """The tensors of a stored graph. Weights' codes come last, if at all: integer kernels hold their own."""

    def __init__(self, stored: serialization.Stored) -> None:
        assert isinstance(stored.records, serialization.StoredRecords)
        self.stored, self.records = stored, stored.records
        self.codes: dict[str, str] = {}
        self.outline = functools.cache(stored.records.without_codes)  # a layer has several tensors, one reading

    def tensor(self, target: str, home: Mapping[str, Any]) -> Tensor:
        """What stands at ``target`` of the graph."""
        if "float" in home:
            return self.stored.float_tensors[home["float"]]
        if "constant" in home:
            return self.stored.graph_constants[home["constant"]]
        name, field = home["record"]
        if name not in self.records:
            raise ValueError(f"no layer is called {name!r}")
        if field == "codes":
            self.codes[target] = name
        found = layer.record_tensor(self.outline(name), field)
        return found.reshape(home["shape"]).to(graph_file.read_dtype(home["dtype"]))

    def fill_codes(self, gm: GraphModule) -> None:
        """Give a lowered graph the codes that it still reads."""
        for target, tensor in list(gm.named_buffers()):
            if tensor.is_meta:
                gm.register_buffer(target, self.records[self.codes[target]].weight.codes, persistent=False)


def _signature_to_json(signature: Signature) -> dict[str, Any]:
    kind = signature.return_type
    return {
        "parameters": list(signature.parameters),
        "names": list(signature.names),
        "timestep_per_row": signature.timestep_per_row,
        "batch": signature.batch,
        "return_type": None if kind is None else [kind.__module__, kind.__qualname__],
        "returns_tuple": signature.returns_tuple,
        "rules": list(signature.rules),
    }


def _signature_from_json(given: Mapping[str, Any], stored: serialization.Stored) -> Signature:
    return Signature(
        parameters=tuple(given["parameters"]),
        names=tuple(given["names"]),
        constants=stored.constants,
        timestep=stored.timestep_arg,
        timestep_per_row=given["timestep_per_row"],
        batch=given["batch"],
        return_type=None if given["return_type"] is None else _return_type(*given["return_type"]),
        returns_tuple=given["returns_tuple"],
        example=stored.example,
        rules=tuple(given["rules"]),
    )


def _return_type(module: str, name: str) -> type:
    """The class that the denoiser answers with; a file may name those of diffusers and of what is imported already."""
    found: Any = importlib.import_module(module) if module.startswith("diffusers.") else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise graph_file.NotReadable(f"the answer's class {module}.{name} is not there; import it first")
    return found


def _skeleton(stored: serialization.Stored, model: nn.Module | None, folder: str | Path) -> nn.Module:
    """The model without bytes: the one given, the diffusers class, or names and shapes alone."""
    if model is None and "_class_name" not in stored.model_config:
        return _names_and_shapes(stored.parameters)
    if model is not None:
        return graph.skeleton(model)
    try:
        with torch.device("meta"):
            return _float_model(stored, None, folder).eval()
    except (NotImplementedError, RuntimeError):  # its constructor wants to see values
        return graph.skeleton(_float_model(stored, None, folder).eval())


def _names_and_shapes(parameters: Mapping[str, tuple[int, ...]]) -> nn.Module:
    root = nn.Module()
    for name, shape in parameters.items():
        module, last = graph.place(root, name)
        module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return root.eval()


def _exported_again(
    stored: serialization.Stored,
    model: nn.Module | None,
    folder: str | Path,
    backend: str,
    how: Mapping[str, bool],
    device: torch.device,
) -> QuantizedDenoiser:
    denoiser = _float_model(stored, model, folder)
    _check_identity(stored, denoiser, folder)
    if model is not None:
        # The stored float tensors replace the model's own: on a copy, for the caller's stays as it is.
        denoiser = copy.deepcopy(denoiser)
    _set_float_tensors(denoiser, stored)
    _tie(denoiser, stored.merged)
    denoiser.to(device)
    example = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in stored.example.items()}
    inputs = unflatten_inputs({**stored.constants, **example})
    prepared = prepare(denoiser.eval(), stored.recipe, inputs, timestep_arg=stored.timestep_arg, backend=backend)
    found = weight_observers(prepared)
    if set(found) != set(stored.records):
        raise InvalidFile(
            f"{folder}: quantized layers differ; only in the file: {sorted(set(stored.records) - set(found))}, only in"
            f" the model: {sorted(set(found) - set(stored.records))}. Load with the model that was quantized"
        )
    for name, weight in found.items():
        weight.restore(stored.records[name].weight, stored.records[name].bias)
    for name, (_, activation) in observers(prepared).items():
        record = stored.records[name].activation
        if activation is not None and record is not None:
            activation.restore(record)
    prepared.meta[SQNR] = dict(stored.sqnr_db)
    return convert(prepared, backend, **how)


def _tie(denoiser: nn.Module, merged: Mapping[str, str]) -> None:
    """Give layers that were copies the numbers of those that stand for them: a file holds one layer's numbers."""
    own = dict(denoiser.named_parameters(remove_duplicate=False))
    for gone, kept in merged.items():
        copied, first = (name.partition("#")[0] for name in (gone, kept))
        for what in ("weight", "bias"):
            if f"{first}.{what}" in own and f"{copied}.{what}" in own:
                own[f"{copied}.{what}"].data = own[f"{first}.{what}"].data


def _identity(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _float_model(stored: serialization.Stored, model: nn.Module | None, folder: str | Path) -> nn.Module:
    if model is not None:
        return model
    class_name = stored.model_config.get("_class_name")
    if class_name is None:
        raise ValueError(
            f"{folder} is not of a diffusers model; give the float module: load({str(folder)!r}, model=...)"
        )
    import diffusers

    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        raise InvalidFile(
            f"{folder}: this diffusers {diffusers.__version__} has no {class_name}; install one that has, or give the"
            f" float module: load({str(folder)!r}, model=...)"
        )
    built: nn.Module = model_class.from_config(dict(stored.model_config))
    return built


def _set_float_tensors(denoiser: nn.Module, stored: serialization.Stored) -> None:
    """Give a float model the stored tensors, each in its own dtype: some models keep a part of them in float32."""
    denoiser.to(next(d for _, d in stored.example.values() if d.is_floating_point))
    own = denoiser.state_dict(keep_vars=True)
    for name, tensor in stored.float_tensors.items():
        own[name].data = tensor.to(own[name].device)


def _check_identity(stored: serialization.Stored, model: nn.Module, folder: str | Path) -> None:
    actual, expected = _identity(model), dict(stored.parameters)
    if actual == expected:
        return
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    shapes = [f"{n} {expected[n]} != {actual[n]}" for n in expected if n in actual and actual[n] != expected[n]]
    raise InvalidFile(
        f"{folder} is of another model than {type(model).__name__}: missing from the model {missing}, not in the file"
        f" {extra}, shapes (file != model) {shapes}. Load with the model that was quantized"
    )
