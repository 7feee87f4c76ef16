"""The quantize/dequantize graph with every quantized layer computed as the design writes it, in exact integers."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao import graph
from dmq_ao.denoiser import QuantizedDenoiser
from dmq_ao.numerics import along, ops


class Exact(Interpreter):
    """Runs a q/dq graph; a layer is an integer sum, exact in float64, and then a float32 epilogue::

    y_o = acc_o * scale * (w_scale_o / 2**D) + (bias_o - scale * z * w_scale_o / 2**D * sum_c w_oc')
    acc_o = sum_c q_c * w_oc'     w_oc' = 2**(D - e_c) * (w_oc - w_z_o)

    oneDNN's kernels for AMX multiply both scales first, so a layer's output is this to the last bits of float32.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.layers: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value; for a layer of integers, the exact one."""
        if n.op != "call_function" or graph.LAYER not in n.meta or not _is_integer(n):
            return super().run_node(n)
        result = self.layers[n.meta[graph.LAYER]] = self._layer(n)
        return result

    def _layer(self, node: Node) -> Tensor:
        codes, scale, zero_point, channel_step, ch_axis, _ = self._arguments(node.args[0])
        weight_codes, weight_scale, weight_zero_point, _ = self._arguments(node.args[1])
        assert weight_scale.shape[1] == 1, "an integer sum cannot run across groups of inputs"
        centred = codes.double() - along(zero_point, 0, codes.dim())
        finest = 1.0
        if channel_step is not None:
            finest = float(channel_step.min())
            centred = centred * along(channel_step.double() / finest, ch_axis, codes.dim())
        weight = weight_codes.double() - along(weight_zero_point[:, 0], 0, weight_codes.dim())
        total = node.target(centred, weight, None, *node.args[3:])  # type: ignore[operator]
        assert torch.equal(total, total.round())
        assert float(total.abs().max()) < 2**31
        out_axis = -1 if node.target == graph.LINEAR else 1
        step = torch.ones(codes.shape[ch_axis]) if channel_step is None else channel_step / finest
        sums = _sums(node, weight, step.double())
        # As the kernels do it: the zero point comes off with the bias, after the product of the bare codes.
        total = total + along(zero_point, 0, total.dim()) * along(sums, out_axis, total.dim())
        result = total.float() * along(scale, 0, total.dim())
        result = result * along(weight_scale[:, 0] * finest, out_axis, total.dim())
        offset = along(-(scale.double() * zero_point).float(), 0, total.dim())
        offset = offset * along(sums.float() * (weight_scale[:, 0] * finest), out_axis, total.dim())
        bias = self.env[node.args[2]] if len(node.args) > 2 and node.args[2] is not None else None  # type: ignore[index]
        result = result + (offset if bias is None else offset + along(bias, out_axis, total.dim()))
        result = result.to(node.meta["val"].dtype)
        # The kernels' layout: norms that read it round as they do behind the kernels.
        return result.contiguous(memory_format=torch.channels_last) if result.dim() == 4 else result

    def _arguments(self, node: Any) -> tuple[Any, ...]:
        return tuple(self.env[arg] if isinstance(arg, Node) else arg for arg in node.args)


def _sums(node: Node, weight: Tensor, step: Tensor) -> Tensor:
    """[O] sum of each output's weights, each times the ``step`` [C] of its input channel."""
    if node.target == graph.LINEAR:
        return weight @ step
    dims = weight.dim() - 2
    ones = along(step, 1, weight.dim()).expand(1, len(step), *weight.shape[2:])
    groups = node.args[6] if len(node.args) > 6 else 1
    total = node.target(ones, weight, None, [1] * dims, [0] * dims, [1] * dims, groups)  # type: ignore[operator]
    return total.flatten()


def _is_integer(node: Node) -> bool:
    real, weight = node.args[:2]
    sides = (getattr(real, "target", None), getattr(weight, "target", None))
    return sides == (ops.dequantize, ops.dequantize_weight)


def run_exactly(reference: QuantizedDenoiser, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a denoiser of ``backend="reference"`` with exact layers, and the output of each of them, by name."""
    interpreter = Exact(reference.graph_module)
    with torch.no_grad():
        output: Tensor = interpreter.run(*(inputs[name] for name in reference.signature.names))
    return output, interpreter.layers
