"""From a denoiser to a graph: export, and how a call maps onto it.

``capture`` exports any ``torch.export``-able denoiser with every tensor dimension dynamic. The graph takes its tensors
by position, in the order of ``Signature.names``; non-tensor arguments become constants of the graph.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dmq_ao.graph import size_rules
from dmq_ao.graph.arguments import bind, find_timestep, flatten_inputs
from dmq_ao.graph.containers import is_sorted, is_told_by_paths, paths_of
from dmq_ao.graph.export import CaptureError, Positional, as_exported, export, first_line
from dmq_ao.graph.layers import name_layers
from dmq_ao.graph.module_state import tensors_of
from dmq_ao.graph.plain_convolutions import number_paddings
from dmq_ao.graph.private import drop_call_checks, free_sizes, leaves
from dmq_ao.graph.regions import inline_regions, name_of_region
from dmq_ao.graph.specialisation import Sizes, conditions_that_matter
from dmq_ao.graph.stored_weights import compute_weights
from dmq_ao.graph.structure import Structure, is_plain

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
        batch: dotted path of the tensor that is denoised, whose axis 0 is the batch.
        return_type: dataclass that the denoiser returns under ``return_dict=True``; None for a bare tensor or tuple.
        returns_tuple: without ``return_dict`` the denoiser returns a tuple.
        example: shape and dtype of each tensor, enough to export again.
        rules: conditions on sizes that the graph relies on, see ``size_rules``.
        answer: how the graph's tensors stand in what the denoiser answers; None for a tensor, a tuple of tensors, or
            a dataclass of them.
        optional: of ``names``, those that a call may leave out, all together: the graph then gets zeros.
        nesting: the arguments with dotted paths for values; None where the paths alone tell how arguments nest.
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
    answer: Structure | None = field(default=None, repr=False)
    optional: tuple[str, ...] = ()
    nesting: Mapping[str, Any] | None = field(default=None, repr=False)


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
        CaptureError: for a denoiser that ``torch.export`` does not take, naming the line of its code.
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
    module = Positional(denoiser, tuple(tensors), constants, paths_of(arguments))
    program, tensors, per_row = _export_rows(module, tensors, batch, timestep)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    drop_call_checks(gm)  # they also refuse sizes that only compute another way; ``rules`` say what must hold
    inline_regions(gm)
    batch = _denoised(gm, tensors, timestep, batch)
    rules = _rules(program, module, gm, tensors, batch)
    number_paddings(gm)
    compute_weights(gm)
    parameters = tuple(inspect.signature(denoiser.forward).parameters)
    by_paths = is_told_by_paths(module.nesting) and is_sorted(module.nesting, parameters)
    gm.meta[META] = Signature(
        parameters=parameters,
        names=tuple(tensors),
        constants=constants,
        timestep=timestep,
        timestep_per_row=per_row,
        batch=batch,
        return_type=module.answer.type if module.answer.kind == "dataclass" else None,
        returns_tuple=module.answer.kind != "tensor",
        example={name: (tuple(value.shape), value.dtype) for name, value in tensors.items()},
        rules=rules,
        answer=None if is_plain(module.answer) else module.answer,
        nesting=None if by_paths else module.nesting,
    )
    name_layers(gm)
    return gm


def _export_rows(
    module: Positional, tensors: dict[str, Tensor], batch: str, timestep: str | None
) -> tuple[torch.export.ExportedProgram, dict[str, Tensor], bool]:
    """The program, its example, and whether it takes a timestep for each row, which it does if it can."""
    if timestep is None or tensors[timestep].dim() > 1:
        return export(module, tensors), tensors, False
    rows = tensors | {timestep: tensors[timestep].expand(len(tensors[batch])).clone()}
    try:
        return export(module, rows), rows, True
    except CaptureError as first:
        if tensors[timestep].dim() == 1:
            raise
        try:
            return export(module, tensors), tensors, False
        except CaptureError as second:
            raise CaptureError(f"{first} (with {timestep!r} as one number: {first_line(second)})") from first


def _denoised(gm: GraphModule, tensors: Mapping[str, Tensor], timestep: str | None, first: str) -> str:
    """The argument that is denoised: by its usual name, else the one whose shape is most like the answer's."""
    if first in SAMPLE_NAMES:
        return first
    answer = _axes(leaves(gm.graph.output_node().args[0])[0])
    nodes = gm.graph.find_nodes(op="placeholder")
    likeness = {
        name: sum(one == other for one, other in zip(_axes(node), answer, strict=True))
        for name, node in zip(tensors, nodes, strict=True)
        if name != timestep and tensors[name].is_floating_point() and len(_axes(node)) == len(answer) >= 2
    }
    return max(likeness, key=likeness.__getitem__, default=first) if likeness.get(first, 0) < len(answer) else first


def _axes(node: Node) -> list[str]:
    """Sizes as text: comparing symbolic ones would fix them."""
    return [str(size) for size in node.meta["val"].shape]


def _rules(
    program: torch.export.ExportedProgram,
    module: Positional,
    gm: GraphModule,
    tensors: Mapping[str, Tensor],
    batch: str,
) -> tuple[str, ...]:
    """What a call's sizes must fulfil; ``module`` and ``gm`` are called without values to find out."""
    equations, guards = size_rules.of_program(program, tuple(tensors), {name: x.shape for name, x in tensors.items()})
    places, derived, ranges = free_sizes(program, tuple(tensors))
    fixed = [one for one in ranges if "==" in one and one not in equations]
    example = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    bounds = [one for one in ranges if "==" not in one]
    equations = (*equations, *fixed)
    sizes = Sizes(example, places, derived, batch, device_of(module), equations, (*guards, *bounds))
    whole = any(name_of_region(node) for node in gm.graph.nodes)
    with as_exported(module):
        return (*equations, *conditions_that_matter(sizes, module, None if whole else gm))


def device_of(module: nn.Module) -> torch.device:
    """Where a denoiser or its graph is: with its parameters; the CPU without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def first_tensor(result: Any) -> Tensor:
    """What a denoiser answers, [B, ...]: the first tensor of nested tuples and lists."""
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
    inline_regions(gm)
    number_paddings(gm)
    compute_weights(gm)
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


def skeleton(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are on the meta device: names, shapes and config without the bytes."""
    memo: dict[int, Any] = {}
    for tensor in tensors_of(denoiser):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(denoiser, memo)


def placeholders(gm: GraphModule) -> dict[str, Node]:
    """Input nodes by dotted argument name."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return dict(zip(signature_of(gm).names, nodes, strict=True))
