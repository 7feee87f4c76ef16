"""A call of a quantized denoiser: its arguments become the graph's tensors, or an error names the one that cannot."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmq_ao.graph import Signature, size_rules
from dmq_ao.graph.arguments import flatten_inputs

RETURN_DICT = "return_dict"
_MOST_GROWTH = 16  # of an optional argument beside the sample, against the example: halves are rounded up


def named_arguments(
    signature: Signature, skeleton: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name.

    Positionals too: ``forward(sample, timestep, ..., False)`` is how some pipelines call.

    Raises:
        TypeError: for more positionals than the denoiser takes, an argument that is passed twice, or one that it does
            not have.
    """
    parameters = signature.parameters
    if len(args) > len(parameters):
        raise TypeError(
            f"the denoiser takes {len(parameters)} positional arguments, {list(parameters)}, got {len(args)}"
        )
    arguments = dict(zip(parameters, args, strict=False))
    twice = sorted(arguments.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"argument {twice[0]!r} was passed twice, by position and by name")
    roots = {name.partition(".")[0] for name in (*signature.names, *signature.constants)}
    unknown = sorted(kwargs.keys() - set(parameters) - roots)
    if unknown and not _takes_any(skeleton):
        raise TypeError(
            f"argument {unknown[0]!r} was not among the example inputs, and is none of the denoiser's, which are"
            f" {list(parameters)}"
        )
    return arguments | dict(kwargs)


def _takes_any(skeleton: nn.Module) -> bool:
    """Whether the denoiser has ``**kwargs``; one that was loaded by names and shapes alone has no code to tell."""
    kinds = {parameter.kind for parameter in inspect.signature(skeleton.forward).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def graph_inputs(
    signature: Signature,
    arguments: Mapping[str, Any],
    device: torch.device,
    fractions: bool,
    formulas: Mapping[str, Sequence[size_rules.Formula]] | None = None,
) -> list[Tensor]:
    """The graph's tensors [B, ...] in its order, in the dtypes that it was made for, from arguments by name.

    Args:
        signature: of the graph.
        arguments: of a call; None is as if left out.
        device: of the graph.
        fractions: whether a graph that was made with whole timesteps also takes fractions.
        formulas: sizes of optional arguments, from ``formulas_of``.

    Raises:
        TypeError: for a missing or unknown argument, one of another kind of dtype, or one that was constant in the
            exported graph and differs.
        ValueError: for another number of dimensions or device, or a fractional timestep where it must be whole.
    """
    flat = {name: value for name, value in flatten_inputs(arguments).items() if value is not None}
    flat.pop(RETURN_DICT, None)
    missing = [name for name in signature.names if name not in flat]
    if missing and (set(missing) != set(signature.optional) or signature.batch in missing):
        raise TypeError(_missing_text(signature, missing))
    values = {name: flat.pop(name) for name in signature.names if name in flat}
    _check_constants(signature, flat)
    sample = _checked(signature, signature.batch, values[signature.batch], device)
    tensors = []
    for name in signature.names:
        if name not in values:  # after all others are known to be tensors
            continue
        value = values[name]
        if name == signature.timestep:
            tensors.append(_timestep_rows(signature, value, sample, fractions))
        else:
            tensors.append(sample if name == signature.batch else _checked(signature, name, value, device))
    return _with_zeros(signature, dict(zip(values, tensors, strict=True)), formulas or {}) if missing else tensors


def _with_zeros(
    signature: Signature, tensors: Mapping[str, Tensor], formulas: Mapping[str, Sequence[size_rules.Formula]]
) -> list[Tensor]:
    """The graph's tensors [B, ...] in its order, zeros for those that were left out, as large as the others want."""
    shapes = {name: x.shape for name, x in tensors.items()}
    sample, filled = tensors[signature.batch], []
    for name in signature.names:
        if name in tensors:
            filled.append(tensors[name])
            continue
        shape = [formula(shapes) for formula in formulas[name]]
        if not torch.compiler.is_compiling():
            _check_growth(signature, name, shape, sample)
        filled.append(sample.new_zeros(shape, dtype=signature.example[name][1]))
    return filled


def _check_growth(signature: Signature, name: str, shape: Sequence[int], sample: Tensor) -> None:
    """Refuse zeros far larger than the sample wants: the rules may be a file's."""
    own, batch = (math.prod(signature.example[one][0]) for one in (name, signature.batch))
    if min(shape) < 0 or math.prod(shape) * batch > _MOST_GROWTH * max(1, own) * max(1, sample.numel()):
        raise ValueError(
            f"argument {name!r} cannot be left out at these sizes: the exported graph wants it to be {shape} beside"
            f" {signature.batch} {list(sample.shape)}; pass it"
        )


def formulas_of(signature: Signature) -> dict[str, tuple[size_rules.Formula, ...]]:
    """How the sizes of optional arguments follow from those of the others, by name, for every axis."""
    axes = {name: len(signature.example[name][0]) for name in signature.optional}
    return size_rules.formulas(signature.rules, axes)


def _missing_text(signature: Signature, missing: Sequence[str]) -> str:
    if signature.optional and set(missing) <= set(signature.optional):
        return f"missing argument {missing[0]!r}: of the optional {list(signature.optional)} give all, or none"
    return (
        f"missing argument {missing[0]!r}; this quantized denoiser takes {list(signature.names)}. Where the model"
        " can do without it (residuals of a ControlNet), record again without it, or prepare(..., optional=[...])"
    )


def _check_constants(signature: Signature, rest: Mapping[str, Any]) -> None:
    for name, value in rest.items():
        if name not in signature.constants:
            raise TypeError(
                f"argument {name!r} was not among the example inputs, so the exported graph has no place for it;"
                f" record and prepare again with it, or call with {list(signature.names)}"
            )
        if isinstance(value, Tensor) or value != signature.constants[name]:
            raise TypeError(
                f"argument {name!r} is {signature.constants[name]!r} in the exported graph, got {value!r};"
                " prepare again with the value you need"
            )


def check_sizes(signature: Signature, tensors: Sequence[Tensor]) -> None:
    """Refuse ``tensors`` [B, ...] of sizes that the exported graph does not take.

    Raises:
        ValueError: naming the rule that they break.
    """
    shapes = {name: tuple(x.shape) for name, x in zip(signature.names, tensors, strict=True)}
    rule = size_rules.broken(signature.rules, shapes)
    if rule is not None:
        example = {name: shape for name, (shape, _) in signature.example.items()}
        raise ValueError(size_rules.refusal_text(rule, shapes, example))


def _checked(signature: Signature, name: str, value: Any, device: torch.device) -> Tensor:
    shape, dtype = signature.example[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"argument {name!r} must be a tensor, got {type(value).__name__} {value!r}")
    if value.dim() != len(shape):
        raise ValueError(f"argument {name!r} must have {len(shape)} dimensions, got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"argument {name!r} is on {value.device}, the denoiser on {device}; move it there")
    if value.dtype == dtype or _kind(value.dtype) == _kind(dtype) == "integer":
        return value
    if _kind(dtype) == "floating" and _kind(value.dtype) in ("floating", "integer"):
        return value.to(dtype)
    raise TypeError(f"argument {name!r} must be {dtype}, got {value.dtype}; cast it, or prepare with that dtype")


def _kind(dtype: torch.dtype) -> str:
    """Within a kind, and from integers to floating numbers, a cast keeps what a tensor means."""
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "floating"
    return "bool" if dtype == torch.bool else "integer"


def _timestep_rows(signature: Signature, value: Any, sample: Tensor, fractions: bool) -> Tensor:
    name = str(signature.timestep)
    shape, dtype = signature.example[name]
    timestep = _as_tensor(name, value, dtype, sample.device)
    if dtype.is_floating_point:
        timestep = timestep.to(dtype)
    elif timestep.is_floating_point() and fractions:
        timestep = timestep.float()
    elif timestep.is_floating_point() and not _whole(timestep):
        raise ValueError(
            f"argument {name!r} must be whole, as in the example inputs, got {timestep.tolist()}: the denoiser looks"
            " it up in a table; use a sampler whose timesteps are whole, or record with this one"
        )
    else:
        timestep = timestep.to(dtype)
    if signature.timestep_per_row and (timestep.dim() == 0 or tuple(timestep.shape) == (1,)):
        timestep = timestep.expand(sample.shape[0])
    if timestep.dim() != len(shape):
        form = "a number for each row [B], or one for all" if signature.timestep_per_row else f"{len(shape)} axes"
        raise ValueError(f"argument {name!r} must have {form}, got shape {tuple(timestep.shape)}")
    return timestep


def _as_tensor(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"argument {name!r} must be a number or a tensor, got {type(value).__name__} {value!r}")
    # A number stays a number to the compiler only through torch.full: as_tensor would compile for each timestep. Its
    # dtype is said, for torch.set_default_dtype may be anything.
    if isinstance(value, float):
        return torch.full((), value, dtype=dtype if dtype.is_floating_point else torch.float32, device=device)
    return torch.full((), value, dtype=torch.int64, device=device)


def _whole(timestep: Tensor) -> bool:
    """Whether all are whole; taken for granted by the compiler, which cannot look."""
    return torch.compiler.is_compiling() or bool((timestep.isfinite() & (timestep == timestep.trunc())).all())


def dtype_of(arguments: Mapping[str, Any], name: str) -> torch.dtype:
    """Dtype of a tensor argument, by its dotted name."""
    value: Tensor = flatten_inputs(arguments)[name]
    return value.dtype
