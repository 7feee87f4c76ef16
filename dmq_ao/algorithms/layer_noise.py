"""How much noise the integers of each layer make in its output, measured on float inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao import graph, numerics
from dmq_ao.quantizer.prepared import observers, tables


def layer_noise(prepared: GraphModule, arguments: list[Tensor]) -> dict[str, float]:
    """Signal-to-noise ratio of every layer's output, dB, integers against float.

    Args:
        prepared: calibrated.
        arguments: [B, ...] of the graph, a few samples.
    """
    with torch.no_grad():
        return _Measure(prepared).measure(arguments)


class _Measure(Interpreter):
    """Runs the float graph and, beside each layer, the same layer with its integers."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self.watchers = observers(prepared)
        nodes = graph.layer_nodes(prepared)
        self.nodes = {nodes[name]: name for name in self.watchers}
        self.tables = {nodes[name]: (name, table) for name, table in tables(prepared).items()}
        self.timestep: Tensor | None = None
        self.sqnr: dict[str, float] = {}

    def measure(self, arguments: list[Tensor]) -> dict[str, float]:
        """Output noise of every layer, dB."""
        signature = graph.signature_of(self.module)  # type: ignore[arg-type]
        if signature.timestep is not None:
            self.timestep = arguments[signature.names.index(signature.timestep)]
        self.run(*arguments)
        return self.sqnr

    def run_node(self, n: Node) -> Any:
        """The node's float result; the integers' result only feeds the ratio."""
        expected = super().run_node(n)
        if n in self.nodes:
            name = self.nodes[n]
            weight, activation = self.watchers[name]
            args, _ = self.fetch_args_kwargs_from_env(n)
            x = args[0] if activation is None else activation.simulate(args[0], self.timestep)
            codes = weight.record(args[1]).dequantize().to(args[1].dtype)
            bias = (args[2] if len(args) > 2 else None) if weight.bias is None else weight.bias.to(codes.dtype)
            actual = n.target(x, codes, bias, *args[3:])  # type: ignore[operator]
            self.sqnr[name] = numerics.sqnr(actual, expected)
        elif n in self.tables:
            name, table = self.tables[n]
            args, _ = self.fetch_args_kwargs_from_env(n)
            rows = n.target(table.record(args[0]).dequantize(), *args[1:])  # type: ignore[operator]
            self.sqnr[name] = numerics.sqnr(rows, expected)
        return expected
