"""A graph on another device than the one that it was captured on."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate


def place_on(gm: GraphModule, device: torch.device) -> None:
    """Move a graph's tensors to ``device``, and let it make new ones there, in place.

    Before:  arange(n, device=cpu)      After:  arange(n, device=cuda)
    """
    gm.to(device)
    others: set[torch.device] = set()

    def replace_device(value: Any) -> Any:
        if isinstance(value, torch.device) and value != device:
            others.add(value)
            return device
        return value

    for node in gm.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, replace_device), map_aggregate(node.kwargs, replace_device)
    if others:  # writing the code again takes longer than all of this
        gm.recompile()
