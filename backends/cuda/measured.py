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
from dmq_ao.backends.backend import Lowered
from dmq_ao.backends.cuda import ops as cuda_ops
from dmq_ao.backends.cuda.lowering import lower_to_cuda
from dmq_ao.backends.cuda.operands import Operands
from dmq_ao.evaluation import clock_of, latency
from dmq_ao.records import Kernel, LayerRecord

# By how much PyTorch's must be faster: less may be the clock, and it writes its sums to memory first.
LIBRARY_MARGIN = 0.05
_REPEATS, _WARMUP = 15, 3

Clock = Callable[[Callable[[], object]], float]


def lower_by_linear_times(
    gm: GraphModule, records: Mapping[str, LayerRecord], inputs: Sequence[Tensor], clock: Clock | None = None
) -> Lowered:
    """As ``lower_to_cuda``, in place, but linears that PyTorch multiplies faster on ``inputs`` are left to it.

    Args:
        gm: a q/dq graph.
        records: of its layers.
        inputs: tensors [B, ...] that the graph is called with, once; moved to where it is.
        clock: makes a call and tells its milliseconds; None takes that of the device.
    """
    lowered, kernels = lower_to_cuda(gm, records)
    device = next(tensor.device for tensor in [*lowered.buffers(), *lowered.parameters()])
    run = _LinearsByTheClock(lowered, clock or clock_of(device))
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


def _multiplies_bytes(linear: Node) -> bool:
    """Whether a linear multiplies codes, not floats, and its weight's take a byte."""
    operands = Operands(*linear.args[:-1])  # type: ignore[arg-type]
    return operands.scale is not None and operands.widths == [8]


class _LinearsByTheClock(Interpreter):
    """One run over a lowered graph; ``faster`` has the nodes of linears that are PyTorch's, and why."""

    def __init__(self, gm: GraphModule, clock: Clock) -> None:
        super().__init__(gm)
        self.clock = clock
        self.faster: dict[Node, str] = {}
        self._alike: dict[tuple[object, ...], dict[str, float]] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; a linear of codes that take a byte is timed as well."""
        if n.target is cuda_ops.cuda_linear and _multiplies_bytes(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            ms = self._times(args)
            if ms["torch"] < (1 - LIBRARY_MARGIN) * ms["triton"]:
                shape = list(args[0].shape)
                self.faster[n] = f"measured: triton {ms['triton']:.2g} ms, torch {ms['torch']:.2g} ms on {shape}"
        return super().run_node(n)

    def _times(self, args: Sequence[Any]) -> dict[str, float]:
        """Milliseconds of both; asked once for linears of the same sizes."""
        operands = Operands(*args[:-1])
        key = (operands.codes.shape, operands.packed[0].shape, operands.residual is None)
        if key not in self._alike:
            both = {"triton": cuda_ops.cuda_linear, "torch": cuda_ops.library_linear}
            calls = {name: partial(operator, *args) for name, operator in both.items()}
            timed = latency(calls, repeats=_REPEATS, warmup=_WARMUP, clock=self.clock)
            self._alike[key] = {name: one.median_ms for name, one in timed.items()}
        return self._alike[key]
