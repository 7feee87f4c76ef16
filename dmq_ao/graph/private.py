"""What this package uses of PyTorch that PyTorch keeps to itself, each under a name of ours.

A private name may change in any release, so no other file has one: when PyTorch moves, this is the file to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an operator; None for anything else. FX nodes hold operators, and no public name tells it."""
    schema: torch.FunctionSchema | None = getattr(target, "_schema", None)
    return schema


def mutates_arguments(target: object) -> bool:
    """Whether an operator changes one of its arguments; False for what is none."""
    schema = schema_of(target)
    return schema is not None and bool(schema.is_mutable)


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """The block in which tensors have shapes and no values; tensors that have values may take part."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def rows_depend_on_values(value: object) -> bool:
    """Whether a fake tensor's shape is known only when the values are, as that of ``nonzero`` is."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value))


def guards_of(program: torch.export.ExportedProgram) -> Sequence[str]:
    """What an exported program asks of its inputs, as Python expressions: what its guards are made of."""
    return program._guards_code


def free_sizes(
    program: torch.export.ExportedProgram, names: Sequence[str]
) -> tuple[dict[str, list[tuple[str, int]]], dict[tuple[str, int], Callable[[Mapping[str, int]], int]], list[str]]:
    """What an exported program leaves open of the sizes of its tensors.

    Args:
        program: exported with tensors called ``names``.
        names: in order.

    Returns:
        By free size, the dimensions (name, axis) that have it; the dimensions that follow from free sizes, each with
        the function of them; and as Python expressions, in words of ``size_rules``, fixed sizes and bounds.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    derived: dict[tuple[str, int], Callable[[Mapping[str, int]], int]] = {}
    conditions: list[str] = []
    user_inputs = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    for name, value in zip(names, values, strict=True):
        for axis, size in enumerate(value.shape):
            here = f"shape[{name!r}][{axis}]"
            if isinstance(size, int):
                conditions.append(f"{here} == {size}")
                continue
            expression = size.node.expr
            if not expression.is_symbol:
                derived[name, axis] = partial(_evaluated, expression)
                continue
            places.setdefault(str(expression), []).append((name, axis))
            bounds = program.range_constraints.get(expression)
            if bounds is not None:
                conditions += [f"{here} >= {int(bounds.lower)}"] if bounds.lower > 2 else []
                conditions += [f"{here} <= {int(bounds.upper)}"] if bounds.upper < 2**31 else []
    return places, derived, list(dict.fromkeys(conditions))


def _evaluated(expression: Any, values: Mapping[str, int]) -> int:
    return int(expression.subs({symbol: values[str(symbol)] for symbol in expression.free_symbols}))


def drop_call_checks(gm: GraphModule) -> None:
    """Remove what ``torch.export`` hangs before every call of a module; there is no option to leave it out."""
    gm._forward_pre_hooks.clear()


def children(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The modules right below one, by name: also those that ``named_children`` names once for two names."""
    return module._modules
