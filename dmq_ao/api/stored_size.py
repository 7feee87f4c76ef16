"""How many bytes ``save`` will write for a prepared denoiser: known by writing one like it, before calibration."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dmq_ao import graph, numerics
from dmq_ao.api.quantize import convert
from dmq_ao.api.saving import contents
from dmq_ao.backends.reference import Reference
from dmq_ao.config import Ranges, TensorConfig
from dmq_ao.evaluation import folder_bytes
from dmq_ao.graph.values import VAL
from dmq_ao.observers import ActivationObserver
from dmq_ao.quantizer.prepared import float_weight, observers, state_of, weight_observers
from dmq_ao.records import ActivationRecord, LayerPlan, WeightRecord
from dmq_ao.serialization import folder as model_folder

# JSON writes a float with up to so many digits; one of the longest.
_LONG_FLOAT = -12.345678901234567
# What the override of a protected layer takes in the recipe of ``config.json``, in bytes.
_OVERRIDE_BYTES = 900


class StoredSize:
    """Bytes of the folder of a prepared denoiser, by the widths of its output channels.

    A copy is converted with codes of zero and with all tensors that calibration may add, and written again for each
    choice of widths: graph, names, checksums and headers are counted as they will be, and floats at their longest.
    """

    def __init__(self, prepared: GraphModule, steps: int) -> None:
        """Convert the copy; ``steps`` is the number of rows of ranges per timestep."""
        shared = {id(tensor): tensor for tensor in [*prepared.parameters(), *prepared.buffers()]}
        trial = copy.deepcopy(prepared, dict(shared))
        state = state_of(trial)
        state.incomplete = False
        self.layers = dict.fromkeys(observers(trial))
        state.sqnr_db = dict.fromkeys(self.layers, _LONG_FLOAT)
        _fill(trial, steps)
        self.contents = contents(convert(trial, Reference.name))
        self._protected = _most_protected(trial) * _OVERRIDE_BYTES

    def bytes(self, widths: Mapping[str, Tensor]) -> int:
        """Of a folder where the output channels of layers have these widths [out]."""
        records = dict(self.contents.records)
        for name, channel_bits in widths.items():
            weight = records[name].weight
            bits = channel_bits.to(torch.uint8)
            records[name] = replace(records[name], weight=replace(weight, bits=int(bits.max()), channel_bits=bits))
        with tempfile.TemporaryDirectory() as temporary:
            model_folder.write(replace(self.contents, records=records), temporary)
            return folder_bytes(Path(temporary)) + self._protected

    def budget(self, max_bytes: int) -> Callable[[Mapping[str, Tensor]], int]:
        """Bits that a folder of so many bytes leaves to the codes of all layers, by their channels' widths [out]."""

        def bits_for_codes(widths: Mapping[str, Tensor]) -> int:
            codes = 0
            for name in self.layers:
                weight = self.contents.records[name].weight
                count = weight.codes[0].numel()
                own = widths.get(name)
                codes += count * (int(own.sum()) if own is not None else weight.bits * len(weight.codes))
            return 8 * (max_bytes - self.bytes(widths)) + codes

        return bits_for_codes


def _fill(trial: GraphModule, steps: int) -> None:
    """Decide everything, as calibration would: codes of zero, as many ranges, exponents and biases as there may be."""
    state, nodes = state_of(trial), graph.layer_nodes(trial)
    products = observers(trial)
    for name, weight in weight_observers(trial).items():
        values = float_weight(trial, nodes[name])
        bias = torch.zeros(len(values)) if state.recipe.bias_correction and name in products else None
        weight.restore(_zero_codes(values, weight.config), bias)
    for name, (_, activation) in products.items():
        if activation is not None:
            watcher = nodes[name].args[0]
            assert isinstance(watcher, Node)
            source = watcher.args[0]  # the observer's own node says nothing of its value
            assert isinstance(source, Node)
            channels = int(source.meta[VAL].shape[activation.ch_axis])
            activation.restore(_unit_ranges(state.plan[name], activation, channels, steps, name in state.scaled))


def _zero_codes(weight: Tensor, config: TensorConfig) -> WeightRecord:
    groups = 1 if config.group_size is None else weight[0].numel() // config.group_size
    codes = torch.zeros(weight.shape, dtype=numerics.code_dtype(config.symmetric, config.float8))
    scale = torch.ones(len(weight), groups)
    zero_point = (0 if config.symmetric else 1) * torch.ones(
        len(weight), groups
    )  # codes of every width, of one bit too
    return WeightRecord(config.bits, config.symmetric, codes, scale, zero_point.int())


def _unit_ranges(
    item: LayerPlan, activation: ActivationObserver, channels: int, steps: int, scaled: bool
) -> ActivationRecord:
    config, votes = activation.config, item.power_of_two
    rows = {Ranges.STATIC: 1, Ranges.PER_STEP: steps, Ranges.DYNAMIC: 0}[config.ranges]
    own = (steps, channels) if votes is not None and votes.per_step else (channels,)
    return ActivationRecord(
        bits=config.bits,
        ch_axis=activation.ch_axis,
        ranges=config.ranges,
        scale=torch.ones(rows),
        zero_point=torch.zeros(rows, dtype=torch.int32),
        timesteps=torch.arange(steps - 1, -1, -1).float() if config.ranges is Ranges.PER_STEP else None,
        exponents=None if votes is None else torch.zeros(own, dtype=torch.int8),
        channel_scale=torch.ones(channels) if scaled else None,
        float8=config.float8,
    )


def _most_protected(trial: GraphModule) -> int:
    """How many layers protection may give more bits at most: the smallest, as long as their weights fit its share."""
    state = state_of(trial)
    if state.recipe.protection is None:
        return 0
    left = state.recipe.protection.share * sum(item.numel for item in state.plan.values())
    sizes = sorted(state.plan[name].numel for name in observers(trial))
    return sum(total <= left for total in accumulate(sizes))
