"""Where a denoiser's features are taken: its deepest block, found by what its modules give, or one that is named."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MAX_POSITIONS = 256


def find_tap(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> str:
    """Path of the module whose output stands for what the denoiser sees at a timestep.

    Among the modules that hold two weights or more and give a tensor with a row for each sample: of those that give
    maps, the ones with the fewest positions, where they have fewer than others; else those with the commonest number
    of tokens, which are the sample's. Of these, the middle one in order of computation.

    The denoiser is called once, without gradient; the random numbers of the CPU stay as they were.

    Args:
        denoiser: in the state it is sampled in.
        args: of one call.
        kwargs: of the same call.
        batch: rows of that call.

    Raises:
        ValueError: where no module gives such a tensor.
    """
    shapes: list[tuple[str, torch.Size]] = []
    handles = [
        module.register_forward_hook(_noting(shapes, name, batch))
        for name, module in denoiser.named_modules()
        if name and sum(p.dim() > 1 for p in module.parameters()) >= 2
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            denoiser.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return _deepest(shapes, type(denoiser).__name__)


def _noting(shapes: list[tuple[str, torch.Size]], name: str, batch: int) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensor = main_tensor(output)
        if tensor is not None and tensor.dim() >= 3 and len(tensor) == batch:
            shapes.append((name, tensor.shape))

    return note


def _deepest(shapes: list[tuple[str, torch.Size]], of: str) -> str:
    maps = [(name, shape[2:].numel()) for name, shape in shapes if len(shape) > 3]
    tokens = [(name, shape[1]) for name, shape in shapes if len(shape) == 3]
    fewest = min((count for _, count in maps), default=0)
    if len({count for _, count in maps}) > 1 or not tokens:
        names = [name for name, count in maps if count == fewest]
    else:
        commonest = Counter(count for _, count in tokens).most_common(1)[0][0]
        names = [name for name, count in tokens if count == commonest]
    if not names:
        raise ValueError(
            f"no block of {of} gives a tensor [batch, channels, ...] or [batch, tokens, channels] to tell its"
            " timesteps apart by; name a module with Selection(tap=...), or use select='uniform'"
        )
    return names[len(names) // 2]


def main_tensor(output: Any) -> Tensor | None:
    """The floating tensor [B, ...] that a module gives; of several the last: text comes before a sample's tokens."""
    outputs = output if isinstance(output, (tuple, list)) else [output]
    tensors = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
    return tensors[-1] if tensors else None


def as_features(output: Any, tap: str, rows: int) -> Tensor:
    """A module's output as features [rows, positions, channels] float32 on the CPU, at some positions of each row.

    Raises:
        ValueError: for an output that is no floating tensor [batch, ...].
    """
    tensor = main_tensor(output)
    if tensor is None or tensor.dim() < 2:
        raise ValueError(f"{tap} gives no floating tensor [batch, ...]; name another module with Selection(tap=...)")
    tensor = tensor.detach()[:rows]
    flat = tensor if tensor.dim() == 3 else tensor.flatten(2).transpose(1, 2) if tensor.dim() > 3 else tensor[:, None]
    stride = -(-flat.shape[1] // MAX_POSITIONS)
    return flat[:, ::stride].float().cpu().clone()


def hook_tap(denoiser: nn.Module, tap: str, see: Callable[[Any], None]) -> RemovableHandle:
    """Show ``see`` every output of the module at path ``tap``.

    Raises:
        ValueError: for a path that is no module, naming close ones.
    """
    modules = dict(denoiser.named_modules())
    if tap not in modules:
        close = difflib.get_close_matches(tap, modules, n=5, cutoff=0.4)
        raise ValueError(f"tap {tap!r} is no module of {type(denoiser).__name__}; close ones are {close}")
    handle: RemovableHandle = modules[tap].register_forward_hook(lambda module, args, output: see(output))
    return handle
