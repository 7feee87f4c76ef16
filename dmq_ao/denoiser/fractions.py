"""Whether a graph that was made with whole timesteps computes right with fractions of them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from dmq_ao.graph import Signature, aten
from dmq_ao.graph.values import VAL
from dmq_ao.numerics import ops

_CHECK = aten._assert_tensor_metadata.default
# Rearrange and copy values of any dtype.
_VIEWS_OF_TIME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.view.default,
}
_SIZES = {aten.sym_size.int, aten.sym_numel.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
_SCALINGS = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}


def free_of_whole_numbers(gm: GraphModule, signature: Signature) -> bool:
    """Whether whole timesteps are only turned into floating numbers, or looked up as the nearest of a table.

    Then the graph takes fractions too, as samplers with sigmas of their own give them, and its checks of the dtype are
    taken out, in place. Otherwise a timestep is an index, and must stay whole.
    """
    if signature.timestep is None or signature.example[signature.timestep][1].is_floating_point:
        return False
    timestep = gm.graph.find_nodes(op="placeholder")[signature.names.index(signature.timestep)]
    whole, checks = [timestep], []
    for node in whole:
        for user in node.users:
            if user.target == _CHECK:
                checks.append(user)
            elif user.target in _CASTS | _SCALINGS and _is_floating(user) or user.target in _SIZES | {ops.row}:
                continue
            elif user.target in _VIEWS_OF_TIME | _SCALINGS:  # sums and products of whole numbers are those of any
                whole.append(user)
            else:
                return False
    for check in checks:
        gm.graph.erase_node(check)
    gm.recompile()
    return True


def _is_floating(node: Node) -> bool:
    dtype = getattr(node.meta.get(VAL), "dtype", None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
