"""Inputs that a quantized denoiser can do without: residuals of a ControlNet, which are added where they are given.

The graph always adds them. A call without them hands it zeros, which is the same only where the float denoiser agrees;
that is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph import size_rules
from dmq_ao.graph.arguments import bind, flatten_inputs, moved_inputs, unflatten_inputs
from dmq_ao.graph.private import leaves

_ROUNDING = 1e-5  # of the largest element: kernels may sum in another order


def optional_names(captured: GraphModule, optional: Sequence[str]) -> tuple[str, ...]:
    """Dotted paths of the graph's inputs that are ``optional``, by these or by the arguments that they are in.

    Raises:
        ValueError: for a name that is no input, with those that are; for sizes that do not follow from the others.
    """
    signature = graph.signature_of(captured)
    names: list[str] = []
    for argument in optional:
        own = [name for name in signature.names if name == argument or name.startswith(f"{argument}.")]
        if not own or {signature.batch, signature.timestep} & set(own):
            raise ValueError(
                f"optional: {argument!r} is none of the inputs that can be left out; the example inputs hold"
                f" {[name for name in signature.names if name not in (signature.batch, signature.timestep)]}"
            )
        names += own
    axes = {name: len(signature.example[name][0]) for name in names}
    unsolved = [name for name in names if name not in size_rules.formulas(signature.rules, axes)]
    if unsolved:
        raise ValueError(
            f"optional: the sizes of {unsolved[0]!r} do not follow from those of the other inputs, so zeros cannot"
            " stand for it; record and prepare a denoiser with it, and another without"
        )
    return tuple(dict.fromkeys(names))


def check_neutral(
    denoiser: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...], optional: Sequence[str]
) -> None:
    """Refuse inputs of which zeros are not as if they were left out.

    Args:
        denoiser: the float one; it is called twice.
        example_inputs: of one call.
        optional: dotted paths of the inputs that may be left out.

    Raises:
        ValueError: where the denoiser fails without them, or answers otherwise.
    """
    flat = flatten_inputs(moved_inputs(bind(denoiser, example_inputs), graph.device_of(denoiser)))
    zeros = {name: torch.zeros_like(x) if name in optional else x for name, x in flat.items()}
    without = {name: x for name, x in flat.items() if name not in optional}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = leaves(denoiser(**unflatten_inputs(zeros)))
        try:
            answer = leaves(denoiser(**unflatten_inputs(without)))
        except Exception as error:  # of any type: it is the model's own code
            raise ValueError(
                f"optional: {type(denoiser).__name__} fails without {', '.join(optional)} ({type(error).__name__}:"
                f" {error}), so no call can leave them out; unload what wants them (unload_ip_adapter()), and record"
                " again without"
            ) from error
    for one, other in zip(expected, answer, strict=True):
        if isinstance(one, Tensor) and not _equal_but_order(one, other):
            apart = float((one.double() - other.double()).abs().max())
            raise ValueError(
                f"optional: {type(denoiser).__name__} without {', '.join(optional)} answers otherwise than with zeros"
                f" there (by {apart:.3g}), so the graph with them cannot stand for it; record and prepare a denoiser"
                " with them, and another without"
            )


def _equal_but_order(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one.double() - other.double()).abs().max() <= _ROUNDING * one.double().abs().max())
