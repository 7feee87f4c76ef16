"""The quantized denoiser: a graph behind the signature of the model it came from."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao.config import InvalidFile
from dmq_ao.denoiser import attributes, border, call
from dmq_ao.denoiser.fractions import free_of_whole_numbers
from dmq_ao.denoiser.gradients import StraightThrough, has_opaque_operators
from dmq_ao.denoiser.parts import DenoiserParts
from dmq_ao.denoiser.report import layer_row, record_tensors, tensor_bytes
from dmq_ao.graph import PREFIX, private
from dmq_ao.records import Kernel
from dmq_ao.serialization.trial import Program, refuse_growth


class QuantizedDenoiser(nn.Module):
    """Calls like the denoiser it was made from, runs integers.

    The forward signature, the return type, ``config``, ``dtype`` and other attributes are those of the original;
    ``records`` (by layer name), ``plan``, ``kernels``, ``recipe`` and ``backend`` say what was done to it, ``merged``
    which layers were copies of which.
    """

    def __init__(self, gm: GraphModule, parts: DenoiserParts) -> None:
        """Wrap a lowered graph; made by ``dmq_ao.convert`` and ``dmq_ao.load``."""
        super().__init__()
        self._fractions = free_of_whole_numbers(gm, parts.signature)
        attributes.refuse_hooks(gm)
        self.graph_module = gm
        self.signature, self.recipe, self.backend = parts.signature, parts.recipe, parts.backend
        self.plan, self.records, self.kernels = dict(parts.plan), parts.records, dict(parts.kernels)
        self.sqnr_db, self.merged = dict(parts.sqnr_db), dict(parts.merged)
        self.stored_graph = parts.stored_graph
        self.float_tensors = dict(parts.float_tensors)
        self._guard: tuple[Program, str] | None = None
        self._casts: set[torch.dtype] = set()
        self.roles = dict(parts.roles)
        self._formulas = call.formulas_of(parts.signature)
        super().requires_grad_(False)
        # Not a submodule: it has no bytes, only names, shapes and config to answer for the original model.
        self.__dict__["skeleton"] = parts.skeleton

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original model (``config``, ``add_embedding`` ...), to be read.

        What would change the float model's modules raises when it is called: the graph runs without them.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "skeleton":
                raise
            return attributes.forwarded(self.__dict__["skeleton"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of its own; those of the original model cannot be set.

        Raises:
            TypeError: with what to do instead.
        """
        skeleton = self.__dict__.get("skeleton")
        own = name in self.__dict__ or name in private.children(self) or hasattr(type(self), name)
        if skeleton is not None and not own and hasattr(skeleton, name):
            raise attributes.refusal(skeleton, name)
        super().__setattr__(name, value)

    def guard(self, program: Program, folder: str | Path) -> None:
        """Try inputs of new sizes before they are run, and name the folder in errors: the graph is of a file."""
        self._guard = program, str(folder)

    def layer_reports(self) -> list[dict[str, Any]]:
        """One row a layer: kept or quantized, roles, bits, kernel, output SQNR in dB on the samples, and why."""
        floats = Kernel("float")
        return [
            layer_row(item, self.records, self.kernels.get(name, floats), self.sqnr_db.get(name), self.float_bits)
            | {"roles": list(self.roles.get(name, ()))}
            for name, item in self.plan.items()
        ]

    @property
    def kernel_counts(self) -> dict[str, int]:
        """How many quantized layers each kernel runs, most first."""
        return dict(Counter(kernel.name for kernel in self.kernels.values()).most_common())

    @property
    def float_bits(self) -> int:
        """Bits of the original model's numbers."""
        return self.dtype.itemsize * 8

    @property
    def mean_bits(self) -> float:
        """Stored bits per original parameter: codes, scales, zero points, exponents, and all that stayed in float."""
        stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.float_tensors.values())
        stored += sum(record.stored_bits for record in self.records.values())
        computed = {} if self.stored_graph is None else self.stored_graph.constants
        names = {f"{PREFIX}{name}.{what}" for name in self.plan for what in ("weight", "bias")}
        stored += sum(x.numel() * x.element_size() * 8 for name, x in computed.items() if name in names)
        return float(stored / sum(tensor.numel() for tensor in self.skeleton.state_dict().values()))

    @property
    def graph_bytes(self) -> int:
        """Bytes in memory of what the lowered graph reads: codes, scales, all that stayed in float.

        Of codes that a kernel prepacked, the codes are counted, and not what it pads them with.
        """
        return tensor_bytes(self._graph_tensors())

    @property
    def resident_bytes(self) -> int:
        """``graph_bytes`` and those of the records, from which ``save`` writes; what they share is counted once.

        Records of a loaded denoiser stay in its file, and take none.
        """
        records = self.records.values() if isinstance(self.records, dict) else ()
        tensors = (tensor for record in records for tensor in record_tensors(record))
        return tensor_bytes(chain(self._graph_tensors(), self.float_tensors.values(), tensors))

    def _graph_tensors(self) -> Iterator[Tensor]:
        return chain(self.graph_module.parameters(), self.graph_module.buffers())

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of inputs and outputs: that of the original model."""
        example: torch.dtype = self.signature.example[self.signature.batch][1]
        return example

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        tensors = chain(self.graph_module.buffers(), self.graph_module.parameters())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedDenoiser:
        """What ``to``, ``half``, ``cuda`` and the like end in: kernels and codes are made for one dtype and device.

        Raises:
            TypeError: for another dtype or device than it has.
        """
        del recurse
        probe = fn(torch.zeros(1, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise TypeError(
                f"a quantized denoiser stays {self.dtype} on {self.device}, asked for {probe.dtype} on {probe.device};"
                " quantize a float denoiser of that dtype on that device instead"
            )
        return self

    def train(self, mode: bool = True) -> QuantizedDenoiser:
        """Evaluation is its only mode, and ``eval()`` changes nothing.

        Raises:
            TypeError: for training mode.
        """
        if mode:
            raise TypeError("a quantized denoiser cannot be trained: train the float denoiser, and quantize that")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedDenoiser:
        """Its codes have no gradients.

        Raises:
            TypeError: when they are asked for.
        """
        if requires_grad:
            raise TypeError(
                "codes of a quantized denoiser have no gradients: train the float denoiser, and quantize that"
            )
        return super().requires_grad_(False)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: weights are codes.

        Raises:
            TypeError: always, with what to do.
        """
        del args, kwargs
        raise TypeError(
            "a quantized denoiser takes no state_dict, its weights are codes: load it into the float denoiser and"
            " quantize that, or dmq_ao.load(folder) what was saved"
        )

    def share_memory(self) -> NoReturn:
        """Not here: prepacked weights cannot be shared between processes.

        Raises:
            TypeError: always, with what to do.
        """
        raise TypeError("prepacked weights are not shared between processes: dmq_ao.load(folder) in each of them")

    def __copy__(self) -> QuantizedDenoiser:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedDenoiser:
        """A copy that shares the prepacked weights: they are oneDNN's, which cannot copy them, and never change."""
        memo |= {id(tensor): tensor for tensor in self.graph_module.buffers() if tensor.is_mkldnn}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Not pickled, and so not by ``torch.save``: nothing of it is to be run when it is read.

        Raises:
            TypeError: always, with the call to use.
        """
        del protocol
        raise TypeError(
            "a quantized denoiser is not pickled: dmq_ao.save(denoiser, folder) writes it, and dmq_ao.load(folder)"
            " reads it"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not here: ``dmq_ao.save`` writes a quantized denoiser.

        Raises:
            TypeError: always, with the call to use.
        """
        del args, kwargs
        raise TypeError("a quantized denoiser is written by dmq_ao.save(denoiser, folder)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Denoise; arguments as for the original model.

        Floating arguments are cast to what the graph was made for, with a warning once, and the answer back to the
        dtype of the sample. A row with NaN in it comes out as NaN. On the ``reference`` backend inputs get the
        gradient of the straight-through estimator; on others it is an error.

        Raises:
            TypeError: for a missing, doubled or unknown argument, one of another kind of dtype, one that was constant
                in the exported graph and differs, or one that requires a gradient where kernels pass none.
            ValueError: for shapes that the exported graph does not take, another device, or a fractional timestep
                where it takes whole ones.
            InvalidFile: for values or sizes that the graph of a file fails on.
        """
        signature = self.signature
        arguments = call.named_arguments(signature, self.skeleton, args, kwargs)
        as_class = signature.return_type is not None and arguments.pop(call.RETURN_DICT, True)
        tensors = self._graph_inputs(arguments)
        dtype = call.dtype_of(arguments, signature.batch)
        if dtype != self.dtype:
            self._tell_cast(dtype)
        if not torch.compiler.is_compiling():  # there, each rule would be one more guard to check in every call
            call.check_sizes(signature, border.stand_ins(tensors))
        result = self._run(tensors)
        if dtype != self.dtype:
            result = border.on_tensors(result, lambda x: x.to(dtype) if x.is_floating_point() else x)
        values = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if signature.answer is not None and (as_class or signature.return_type is None):
            return signature.answer.built(values)
        if as_class and signature.return_type is not None:
            return signature.return_type(*values)
        return values if signature.returns_tuple else result

    def check_call(self, *args: Any, **kwargs: Any) -> None:
        """Raise what ``forward`` raises of these arguments, without computing anything.

        Raises:
            TypeError: as ``forward``.
            ValueError: as ``forward``.
        """
        tensors = self._graph_inputs(call.named_arguments(self.signature, self.skeleton, args, kwargs))
        call.check_sizes(self.signature, border.stand_ins(tensors))

    def _graph_inputs(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        return call.graph_inputs(self.signature, arguments, self.device, self._fractions, self._formulas)

    def _tell_cast(self, dtype: torch.dtype) -> None:
        if torch.compiler.is_compiling() or dtype in self._casts:
            return
        self._casts.add(dtype)
        warnings.warn(
            f"the quantized denoiser computes in {self.dtype}: its inputs are cast from {dtype}, and its answer back;"
            " quantize a float denoiser of that dtype to avoid it",
            stacklevel=2,
        )

    def _run(self, tensors: list[Tensor]) -> Any:
        """The graph's answer, NaN where the call holds NaN; without rows, its shape."""
        if tensors[self.signature.names.index(self.signature.batch)].shape[0] == 0:
            return border.no_rows(self._in_own_dtype(border.stand_ins(tensors)))
        rows = border.not_finite(self.signature, tensors)
        return border.with_nan(self._in_own_dtype(tensors), rows)

    def _in_own_dtype(self, tensors: list[Tensor]) -> Any:
        """Autocast around a call would change dtypes inside of the graph, which says each of them."""
        kind = tensors[0].device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return self._answer(tensors)
        with torch.autocast(kind, enabled=False):
            return self._answer(tensors)

    def _answer(self, tensors: list[Tensor]) -> Any:
        """The graph's answer; of a graph that came from a file, errors say so."""
        run = self._runner(tensors)
        if self._guard is None or torch.compiler.is_compiling():
            return run(*tensors)
        program, folder = self._guard
        refuse_growth(program, tensors, folder)
        try:
            return run(*tensors)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
            shapes = {name: tuple(x.shape) for name, x in zip(self.signature.names, tensors, strict=True)}
            raise InvalidFile(
                f"the graph of {folder} fails on inputs {shapes}: {type(error).__name__}: {error}. Either a value is"
                " outside of what the model knows, such as a class or a position, or the file was edited"
            ) from error

    def _runner(self, tensors: list[Tensor]) -> Callable[..., Any]:
        """The graph, or the same with gradients where an input asks for them."""
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self.graph_module
        if torch.compiler.is_compiling() or has_opaque_operators(self.graph_module):
            raise TypeError(
                f"an input requires a gradient, and integer kernels ({self.backend}) or a compiled graph pass none:"
                " call under torch.no_grad(), or convert(prepared, 'reference'), uncompiled, which passes gradients"
                " straight through"
            )
        return StraightThrough(self.graph_module).run

    def extra_repr(self) -> str:
        """Recipe, backend and how many layers are quantized."""
        return (
            f"recipe={self.recipe.name}, backend={self.backend}, layers={len(self.records)}/{len(self.plan)} quantized"
        )
