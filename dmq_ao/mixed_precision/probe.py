"""What rounding some layers does to the denoiser's output, the rest of the network in float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao import graph, numerics
from dmq_ao.numerics import ops
from dmq_ao.objectives import relative_error

Change = tuple[Tensor | None, int | None]  # the weight of a layer, and bits of its input; None for float


class Perturbed(Interpreter):
    """The float graph with some layers rounded to nearest, from the first of them on."""

    def __init__(self, prepared: GraphModule, arguments: list[Tensor]) -> None:
        """Run the float graph once on ``arguments``; its values stay."""
        super().__init__(prepared, garbage_collect_values=False)
        self.arguments = arguments
        self.changed: Mapping[Node, Change] = {}
        with torch.no_grad():
            self.expected = graph.first_tensor(self.run(*arguments))
        self.values = dict(self.env)

    def error(self, node: Node, weight: Tensor | None, bits: int | None) -> float:
        """Mean relative error of the output with a layer's ``weight`` [out, ...] and an input of ``bits`` bits."""
        return self.error_of({node: (weight, bits)})

    def error_of(self, changed: Mapping[Node, Change]) -> float:
        """Mean relative error of the output when layers have these weights, and inputs of so many bits, at once."""
        self.changed = changed
        reached = graph.reach(self.module, set(changed))  # type: ignore[arg-type]
        unchanged = {other: value for other, value in self.values.items() if other not in reached}
        with torch.no_grad():
            result = self.run(*self.arguments, initial_env=unchanged)
        return float(relative_error(graph.first_tensor(result), self.expected).mean())

    def products(self, node: Node) -> int:
        """Multiply-accumulates of a layer, a sample."""
        weight = node.args[1]
        assert isinstance(weight, Node)
        return int(self.values[node][0].numel() * self.values[weight][0].numel())

    def run_node(self, n: Node) -> Any:
        """Observers let through; changed layers have the weights set, their inputs rounded by each sample's range."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            return args[0]
        if n not in self.changed:
            return super().run_node(n)
        x: Tensor = args[0]
        weight, bits = self.changed[n]
        if bits is not None:
            scale, zero_point = (numerics.along(t, 0, x.dim()) for t in ops.dynamic_qparams(x, bits))
            x = numerics.fake_quantize(x, scale, zero_point, *numerics.code_range(bits, False)).to(x.dtype)
        weight = args[1] if weight is None else weight.to(args[1].dtype)
        return n.target(x, weight, *args[2:])  # type: ignore[operator]
