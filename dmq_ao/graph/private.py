"""What this package uses of PyTorch, and of libraries around it, that they keep to themselves, under names of ours.

A private name may change in any release, so no other file has one: when PyTorch moves, this is the file to mend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch.fx import GraphModule
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# What ``torch.cpu.get_capabilities`` calls an instruction, and what older releases answer for it.
_OLDER_QUESTIONS = {
    "amx_tile": "_is_amx_tile_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_vnni": "_is_vnni_supported",
}


def cpu_has(instructions: str) -> bool:
    """Whether this CPU has instructions, by their name in ``torch.cpu.get_capabilities``; False if PyTorch cannot say.

    Private where a release has no ``get_capabilities``.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(instructions, False))
    older = getattr(torch.cpu, _OLDER_QUESTIONS.get(instructions, ""), None)
    return bool(older and older())


def schema_of(target: object) -> torch.FunctionSchema | None:
    """The schema of an operator; None for anything else. FX nodes hold operators, and no public name tells it."""
    schema: torch.FunctionSchema | None = getattr(target, "_schema", None)
    return schema


def operator_arguments(target: object) -> list[torch.Argument]:
    """The arguments of an operator's schema in order: ``name``, ``default_value``, ``real_type``, ``kwarg_only``."""
    schema = schema_of(target)
    return [] if schema is None else list(schema.arguments)


def mutates_arguments(target: object) -> bool:
    """Whether an operator changes one of its arguments; False for what is none."""
    schema = schema_of(target)
    return schema is not None and bool(schema.is_mutable)


def decomposed(target: object, args: Any, kwargs: Any) -> Any:
    """An operator that PyTorch makes of others, called as those; NotImplemented for one that it does not."""
    is_aten = isinstance(target, OpOverload) and target.namespace == "aten"
    return target.decompose(*args, **kwargs) if is_aten else NotImplemented  # type: ignore[attr-defined]


def compiler_error() -> type[Exception]:
    """What the compiler raises of code that it cannot trace, an error that the code raises included."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


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


def replace_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Give a shallow copy of a module another child, which the module it was copied from does not get."""
    module.__dict__["_modules"] = {**module._modules, name: child}


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` wrapped; what is not wrapped is itself."""
    return getattr(module, "_orig_mod", module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: it leaves the class and replaces the call."""
    return getattr(module, "_compiled_call_impl", None) is not None


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested tuples, lists and dicts with what they hold changed, as ``torch.export`` takes them apart."""
    return _pytree.tree_map(change, value)


def same_nesting(left: Any, right: Any) -> bool:
    """Whether two nestings of tuples, lists and dicts are of the same kinds and lengths, whatever they hold."""
    return _pytree.tree_structure(left) == _pytree.tree_structure(right)


def parameters_of(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """The parameters right at a module, by name."""
    return module._parameters


def offload_hook(module: nn.Module) -> object | None:
    """What accelerate hangs on a module that it offloads; None on others. Its own private name."""
    return getattr(module, "_hf_hook", None)


def diffusers_hooks(module: nn.Module) -> Iterable[str]:
    """Names of what diffusers hangs on a module: caches, offloading, casting. Its own private name."""
    return tuple(getattr(getattr(module, "_diffusers_hook", None), "hooks", ()))


def computes_in_chunks(module: nn.Module) -> bool:
    """Whether a block of diffusers cuts its feed-forward into chunks. Its own private name."""
    return isinstance(getattr(module, "_chunk_size", None), int)


def leaves(value: Any) -> list[Any]:
    """What nested tuples, lists and dicts of a graph's answer hold, as ``torch.export`` takes them apart."""
    return _pytree.tree_flatten(value)[0]


def answer_spec(gm: GraphModule) -> Any:
    """How ``torch.export`` puts a graph's answer together, a ``TreeSpec``; None for what its last node says."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    return None if info is None else info.out_spec


def int_mm(left: Tensor, right: Tensor) -> Tensor:
    """int32 sums [rows, columns] of int8 [rows, inner] times int8 [inner, columns], by PyTorch's own kernel."""
    return torch._int_mm(left, right)


def scaled_mm(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Float8 [rows, inner] times float8 [inner, columns] in ``dtype``, with scales [rows, 1] and [1, columns]."""
    return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype)


@contextlib.contextmanager
def sizes_apart() -> Iterator[None]:
    """The block in which a compilation takes axes that happen to be equal (a square) for sizes of their own.

    By hand, as the config's own ``patch`` takes 50 us a call, which every call of a compiled module would pay.
    """
    from torch.fx.experimental import _config

    before = _config.use_duck_shape
    _config.use_duck_shape = False
    try:
        yield
    finally:
        _config.use_duck_shape = before


def inductor_freezing() -> AbstractContextManager[Any]:
    """The block in which ``torch.compile`` takes weights for constants, as guides to Inductor's quantization say."""
    import torch._inductor.config

    patch: AbstractContextManager[Any] = torch._inductor.config.patch(freezing=True)
    return patch
