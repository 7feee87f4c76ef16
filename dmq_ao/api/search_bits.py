"""The verb ``search_bits``: a width for each output channel, under a mean of bits or the bytes of a saved folder."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch.fx import GraphModule
from tqdm.auto import tqdm

from dmq_ao.api import arguments
from dmq_ao.api.stored_size import StoredSize
from dmq_ao.config import BitAllocation
from dmq_ao.mixed_precision.bit_plan import BitPlan
from dmq_ao.mixed_precision.search_bits import find_bits
from dmq_ao.quantizer.prepared import observers, require_prepared, state_of
from dmq_ao.samples import CalibrationSet

# More of the weights than this in float is worth a warning.
FLOAT_SHARE = 0.05


def search_bits(
    prepared: GraphModule,
    samples: CalibrationSet,
    *,
    mean_bits: float | None = None,
    max_bytes: int | None = None,
    allocation: BitAllocation | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> BitPlan:
    """A width for each output channel of every quantized layer, to look at, edit, save and pass to ``calibrate``.

    Args:
        prepared: from ``dmq_ao.prepare``.
        samples: from ``dmq_ao.record``.
        mean_bits: budget: mean width of the codes of the layers that share bits, which are those that the recipe does
            not give a byte; the recipe's own width by default.
        max_bytes: budget instead: all files that ``dmq_ao.save`` writes: codes, scales, floats, graph, checksums and
            names. It is met from below, within three in a hundred where the widths allow.
        allocation: how; ``BitAllocation()``, or that of the recipe, by default.
        batch_size: rows per forward pass.
        progress: show a progress bar.

    Raises:
        TypeError: when ``prepared`` is not prepared, or ``samples`` are no calibration set.
        ValueError: for two budgets, one that cannot be met, or non-finite weights or inputs, naming the layer; for
            samples that lack an argument, or are of other sizes.

    Warns:
        UserWarning: naming the layers, when more than 5 % of the weights stay in float.
    """
    recipe = require_prepared(prepared, "search_bits").recipe
    arguments.check_samples(samples, "search_bits")
    if mean_bits is not None and max_bytes is not None:
        raise ValueError(f"give mean_bits or max_bytes, not both; got {mean_bits} and {max_bytes}")
    config = allocation or recipe.allocation or BitAllocation()
    if mean_bits is not None or max_bytes is not None:
        config = replace(config, mean_bits=mean_bits)
    budget = None if max_bytes is None else StoredSize(prepared, len(samples.timesteps)).budget(max_bytes)
    with tqdm(total=len(observers(prepared)), disable=not progress, unit="layer", desc="bits") as bar:
        plan = find_bits(prepared, samples, config, batch_size=batch_size, bar=bar, budget=budget)
    _warn_of_float(prepared)
    return plan


def _warn_of_float(prepared: GraphModule) -> None:
    plan = state_of(prepared).plan
    in_float = {item.name: item.numel for item in plan.values() if item.weight is None and item.numel}
    share = sum(in_float.values()) / max(1, sum(item.numel for item in plan.values()))
    if share > FLOAT_SHARE:
        names = sorted(in_float, key=in_float.__getitem__, reverse=True)
        warnings.warn(
            f"{share:.0%} of the weights stay in float, so the mean of all is far above that of the codes: "
            + ", ".join(names),
            UserWarning,
            stacklevel=3,
        )
