"""Whether the graph of a denoiser can be read again from a file: tried before it is offered to one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.records import LayerPlan
from dmq_ao.serialization import graph as stored_graph
from dmq_ao.serialization import trial
from dmq_ao.serialization.graph import StoredGraph


def storable(
    gm: GraphModule, float_tensors: Mapping[str, Tensor], plan: Mapping[str, LayerPlan]
) -> StoredGraph | None:
    """The q/dq graph as a file holds it; None where ``load`` would not take it, and exports the model again.

    Args:
        gm: the graph.
        float_tensors: [...] that it reads, by original name.
        plan: of its layers.
    """
    call = graph.signature_of(gm)
    if not set(call.names) <= set(call.example):  # a graph that was not captured here
        return None
    try:
        stored = stored_graph.stored(gm, float_tensors)
        trial.Program(gm, trial.example_inputs(call.example[name] for name in call.names))
    except ValueError as error:
        said = bool(call.optional) or any(item.roles for item in plan.values())
        warnings.warn(
            f"the graph of this denoiser cannot be stored ({error}): a saved folder is loaded by exporting the model"
            " again, one of your own with load(folder, model=...)"
            + ("; optional arguments and roles that were said are not in it" if said else ""),
            stacklevel=3,
        )
        return None
    return stored
