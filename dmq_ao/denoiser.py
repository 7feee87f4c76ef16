"""The quantized denoiser: a graph behind the signature of the model it came from."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dmq_ao.config import InvalidFile, Recipe
from dmq_ao.graph import PREFIX, Signature, size_rules
from dmq_ao.graph.arguments import flatten_inputs
from dmq_ao.records import Kernel, LayerPlan, LayerRecord, outline
from dmq_ao.serialization.graph import StoredGraph
from dmq_ao.serialization.trial import Program, refuse_growth


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what the tensors are stored in; opaque ones of oneDNN do not tell, their elements are counted."""
    sizes = {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors_of(record: LayerRecord) -> Iterator[Tensor]:
    parts = (record.weight, record.activation, record)
    values = chain.from_iterable(vars(part).values() for part in parts if part is not None)
    return (value for value in values if isinstance(value, Tensor))


class QuantizedDenoiser(nn.Module):
    """Calls like the denoiser it was made from, runs integers.

    The forward signature, the return type, ``config``, ``dtype`` and other attributes are those of the original;
    ``records`` (by layer name), ``plan``, ``kernels``, ``recipe`` and ``backend`` say what was done to it, ``merged``
    which layers were copies of which.
    """

    def __init__(
        self,
        gm: GraphModule,
        signature: Signature,
        skeleton: nn.Module,
        recipe: Recipe,
        plan: Mapping[str, LayerPlan],
        records: Mapping[str, LayerRecord],
        kernels: Mapping[str, Kernel],
        backend: str,
        float_tensors: Mapping[str, Tensor],
        sqnr_db: Mapping[str, float],
        merged: Mapping[str, str],
        stored_graph: StoredGraph | None,
    ) -> None:
        """Wrap a lowered graph; made by ``dmq_ao.convert`` and ``dmq_ao.load``."""
        super().__init__()
        self.graph_module = gm
        self.signature, self.recipe, self.backend = signature, recipe, backend
        self.plan, self.records, self.kernels = dict(plan), records, dict(kernels)
        self.sqnr_db, self.merged = dict(sqnr_db), dict(merged)
        # Not a submodule: it has no bytes, only names, shapes and config to answer for the original model.
        self.__dict__["skeleton"] = skeleton
        self.__dict__["float_tensors"] = dict(float_tensors)
        self.stored_graph = stored_graph
        self._guard: tuple[Program, str] | None = None
        self.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original model (``config``, ``add_embedding`` ...), as far as they hold no tensors."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "skeleton":
                raise
            return getattr(self.__dict__["skeleton"], name)

    def guard(self, program: Program, folder: str | Path) -> None:
        """Try inputs of new sizes before they are run, and name the folder in errors: the graph is of a file."""
        self._guard = program, str(folder)

    def layer_reports(self) -> list[dict[str, Any]]:
        """One row a layer: kept or quantized, bits, kernel, output SQNR in dB on calibration samples, and why."""
        return [self._layer_report(item) for item in self.plan.values()]

    def _layer_report(self, item: LayerPlan) -> dict[str, Any]:
        kernel = self.kernels.get(item.name, Kernel("float"))
        bits: float = self.float_bits if item.weight is None else item.weight.bits
        input_bits = self.float_bits if item.activation is None else item.activation.bits
        widths = {}
        if item.name in self.records:
            record = outline(self.records, item.name)
            input_bits = input_bits if record.activation is None else record.activation.bits
            if record.weight.channel_bits is not None:
                bits = round(record.weight.mean_bits, 2)
                widths = {"channels_by_bits": {str(width): count for width, count in record.weight.segments}}
        return {
            "name": item.name,
            "kind": item.kind,
            "status": "float" if item.weight is None else "quantized",
            "weight_bits": bits,
            **widths,
            "activation_bits": input_bits,
            "kernel": kernel.name,
            "sqnr_db": self.sqnr_db.get(item.name),
            "why": item.why or kernel.why,
        }

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
        return _bytes(self._graph_tensors())

    @property
    def resident_bytes(self) -> int:
        """``graph_bytes`` and those of the records, from which ``save`` writes; what they share is counted once.

        Records of a loaded denoiser stay in its file, and take none.
        """
        held = self.records.values() if isinstance(self.records, dict) else ()
        kept = (tensor for record in held for tensor in _tensors_of(record))
        return _bytes(chain(self._graph_tensors(), self.float_tensors.values(), kept))

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
        return next(chain(self.graph_module.buffers(), self.graph_module.parameters())).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedDenoiser:
        """What ``to``, ``half``, ``cuda`` and the like end in: kernels and codes are made for one dtype and device.

        Raises:
            TypeError: for another dtype or device than it has.
        """
        del recurse
        moved = fn(torch.zeros(1, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype or moved.device != self.device:
            raise TypeError(
                f"a quantized denoiser stays {self.dtype} on {self.device}, asked for {moved.dtype} on {moved.device};"
                " quantize a float denoiser of that dtype on that device instead"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedDenoiser:
        """A copy that shares the prepacked weights: they are oneDNN's, which cannot copy them, and never change."""
        memo |= {id(tensor): tensor for tensor in self.graph_module.buffers() if tensor.is_mkldnn}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not here: ``dmq_ao.save`` writes a quantized denoiser.

        Raises:
            TypeError: always, with the call to use.
        """
        del args, kwargs
        raise TypeError("a quantized denoiser is written by dmq_ao.save(denoiser, folder)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Denoise; arguments as for the original model.

        Raises:
            TypeError: for a missing or unknown argument, one of another dtype, or one that was constant in the
                exported graph and differs.
            ValueError: for shapes that the exported graph does not take, or a fractional timestep where it takes
                whole ones.
            InvalidFile: for values or sizes that the graph of a file fails on.
        """
        signature = self.signature
        # Positionals too: ``forward(sample, timestep, None, ..., False)`` is how some pipelines call.
        arguments = dict(zip(signature.parameters, args, strict=False)) | kwargs
        as_class = signature.return_type is not None and arguments.pop("return_dict", True)
        tensors = self._tensors(arguments)
        if not torch.compiler.is_compiling():  # there, each rule would be one more guard to check in every call
            self._check_sizes(tensors)
        result = self._run(tensors)
        values = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if signature.answer is not None and (as_class or signature.return_type is None):
            return signature.answer.built(values)
        if as_class and signature.return_type is not None:
            return signature.return_type(*values)
        return values if signature.returns_tuple else result

    def _run(self, tensors: list[Any]) -> Any:
        """The graph's answer; of a graph that came from a file, errors say so."""
        if self._guard is None or torch.compiler.is_compiling():
            return self.graph_module(*tensors)
        program, folder = self._guard
        refuse_growth(program, tensors, folder)
        try:
            return self.graph_module(*tensors)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
            shapes = {name: tuple(x.shape) for name, x in zip(self.signature.names, tensors, strict=True)}
            raise InvalidFile(
                f"the graph of {folder} fails on inputs {shapes}: {type(error).__name__}: {error}. Either a value is"
                " outside of what the model knows, such as a class or a position, or the file was edited"
            ) from error

    def _tensors(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The graph's tensors, from arguments of the denoiser by name."""
        signature = self.signature
        flat = {name: value for name, value in flatten_inputs(arguments).items() if value is not None}
        flat.pop("return_dict", None)
        tensors: list[Any] = []
        for name in signature.names:
            if name not in flat:
                raise TypeError(f"missing argument {name!r}; this quantized denoiser takes {list(signature.names)}")
            value = flat.pop(name)
            timestep = name == signature.timestep
            tensors.append(self._timestep(value, flat, tensors) if timestep else self._checked(name, value))
        for name, value in flat.items():
            if name not in signature.constants:
                raise TypeError(
                    f"argument {name!r} was not among the example inputs, so the exported graph has no place for it;"
                    f" prepare again with it, or call with {list(signature.names)}"
                )
            if value != signature.constants[name]:
                raise TypeError(
                    f"argument {name!r} is {signature.constants[name]!r} in the exported graph, got {value!r};"
                    " prepare again with the value you need"
                )
        return tensors

    def _check_sizes(self, tensors: list[Any]) -> None:
        shapes = {name: tuple(x.shape) for name, x in zip(self.signature.names, tensors, strict=True)}
        rule = size_rules.broken(self.signature.rules, shapes)
        if rule is not None:
            example = {name: shape for name, (shape, _) in self.signature.example.items()}
            raise ValueError(size_rules.refusal(rule, shapes, example))

    def _checked(self, name: str, value: Any) -> Tensor:
        shape, dtype = self.signature.example[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"argument {name!r} must be a tensor, got {type(value).__name__} {value!r}")
        if value.dim() != len(shape):
            raise ValueError(f"argument {name!r} must have {len(shape)} dimensions, got shape {tuple(value.shape)}")
        if value.is_floating_point() and value.dtype != dtype:
            raise TypeError(
                f"argument {name!r} must be {dtype}, got {value.dtype}; cast it, or prepare with that dtype"
            )
        return value

    def _timestep(self, value: Any, later: dict[str, Any], earlier: list[Any]) -> Tensor:
        signature = self.signature
        batch = later.get(signature.batch)
        if batch is None:
            batch = earlier[signature.names.index(signature.batch)]
        self._checked(signature.batch, batch)
        dtype = signature.example[str(signature.timestep)][1]
        # A number stays a number to the compiler only through torch.full: as_tensor would compile for each timestep.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        timestep = (
            torch.full((), value, device=batch.device) if number else torch.as_tensor(value, device=batch.device)
        )
        if not timestep.is_floating_point() or not dtype.is_floating_point:
            given, timestep = timestep, timestep.to(dtype)
            if given.is_floating_point() and not torch.compiler.is_compiling() and bool((given != timestep).any()):
                raise ValueError(
                    f"argument {signature.timestep!r} must be whole, as in the example inputs, got {given.tolist()};"
                    " prepare again with samples of a sampler whose timesteps are fractions"
                )
        if signature.timestep_per_row and timestep.dim() == 0 or signature.timestep_per_row and timestep.shape[0] == 1:
            timestep = timestep.expand(batch.shape[0])
        return timestep

    def extra_repr(self) -> str:
        """Recipe, backend and how many layers are quantized."""
        return (
            f"recipe={self.recipe.name}, backend={self.backend}, layers={len(self.records)}/{len(self.plan)} quantized"
        )
