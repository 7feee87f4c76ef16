"""A stored graph run without values: what does not fit or grows too large is known before it runs.

On the meta device an operator checks its arguments and says what comes out, and computes nothing. What the graph
claims of its values is compared with that, for kernels are chosen by it. A graph is tried on its own example when it
is loaded, and on the inputs of a call when they have sizes that it was not tried on.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from dmq_ao import graph
from dmq_ao.config import InvalidFile
from dmq_ao.graph import aten
from dmq_ao.graph.private import OpOverload, TorchDispatchMode, operator_arguments
from dmq_ao.graph.values import VAL, Value
from dmq_ao.serialization import calls

MAX_INPUT = 2**28
"""Elements of all example inputs together."""
MAX_VALUE_BYTES, BYTES_SHARE = 2**30, 64
"""Of what is in memory at once: so much, or so often the bytes of the inputs and the stored tensors in float32."""
MAX_PRODUCTS, PRODUCTS_SHARE = 2**36, 4
"""Multiply-adds: so many, or so often the elements of the inputs times those of the stored tensors."""
GROWTH = 8
"""Larger inputs may take so often what the example's did, times the square of how much larger they are."""
_MAX_AXIS = 2**31
_META = torch.device("meta")
# Of these the results on the way are counted too.
_COMPOSED = {aten.einsum.default, aten.tensordot.default}
# Added by convert, after which nobody describes values; all others must say theirs.
_UNDESCRIBED = {aten.index_select.default, aten.div.Tensor, operator.getitem}


def example_inputs(shapes: Iterable[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Tensors without values, [...] of the shapes that a file gives.

    Raises:
        ValueError: for shapes that are none, or hold too much.
    """
    inputs = []
    for shape, dtype in shapes:
        if any(type(size) is not int or not 0 <= size <= MAX_INPUT for size in shape) or len(shape) > 16:
            raise ValueError(f"invalid shape {list(shape)} of an example input")
        inputs.append(torch.empty(tuple(shape), dtype=dtype, device=_META))
    if sum(x.numel() for x in inputs) > MAX_INPUT:
        raise ValueError(f"the example inputs hold more than {MAX_INPUT} elements")
    return inputs


@dataclass(frozen=True)
class _Value:
    """The result of a step, by its number."""

    number: int


@dataclass(frozen=True)
class _Step:
    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    described: Any
    last_of: tuple[int, ...]


class Program:
    """A graph as it is when it is read, apart from what a backend makes of it: to be tried on any inputs."""

    def __init__(self, gm: GraphModule, inputs: Sequence[Tensor]) -> None:
        """Try a graph on its example.

        Args:
            gm: a q/dq graph, its values described.
            inputs: from ``example_inputs``, in the graph's order.

        Raises:
            ValueError: naming the node, for a call that its operator refuses, a result that is too large, or a
                described value that is another.
        """
        nodes = list(gm.graph.nodes)
        if sum(node.op == "placeholder" for node in nodes) != len(inputs):
            raise ValueError(f"the graph must take the {len(inputs)} tensors of its signature")
        numbers = {node: number for number, node in enumerate(nodes)}
        last = {source: node for node in nodes for source in node.all_input_nodes}
        last_uses: dict[Node, list[int]] = {}
        for source, node in last.items():
            if source.op == "call_function":
                last_uses.setdefault(node, []).append(numbers[source])

        def by_number(value: Any) -> Any:
            if isinstance(value, Node):
                return _Value(numbers[value])
            return _META if isinstance(value, torch.device) else value

        self.steps = [
            _Step(
                f"{node.name} ({node.target})",
                node.op,
                node.target,
                map_aggregate(node.args, by_number),
                dict(map_aggregate(node.kwargs, by_number)),
                node.meta.get(VAL),
                tuple(last_uses.get(node, ())),
            )
            for node in nodes
        ]
        self.stored = {n: graph.attribute(gm, node).to(_META) for node, n in numbers.items() if node.op == "get_attr"}
        stored, elements = (sum(x.numel() for x in tensors) for tensors in (self.stored.values(), inputs))
        limits = _Cost(
            max(MAX_VALUE_BYTES, BYTES_SHARE * 4 * (stored + elements)),
            max(MAX_PRODUCTS, PRODUCTS_SHARE * stored * elements),
        )
        self.answer, self.cost = _Trial(self, limits, described=True).run(inputs)
        self.elements = max(1, elements)
        self.known_sizes = {_sizes(inputs)}

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuse inputs [...] whose sizes let the graph grow far more than they did; sizes that were tried pass.

        Raises:
            ValueError: naming the node.
        """
        sizes = _sizes(inputs)
        if sizes in self.known_sizes:
            return
        growth = max(1.0, sum(x.numel() for x in inputs) / self.elements)
        factor = GROWTH * growth**2
        limits = _Cost(
            max(MAX_VALUE_BYTES, int(factor * self.cost.bytes)), max(MAX_PRODUCTS, int(factor * self.cost.products))
        )
        _Trial(self, limits, described=False).run([torch.empty(x.shape, dtype=x.dtype, device=_META) for x in inputs])
        self.known_sizes.add(sizes)


def _sizes(inputs: Sequence[Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((x.shape, x.dtype) for x in inputs)


@dataclass
class _Cost:
    bytes: int
    products: int


class _Trial:
    def __init__(self, program: Program, limits: _Cost, described: bool) -> None:
        self.program, self.limits, self.described = program, limits, described
        self.values: dict[int, Any] = dict(program.stored)
        self.live, self.cost = 0, _Cost(0, 0)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, _Cost]:
        rest = iter(inputs)
        answer = None
        with torch.no_grad():
            for number, step in enumerate(self.program.steps):
                try:
                    if step.op == "placeholder":
                        answer = next(rest)
                    elif step.op != "get_attr":
                        answer = self._call(step)
                    else:
                        answer = self.values[number]
                    if self.described:
                        _check_description(step, answer)
                except Exception as error:  # of any type: the operator's own
                    raise ValueError(f"node {step.name}: {_first_line(error)}") from error
                self.values[number] = answer
                for source in step.last_of:
                    self.live -= _value_bytes(self.values.pop(source))
        return answer, self.cost

    def _call(self, step: _Step) -> Any:
        args, kwargs = self._resolve(step.args), self._resolve(step.kwargs)
        if step.op == "output":
            return args[0]
        calls.check_arguments(step.target, args, kwargs)
        if isinstance(step.target, OpOverload) and _takes_device(step.target):
            kwargs = {**kwargs, "device": _META}  # else it would make what it makes for real
        if step.target in _COMPOSED:
            with _Counted(self):
                result = step.target(*args, **kwargs)
        else:
            result = step.target(*args, **kwargs)
        self.account(step.target, args, result)
        return result

    def _resolve(self, arguments: Any) -> Any:
        return map_aggregate(
            arguments, lambda value: self.values[value.number] if isinstance(value, _Value) else value
        )

    def account(self, target: Callable[..., Any], args: tuple[Any, ...], result: Any, *, stays: bool = True) -> None:
        """Add what a call takes, and refuse it where it is too much."""
        if isinstance(result, (int, float)) and not -(2**63) <= result < 2**63:
            raise ValueError("a size out of range of int64")
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor) and (not one.is_meta or max(one.shape, default=0) > _MAX_AXIS):
                raise ValueError(f"a result of shape {list(one.shape)} is too large for this model and its inputs")
        size = _value_bytes(result)
        self.live += size if stays else 0
        self.cost.bytes = max(self.cost.bytes, self.live + (0 if stays else size))
        self.cost.products += calls.multiply_adds(target, args, result)
        if self.cost.bytes > self.limits.bytes or self.cost.products > self.limits.products:
            what = [list(one.shape) for one in (result if isinstance(result, (tuple, list)) else [result])]
            raise ValueError(f"results of shapes {what} are too large for this model and its inputs, or too much work")


class _Counted(TorchDispatchMode):
    """Counts the results of the operators that a composed one is made of."""

    def __init__(self, trial: _Trial) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trial = trial

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.trial.account(func, args, result, stays=False)
        return result


def _value_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_value_bytes(one) for one in value) if isinstance(value, (tuple, list)) else 0


@functools.cache
def _takes_device(target: OpOverload) -> bool:
    return any(argument.name == "device" and argument.kwarg_only for argument in operator_arguments(target))


def _check_description(step: _Step, value: Any) -> None:
    described = step.described
    if described is None:
        ours = isinstance(step.target, OpOverload) and step.target.namespace == "dmq_ao"
        if step.op == "call_function" and isinstance(value, Tensor) and not ours and step.target not in _UNDESCRIBED:
            raise ValueError("its value is not described")
        return
    if not _fits(described, value):
        raise ValueError(f"it is described as {described}, and gives {_description(value)}")


def _fits(described: Any, value: Any) -> bool:
    if isinstance(described, Value):
        if not isinstance(value, Tensor) or value.dtype != described.dtype or value.dim() != described.dim():
            return False
        return all(size in (None, actual) for size, actual in zip(described.shape, value.shape, strict=True))
    if isinstance(described, tuple):
        is_several = isinstance(value, (tuple, list)) and len(value) == len(described)
        return is_several and all(_fits(one, actual) for one, actual in zip(described, value, strict=True))
    return True


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else repr(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse_growth(program: Program, inputs: Sequence[Tensor], folder: object) -> None:
    """``Program.check`` of inputs [...], as the error of a folder.

    Raises:
        InvalidFile: naming the folder and the node.
    """
    try:
        program.check(inputs)
    except ValueError as error:
        shapes = [tuple(x.shape) for x in inputs]
        raise InvalidFile(f"{folder}: the graph does not take inputs of shapes {shapes}: {error}") from error
