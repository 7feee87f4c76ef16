"""Roles of layers that a caller says, where dataflow shows others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph.roles import SAYABLE, say_roles
from dmq_ao.quantizer.patterns import no_match


def check_roles(denoiser: nn.Module, roles: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """The roles that a caller says, by layer, checked before anything is exported.

    Raises:
        ValueError: for a name that is no layer, with the nearest; for a role that cannot be said.
    """
    tensors = [*denoiser.named_parameters(remove_duplicate=False), *denoiser.named_buffers(remove_duplicate=False)]
    layers = {name.removesuffix(".weight") for name, tensor in tensors if tensor.dim() > 1}
    by_layer = {}
    for name, role in (roles or {}).items():
        by_layer[name] = (role,) if isinstance(role, str) else tuple(role)
        wrong = [one for one in by_layer[name] if one not in SAYABLE]
        if wrong or not by_layer[name]:
            raise ValueError(f"roles: {name!r} must have some of the roles {list(SAYABLE)}, got {role!r}")
        if name.partition("#")[0] not in layers:
            raise no_match("roles", name, layers)
    return by_layer


def say_layer_roles(captured: GraphModule, roles: Mapping[str, tuple[str, ...]]) -> None:
    """Write the roles on the layers of a captured graph.

    Raises:
        ValueError: for a layer that the graph does not call, with the nearest that it does.
    """
    layers = graph.find_layers(captured)
    names = {layer.name for layer in layers}
    for name in roles.keys() - names:  # a module that the graph does not call, or calls less often
        raise no_match("roles", name, names)
    say_roles(layers, roles)
