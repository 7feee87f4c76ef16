"""Which operators a function runs at given sizes, found without values: what runs the same is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dmq_ao.graph.private import OpOverload, TorchDispatchMode, decomposed, fake_tensor_mode, leaves, mutates_arguments

# Other places, axes or memory for the same numbers: sizes of what follows tell them apart where it matters.
_LAYOUT = """
view _unsafe_view reshape _reshape_alias expand permute transpose t unsqueeze squeeze as_strided clone contiguous
_to_copy alias detach lift lift_fresh lift_fresh_copy unbind split split_with_sizes empty empty_like empty_strided
device sym_size sym_numel sym_stride is_contiguous _local_scalar_dense _assert_tensor_metadata copy_ unfold unflatten
"""
_IGNORED = frozenset(_LAYOUT.split())
Key = tuple[str, ...]


def operators_run(
    function: Callable[..., Any], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
) -> list[Key]:
    """What ``function`` computes its result by, on tensors of these shapes: operators with numbers and result sizes.

    Layout is left out, and so is what the result does not depend on.
    """
    with torch.no_grad(), fake_tensor_mode():
        inputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes.values()]
        trace = _Trace()
        with trace:
            result = function(*inputs)
    return trace.live(result)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Key | None, list[int], list[int], bool]] = []
        self.references: list[Any] = []  # so that ids stay their own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operators that are made of others arrive whole
            parts = decomposed(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        if isinstance(func, OpOverload):
            inputs = [id(x) for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in leaves(result) if isinstance(x, Tensor)]
            name = str(func).split(".")[1]
            whole = name == "slice" and args[0].shape == result.shape  # x[:, None] of a graph, and not of eager code
            key = None if name in _IGNORED or whole else _trace_key(name, args, kwargs, outputs)
            self.calls.append((key, inputs, [id(x) for x in outputs], mutates_arguments(func)))
            self.references.append((args, kwargs, result))
        return result

    def live(self, result: Any) -> list[Key]:
        needed = {id(x) for x in leaves(result) if isinstance(x, Tensor)}
        keys = []
        for key, inputs, outputs, mutates in reversed(self.calls):
            if needed & set(outputs) or mutates and needed & set(inputs):
                needed |= set(inputs)
                if key is not None:
                    keys.append(key)
        return keys[::-1]


def _trace_key(name: str, args: Any, kwargs: Mapping[str, Any], outputs: list[Tensor]) -> Key:
    if name == "slice":
        source, axis, start, stop, step = tuple(args) + (None,) * (5 - len(args))
        args = (source, axis or 0, start or 0, sys.maxsize if stop is None else stop, step or 1)
    numbers = [_number_word(x) for x in leaves(args)]
    options = [f"{k}={_number_word(v)}" for k, v in sorted(kwargs.items()) if isinstance(v, (bool, int, float))]
    return (name, *numbers, *options, *(str(tuple(x.shape)) for x in outputs))


def _number_word(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
