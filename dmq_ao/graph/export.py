"""``torch.export`` of a denoiser: its tensors by position, what it answers noted on the way, errors that say where."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dmq_ao.graph.containers import filled, with_tuples
from dmq_ao.graph.module_state import left_as_it_was
from dmq_ao.graph.patch_embed import any_size
from dmq_ao.graph.structure import Structure, taken_apart
from dmq_ao.graph.symbolic_len import symbolic_len


class CaptureError(ValueError):
    """A denoiser cannot become a graph. The message names it, the line of its code if known, and what to do."""


class Answers:
    """What an export notes of an answer: an object of its own, for export puts a module's attributes back."""

    last = Structure("tuple")


class Positional(nn.Module):
    """The denoiser called with its tensors by position and everything else constant; answers with tensors only.

    Attributes:
        nesting: how the arguments nest, with dotted paths for values.
    """

    def __init__(
        self, denoiser: nn.Module, names: tuple[str, ...], constants: Mapping[str, Any], nesting: Mapping[str, Any]
    ) -> None:
        """A call of ``denoiser`` with tensors called ``names``."""
        super().__init__()
        self.denoiser = denoiser
        self.names, self.constants = names, dict(constants)
        self.nesting = dict(nesting)
        self._answers = Answers()

    @property
    def answer(self) -> Structure:
        """How the denoiser answered when it was exported."""
        return self._answers.last

    def forward(self, *tensors: Tensor) -> Any:
        """The tensors [B, ...] of the answer: one, or a tuple of several.

        Raises:
            TypeError: when the denoiser answers without a tensor.
        """
        flat = {**self.constants, **dict(zip(self.names, tensors, strict=True))}
        results, self._answers.last = taken_apart(self.denoiser(**filled(self.nesting, flat)))
        if not results:
            raise TypeError("the denoiser answers without a tensor")
        return results[0] if len(results) == 1 else tuple(results)


def export(module: Positional, tensors: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """Export a call with every dimension dynamic, with lists among its arguments, and tuples where that fails.

    The denoiser is left as it was. ``tensors`` are [B, ...], or of any shape where they have no batch axis.

    Raises:
        CaptureError: whatever ``torch.export``, or the denoiser's code, raises.
    """
    try:
        return _export(module, tensors)
    except CaptureError:
        nesting, module.nesting = module.nesting, with_tuples(module.nesting)
        if module.nesting == nesting:
            raise
        try:
            return _export(module, tensors)
        except CaptureError:
            module.nesting = nesting
        raise


def _export(module: Positional, tensors: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    shapes = {name: dict.fromkeys(range(x.dim()), Dim.AUTO) for name, x in tensors.items()}
    try:
        with as_exported(module):
            return torch.export.export(
                module, tuple(tensors.values()), dynamic_shapes=(tuple(shapes.values()),), strict=False
            )
    except Exception as error:  # of any type: the model's own
        raise CaptureError(_why(module.denoiser, tensors, error)) from error


@contextmanager
def as_exported(module: Positional) -> Iterator[None]:
    """The state in which a denoiser is traced; it is left as it was."""
    with any_size(module), left_as_it_was(module.denoiser), torch.no_grad(), _whole_layers(), symbolic_len():
        yield


@contextmanager
def _whole_layers() -> Iterator[None]:
    """Keep PyTorch's transformer layers from calling one fused operator, whose layers nobody could quantize."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _why(denoiser: nn.Module, tensors: Mapping[str, Tensor], error: Exception) -> str:
    where = line_of(error)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    return (
        f"{type(denoiser).__name__} cannot be exported with inputs {shapes}: {type(error).__name__}:"
        f" {first_line(error)}" + (f", at {where}" if where else "") + f". {_remedy(error)}"
    )


def _remedy(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "DataDependent" in text or "data-dependent" in text or "GuardOnData" in text:
        return (
            "The code branches on the value of a tensor, or makes it a Python number, and a graph has one path: write"
            " it with torch.where or torch.cond, or pass the value as a Python number"
        )
    if "SymInt" in text:
        return "The code uses a size where only a plain number will do, for instance as a key: write int(size) there"
    return (
        "Try the call denoiser(**example_inputs) first; if that works, rewrite the line in operators that torch.export"
        " takes, or quantize the part of the model that does not contain it"
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def line_of(error: BaseException) -> str:
    """The innermost line of an error's way that is neither of PyTorch nor of this package, as ``file:line: code``."""
    own, others = Path(__file__).parents[1], Path(torch.__file__).parent
    standard = Path(sysconfig.get_path("stdlib"))
    line = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        library = own in path.parents or others in path.parents
        library |= standard in path.parents and "site-packages" not in path.parts
        if not library and path.suffix == ".py":
            line = f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()}"
    return line
