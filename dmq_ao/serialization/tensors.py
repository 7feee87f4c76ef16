"""The tensors of a stored graph, from where the folder keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from dmq_ao import graph, records
from dmq_ao.serialization.folder import Stored
from dmq_ao.serialization.graph import read_dtype
from dmq_ao.serialization.records import StoredRecords


class GraphTensors:
    """The tensors of a stored graph. Weights' codes come last, if at all: integer kernels hold their own."""

    def __init__(self, stored: Stored) -> None:
        assert isinstance(stored.records, StoredRecords)
        self.stored, self.records = stored, stored.records
        self.outlines = {name: stored.records.without_codes(name) for name in stored.records}
        self.sources: dict[str, tuple[str, str]] = {}

    def tensor(self, target: str, home: Mapping[str, Any]) -> Tensor:
        """The tensor [...] that ``target`` of the graph reads, by the ``"from"`` that the file says of it.

        Raises:
            KeyError: for a tensor that the folder does not hold.
            ValueError: for a layer or field that is not there, or a tensor of another shape or dtype.
        """
        if "float" in home:
            return self.stored.float_tensors[home["float"]]
        if "constant" in home:
            return self.stored.graph_constants[home["constant"]]
        name, field = home["record"]
        if name not in self.records:
            raise ValueError(f"layer {name!r} is not known")
        self.sources[target] = (name, field)
        tensor = records.record_tensor(self.outlines[name], field)
        shape, dtype = home["shape"], read_dtype(home["dtype"])
        # Two are made to measure: a divisor lies along its axis, a bias has the dtype of its layer.
        is_reshaped, is_cast = field == "channel_scale", field == "corrected_bias"
        if not is_reshaped and list(tensor.shape) != shape or not is_cast and tensor.dtype != dtype:
            raise ValueError(
                f"{field} of {name} is {list(tensor.shape)} {tensor.dtype}, the graph says {shape} {dtype}"
            )
        return tensor.reshape(shape).to(dtype)

    def mark(self, gm: GraphModule) -> None:
        """Note on the nodes which tensor of which record each reads."""
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.target in self.sources:
                node.meta[graph.SOURCE] = self.sources[node.target]

    def fill_codes(self, gm: GraphModule) -> None:
        """Give a lowered graph the codes that it still reads."""
        for target, tensor in list(gm.named_buffers()):
            if tensor.is_meta:
                name, _ = self.sources[target]
                gm.register_buffer(target, self.records[name].weight.codes, persistent=False)
