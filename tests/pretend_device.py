"""A device that is not there: tensors say that they lie on ``pretend:0`` and are computed on the CPU.

What PyTorch refuses on a GPU, because tensors of one operator lie on two devices, is refused here likewise. It
shows on a machine without a GPU whether code that takes "any device" does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
_CROSSING = {aten._to_copy.default, aten.copy_.default}
# A GPU's tensors may be indexed by the CPU's, not the other way round.
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class There(Tensor):
    """A tensor on the device; ``inner`` is the CPU's that computes it."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner})"

    def tolist(self) -> Any:
        """That of the inner tensor: PyTorch has none for subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """The block in which ``.to("pretend")`` works, and factories make tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors([*args, *kwargs.values()]))
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    asked = kwargs.get("device")
    onto = torch.device(asked) if asked is not None else DEVICE if there else CPU
    if not there and onto.type != DEVICE.type:
        return func(*args, **kwargs)
    _check(func, args, tensors, there, onto, kwargs.get("generator"))
    inner_args, inner_kwargs = tree_map_only(There, lambda one: one.inner, (args, kwargs))
    if asked is not None and onto.type == DEVICE.type:
        inner_kwargs["device"] = CPU
    result = func(*inner_args, **inner_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if onto.type != DEVICE.type:
        return result
    result = tree_map_only(Tensor, There, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check(
    func: Any, args: Any, tensors: list[Tensor], there: list[There], onto: torch.device, generator: Any
) -> None:
    """Refuse what a GPU refuses; a CPU's single number is taken anywhere."""
    if generator is not None and generator.device.type != onto.type:
        raise RuntimeError(f"{func}: wants a generator on {onto.type}, got one on {generator.device.type}")
    if not there or func in _CROSSING or (func in _INDEXING and isinstance(args[0], There)):
        return
    wrong = [tuple(one.shape) for one in tensors if not isinstance(one, There) and one.dim() > 0]
    if wrong:
        raise RuntimeError(f"{func}: wants all tensors on one device, got {DEVICE} and, on the cpu, {wrong}")


def _empty(size: Any, stride: Any, **given: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=given.get("dtype"), device=CPU))


def _copy(into: There, source: Tensor, non_blocking: bool = False) -> There:
    into.inner.copy_(source.inner if isinstance(source, There) else source)
    return into


# ``torch.tensor(values, device=..)`` looks for these below Python.
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", _empty, "PrivateUse1")
_library.impl("copy_", _copy, "PrivateUse1")
