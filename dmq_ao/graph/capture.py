"""From a denoiser to a graph: export, and how a call maps onto it.

``capture`` exports any ``torch.export``-able denoiser with every tensor dimension dynamic. The graph takes its tensors
by position, in the order of ``Signature.names``; non-tensor arguments become constants of the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from dmq_ao.graph import private, size_rules
from dmq_ao.graph.arguments import bind, find_timestep, flatten_inputs, unflatten_inputs
from dmq_ao.graph.layers import name_layers
from dmq_ao.graph.patch_embed import any_size

SAMPLE_NAMES = ("sample", "hidden_states", "x")


META = "dmq_ao"


@dataclass(frozen=True)
class Signature:
    """How a call of the denoiser maps onto the graph.

    Attributes:
        parameters: names of the denoiser's ``forward`` parameters, in order.
        names: dotted path of each tensor argument, in graph order.
        constants: dotted path and value of each non-tensor argument baked into the graph.
        timestep: dotted path of the timestep, None when the denoiser has none.
        timestep_per_row: the graph wants one timestep a row, [B]; a scalar is expanded.
        batch: dotted path of a tensor whose axis 0 is the batch.
        return_type: dataclass that the denoiser returns under ``return_dict=True``; None for a bare tensor or tuple.
        returns_tuple: without ``return_dict`` the denoiser returns a tuple.
        example: shape and dtype of each tensor, enough to export again.
        rules: equations between sizes that the graph relies on, see ``size_rules``.
    """

    parameters: tuple[str, ...]
    names: tuple[str, ...]
    constants: Mapping[str, Any]
    timestep: str | None
    timestep_per_row: bool
    batch: str
    return_type: type | None
    returns_tuple: bool
    example: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(repr=False)
    rules: tuple[str, ...] = field(default=(), repr=False)


class _Positional(nn.Module):
    """The denoiser called with its tensors by position and everything else constant; returns tensors only."""

    def __init__(self, denoiser: nn.Module, names: tuple[str, ...], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.names, self.constants = names, dict(constants)
        if "return_dict" in inspect.signature(denoiser.forward).parameters:
            self.constants["return_dict"] = False

    def forward(self, *tensors: Tensor) -> Any:
        flat = {**self.constants, **dict(zip(self.names, tensors, strict=True))}
        result = self.denoiser(**unflatten_inputs(flat))
        if isinstance(result, (tuple, list)) and len(result) == 1:
            return result[0]
        return result


def capture(
    denoiser: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...], timestep_arg: str | None = None
) -> GraphModule:
    """Export a denoiser with every tensor dimension dynamic.

    Args:
        denoiser: any ``torch.export``-able module, in eval mode for dropout and the like.
        example_inputs: keyword arguments (or a tuple of positionals); tensors of any batch, values of any kind.
        timestep_arg: name of the timestep, when it is not ``timestep``, ``timesteps`` or ``t``.

    Returns:
        A graph of tensors by position; ``signature_of`` tells how a call maps onto it.

    Raises:
        TypeError: for inputs that do not fit the signature, or without a floating tensor.
        ValueError: for an unknown ``timestep_arg``, or a denoiser in training mode.
    """
    if denoiser.training:
        raise ValueError(f"{type(denoiser).__name__} is in training mode; call .eval() on it first")
    arguments = bind(denoiser, example_inputs)
    timestep = find_timestep(list(arguments), timestep_arg)
    if timestep is not None and not isinstance(arguments[timestep], Tensor):
        arguments[timestep] = torch.tensor(arguments[timestep])
    flat = flatten_inputs(arguments)
    device = device_of(denoiser)  # samples are kept on the CPU
    tensors = {name: value.to(device) for name, value in flat.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    batch = _batch_argument(tensors, timestep)
    tensors = _two_rows(tensors, batch)
    module = _Positional(denoiser, tuple(tensors), constants)
    per_row = timestep is not None and tensors[timestep].dim() <= 1
    if per_row and timestep is not None:
        rows = tensors | {timestep: tensors[timestep].expand(len(tensors[batch])).clone()}
        try:
            program = _export(module, rows)
            tensors = rows
        except Exception:
            if tensors[timestep].dim() == 1:
                raise
            per_row, program = False, _export(module, tensors)
    else:
        program = _export(module, tensors)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    private.drop_call_checks(gm)  # they also refuse sizes that only compute another way; ``rules`` say what must hold
    return_type, returns_tuple = _return_type(denoiser, tensors, constants)
    gm.meta[META] = Signature(
        parameters=tuple(inspect.signature(denoiser.forward).parameters),
        names=tuple(tensors),
        constants=constants,
        timestep=timestep,
        timestep_per_row=per_row,
        batch=batch,
        return_type=return_type,
        returns_tuple=returns_tuple,
        example={name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
        rules=size_rules.of_program(program, tuple(tensors), {name: x.shape for name, x in tensors.items()}),
    )
    name_layers(gm)
    return gm


def device_of(module: nn.Module) -> torch.device:
    """Where a denoiser or its graph is: with its parameters; the CPU without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def first_tensor(result: Any) -> Tensor:
    """What a denoiser answers: the first tensor of nested tuples and lists."""
    while isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result


def signature_of(gm: GraphModule) -> Signature:
    """What ``capture`` wrote down; graph passes, prepare and convert keep it."""
    signature: Signature = gm.meta[META]
    return signature


def set_signature(gm: GraphModule, signature: Signature) -> None:
    """Give a graph that was made of another one that one's signature."""
    gm.meta[META] = signature


def ensure_signature(gm: GraphModule) -> None:
    """Give a graph that ``capture`` did not make a signature from its own placeholders, and name its layers."""
    if META in gm.meta:
        return
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = {node.name: node.meta["val"] for node in nodes}
    timestep = find_timestep(list(values), None)
    gm.meta[META] = Signature(
        parameters=tuple(values),
        names=tuple(values),
        constants={},
        timestep=timestep,
        timestep_per_row=timestep is not None and values[timestep].dim() == 1,
        batch=_batch_argument(values, timestep),
        return_type=None,
        returns_tuple=False,
        example={},
    )
    name_layers(gm)


def _batch_argument(tensors: Mapping[str, Tensor], timestep: str | None) -> str:
    candidates = [name for name in SAMPLE_NAMES if name in tensors]
    candidates += [n for n, x in tensors.items() if n != timestep and x.is_floating_point() and x.dim() >= 2]
    if not candidates:
        raise TypeError(
            "example_inputs hold no floating tensor with a batch axis besides the timestep; got"
            f" {[(name, tuple(x.shape), str(x.dtype)) for name, x in tensors.items()]}"
        )
    return candidates[0]


def _two_rows(tensors: Mapping[str, Tensor], batch: str) -> dict[str, Tensor]:
    # Export specialises dimensions of size 0 and 1, so a batch of one is doubled.
    if len(tensors[batch]) != 1:
        return dict(tensors)
    return {name: torch.cat([x, x]) if x.dim() > 0 and len(x) == 1 else x for name, x in tensors.items()}


def _export(module: nn.Module, tensors: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    shapes = {name: dict.fromkeys(range(x.dim()), Dim.AUTO) for name, x in tensors.items()}
    with any_size(module):
        return torch.export.export(
            module, tuple(tensors.values()), dynamic_shapes=(tuple(shapes.values()),), strict=False
        )


def _return_type(
    denoiser: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> tuple[type | None, bool]:
    with private.fake_tensor_mode(), torch.no_grad():
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in tensors.items()}
        result = skeleton(denoiser)(**unflatten_inputs({**constants, **inputs}))
    if dataclasses.is_dataclass(result):
        return type(result), True
    return None, isinstance(result, (tuple, list))


def skeleton(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are on the meta device: names, shapes and config without the bytes."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(denoiser, memo)


def placeholders(gm: GraphModule) -> dict[str, Node]:
    """Input nodes by dotted argument name."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return dict(zip(signature_of(gm).names, nodes, strict=True))


def graph_arguments(gm: GraphModule, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors in the graph's order, on its device, from keyword arguments of the denoiser.

    Raises:
        ValueError: when the samples lack an argument that the graph takes.
    """
    flat = flatten_inputs(inputs)
    names = signature_of(gm).names
    missing = [name for name in names if name not in flat]
    if missing:
        raise ValueError(f"the samples lack {missing}, which the prepared denoiser takes; they hold {sorted(flat)}")
    device = device_of(gm)
    return [torch.as_tensor(flat[name]).to(device) for name in names]
