"""Which product runs an 8-bit linear on a GPU, by the clock: the Triton kernel, or PyTorch's and a second pass.

Each such linear of the lowered graph is timed where it stands, in turns. Both make the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao import graph
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda.backend import Cuda
from dmq_ao.evaluation import clock_of, latency
from dmq_ao.records import Kernel, LayerRecord

# By how much PyTorch's must be faster: less may be the clock, and it writes its sums to memory first.
MARGIN = 0.05
_REPEATS, _WARMUP = 15, 3

Clock = Callable[[Callable[[], object]], float]


def lower(
    gm: GraphModule, records: Mapping[str, LayerRecord], inputs: Sequence[Tensor], clock: Clock | None = None
) -> tuple[GraphModule, dict[str, Kernel]]:
    """As ``Cuda.lower``, in place, but linears that PyTorch multiplies faster on ``inputs`` are left to it.

    Args:
        gm: a q/dq graph.
        records: of its layers.
        inputs: what the graph is called with, once; moved to where it is.
        clock: makes a call and tells its milliseconds; None takes that of the device.
    """
    lowered, kernels = Cuda().lower(gm, records)
    device = next(tensor.device for tensor in [*lowered.buffers(), *lowered.parameters()])
    run = _SideBySide(lowered, clock or clock_of(device))
    with torch.no_grad():
        run.run(*(tensor.to(device) for tensor in inputs))
    for node, why in run.faster.items():
        node.target = cuda_ops.library_linear
        for member in _layer_of(node).split("+"):
            kernels[member] = Kernel("torch int8 linear, weight in 8 bits", why)
    lowered.recompile()
    return lowered, kernels


def _layer_of(node: Node) -> str:
    """The name of the layer, or of the joint layers, that a product is of: it ends in a node that knows."""
    while graph.LAYER not in node.meta:
        node = next(iter(node.users))
    return str(node.meta[graph.LAYER])


class _SideBySide(Interpreter):
    """One run over a lowered graph; ``faster`` has the nodes of linears that are PyTorch's, and why."""

    def __init__(self, gm: GraphModule, clock: Clock) -> None:
        super().__init__(gm)
        self.clock = clock
        self.faster: dict[Node, str] = {}
        self._alike: dict[tuple[object, ...], dict[str, float]] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; a linear of codes that take a byte is timed as well."""
        if n.target is cuda_ops.cuda_linear and n.args[1] is not None and n.args[4] == [8]:
            args, _ = self.fetch_args_kwargs_from_env(n)
            ms = self._times(args)
            if ms["torch"] < (1 - MARGIN) * ms["triton"]:
                shape = list(args[0].shape)
                self.faster[n] = f"measured: triton {ms['triton']:.2g} ms, torch {ms['torch']:.2g} ms on {shape}"
        return super().run_node(n)

    def _times(self, args: Sequence[Any]) -> dict[str, float]:
        """Milliseconds of both; asked once for linears of the same sizes."""
        key = (args[0].shape, args[3][0].shape, args[11] is None)
        if key not in self._alike:
            both = {"triton": cuda_ops.cuda_linear, "torch": cuda_ops.library_linear}
            calls = {name: partial(operator, *args) for name, operator in both.items()}
            timed = latency(calls, repeats=_REPEATS, warmup=_WARMUP, clock=self.clock)
            self._alike[key] = {name: one.median_ms for name, one in timed.items()}
        return self._alike[key]
