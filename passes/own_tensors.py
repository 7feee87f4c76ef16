"""Tensors that a graph reads of the float model become its own, so that a change of the model does not change it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.graph import private


def own_tensors(gm: GraphModule) -> None:
    """Put copies in place of the tensors that a converted graph reads and that are of no record, one for each.

    What was one tensor under two names stays one. Tensors that nothing reads are not copied.
    """
    copies: dict[int, Tensor] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if graph.SOURCE in node.meta or not node.users:
            continue
        tensor = graph.attribute(gm, node)
        if not isinstance(tensor, Tensor):  # the graph of a branch or loop; its tensors are read at nodes of this one
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        path, _, last = str(node.target).rpartition(".")
        module, own = gm.get_submodule(path), copies[id(tensor)]
        if last in private.parameters_of(module):
            own = nn.Parameter(own, requires_grad=False)
        copies[id(own)] = own  # another node may read it at the same place
        setattr(module, last, own)
