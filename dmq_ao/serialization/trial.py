"""A stored graph run without values, on its own example: what does not fit or grows too large is known before it runs.

On the meta device an operator checks its arguments and says what comes out, and computes nothing. What the graph
claims of its values is compared with that, for kernels are chosen by it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from dmq_ao import graph
from dmq_ao.values import VAL, Value

# Elements of all inputs together, of any one result, and of all results, beside what the model's own size allows.
MAX_INPUT = 2**28
MAX_RESULT = 2**28
MAX_RESULTS = 2**34
# The same, in elements of the inputs and the stored tensors together.
RESULT_SHARE = 16
RESULTS_SHARE = 4096
MAX_PIECES = 4096
MAX_POWER = 4
_META = torch.device("meta")
_aten = torch.ops.aten
_SPLITS = {_aten.split.Tensor, _aten.chunk.default, _aten.unbind.int, _aten.hsplit.int, _aten.dsplit.int}
_SPLITS |= {_aten.split.sizes, _aten.split_with_sizes.default}
# Of one dtype, which the meta device does not look at.
_PRODUCTS = {
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default, _aten.matmul.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding, _aten.bmm.default, _aten.mm.default),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
    *(_aten.addmm.default, _aten.addbmm.default, _aten.baddbmm.default, _aten.mv.default, _aten.dot.default),
}
# Added by convert, after which nobody describes values; all others must say theirs.
_UNDESCRIBED = {_aten.index_select.default, _aten.div.Tensor, operator.getitem}


def example_inputs(shapes: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors without values.

    Raises:
        ValueError: for shapes that are none, or hold too much.
    """
    inputs = []
    for shape, dtype in shapes:
        if any(type(size) is not int or not 0 <= size <= MAX_INPUT for size in shape) or len(shape) > 16:
            raise ValueError(f"no example input has the shape {list(shape)}")
        inputs.append(torch.empty(tuple(shape), dtype=dtype, device=_META))
    if sum(x.numel() for x in inputs) > MAX_INPUT:
        raise ValueError(f"the example inputs hold more than {MAX_INPUT} elements")
    return inputs


def run(gm: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """What a graph answers, without values.

    Args:
        gm: the graph.
        inputs: from ``example_inputs``, in the graph's order.

    Raises:
        ValueError: naming the node, for a call that its operator refuses, a result that is too large, or a described
            value that is another.
    """
    nodes = list(gm.graph.nodes)
    if sum(node.op == "placeholder" for node in nodes) != len(inputs):
        raise ValueError(f"the graph takes other than the {len(inputs)} tensors of its signature")
    with torch.no_grad():
        return _Trial(gm, inputs).run(nodes)


class _Trial:
    def __init__(self, gm: GraphModule, inputs: Sequence[Tensor]) -> None:
        self.gm, self.inputs = gm, iter(inputs)
        self.values: dict[Node, Any] = {}
        own = sum(x.numel() for x in inputs) + sum(x.numel() for x in [*gm.parameters(), *gm.buffers()])
        self.limit, self.left = max(MAX_RESULT, RESULT_SHARE * own), max(MAX_RESULTS, RESULTS_SHARE * own)

    def run(self, nodes: Sequence[Node]) -> Any:
        for node in nodes:
            try:
                value = self._value(node)
                self._account(value)
                if VAL in node.meta or node.op == "call_function":
                    _check_described(node, value)
            except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
                raise ValueError(f"node {node.name} ({node.target}): {_first_line(error)}") from error
            self.values[node] = value
        return self.values[nodes[-1]]

    def _value(self, node: Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs)
        if node.op == "get_attr":
            return graph.attribute(self.gm, node).to(_META)
        args, kwargs = self._given(node.args), self._given(node.kwargs)
        if node.op == "output":
            return args[0]
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise ValueError("it changes its argument, which a stored graph does not")
            if target in _SPLITS:
                _check_pieces(target, args, kwargs)
            if _takes_device(target):  # else it would make what it makes for real
                kwargs = {**kwargs, "device": _META}
            if target in _PRODUCTS:
                _check_dtypes([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        else:
            _check_arithmetic(target, args)
        return target(*args, **kwargs)

    def _given(self, arguments: Any) -> Any:
        def given(value: Any) -> Any:
            if isinstance(value, Node):
                return self.values[value]
            return _META if isinstance(value, torch.device) else value

        return map_aggregate(arguments, given)

    def _account(self, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for one in value:
                self._account(one)
        elif isinstance(value, Tensor):
            size = value.numel()
            self.left -= size
            if not value.is_meta:
                raise ValueError("it makes values where none are wanted")
            if size > self.limit or self.left < 0 or max(value.shape, default=0) > self.limit:
                raise ValueError(f"a result of shape {list(value.shape)} is too large for this model and its example")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a size beyond 64 bits")


def _check_described(node: Node, value: Any) -> None:
    described = node.meta.get(VAL)
    if described is None:
        ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dmq_ao"
        if isinstance(value, Tensor) and not ours and node.target not in _UNDESCRIBED:
            raise ValueError("its value is not described")
        return
    if not _fits(described, value):
        raise ValueError(f"it is described as {described}, and gives {_described(value)}")


def _fits(described: Any, value: Any) -> bool:
    if isinstance(described, Value):
        if not isinstance(value, Tensor) or value.dtype != described.dtype or value.dim() != described.dim():
            return False
        return all(size in (None, actual) for size, actual in zip(described.shape, value.shape, strict=True))
    if isinstance(described, tuple):
        is_several = isinstance(value, (tuple, list)) and len(value) == len(described)
        return is_several and all(_fits(one, actual) for one, actual in zip(described, value, strict=True))
    return True


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else repr(value)


@functools.cache
def _takes_device(target: torch._ops.OpOverload) -> bool:
    return any(argument.name == "device" and argument.kwarg_only for argument in target._schema.arguments)


def _check_pieces(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Splitting makes a tensor a piece, each of which takes time: their number is looked at first."""
    given = {argument.name: value for argument, value in zip(target._schema.arguments, args, strict=False)}  # type: ignore[attr-defined]
    given |= kwargs
    size = max(given["self"].shape, default=0)
    if target is _aten.split.Tensor:
        size = math.ceil(size / given["split_size"]) if given["split_size"] > 0 else 0
    elif "split_sizes" in given or "split_size" in given:
        size = len(given["split_sizes"] if "split_sizes" in given else given["split_size"])
    elif target is not _aten.unbind.int:
        size = min(size, given.get("chunks", given.get("sections", 0)))
    if size > MAX_PIECES:
        raise ValueError(f"{size} pieces, at most {MAX_PIECES}")


def _check_dtypes(factors: Sequence[Tensor]) -> None:
    if len({factor.dtype for factor in factors}) > 1:
        raise TypeError(f"factors of one dtype, got {[str(factor.dtype) for factor in factors]}")


def _check_arithmetic(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Python's own operators take anything, and texts and lists as well: here sizes and results alone."""
    if target is operator.getitem:
        whole, place = args
        if not isinstance(whole, (tuple, list)) or type(place) is not int:
            raise TypeError(f"getitem takes one of several results by its number, got {place!r}")
    elif not all(isinstance(value, (int, float, Tensor)) for value in args):
        raise TypeError("sizes are numbers")
    elif target is operator.pow and not (type(args[1]) is int and 0 <= args[1] <= MAX_POWER):
        raise ValueError(f"sizes are taken to powers of 0 to {MAX_POWER}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
