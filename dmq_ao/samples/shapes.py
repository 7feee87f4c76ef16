"""The sizes that a denoiser is called with while it is recorded: calls of other sizes have buckets of their own.

Resolution, frames and tokens of the prompt may change from call to call; names, dtypes and axes of the arguments may
not, nor may what has no batch axis within one bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dmq_ao.samples.call_arguments import is_same, own_copy
from dmq_ao.samples.values import Shared, describe, layout

SizesKey = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Bucket:
    """Calls of one shape.

    Attributes:
        number: in the order that the buckets were first seen in.
        layouts: of each argument, as text.
        shared: arguments without a batch axis, by name.
    """

    number: int
    layouts: dict[str, str]
    shared: dict[str, Shared]


class CallShapes:
    """The buckets of a recording."""

    def __init__(self) -> None:
        """No call was seen yet."""
        self.buckets: dict[SizesKey, Bucket] = {}

    @property
    def shared_names(self) -> frozenset[str]:
        """Names of the arguments that have no batch axis; they have none in any call."""
        return frozenset(name for bucket in self.buckets.values() for name in bucket.shared)

    def place(self, inputs: Mapping[str, Tensor], shared: Mapping[str, Shared], call: str) -> int:
        """Number of the bucket that a call belongs to.

        Args:
            inputs: [B, ...] with a row for each sample.
            shared: the other arguments.
            call: what to name the call in an error.

        Raises:
            ValueError: for a call that goes with no earlier one, saying what to do.
        """
        layouts = {name: layout(value, per_row=name in inputs) for name, value in {**inputs, **shared}.items()}
        key = _sizes_key(inputs, shared)
        if key not in self.buckets:
            for first in list(self.buckets.values())[:1]:
                self._check_alike(first, layouts, inputs, shared, call)
            own = {name: own_copy(value) for name, value in shared.items()}
            self.buckets[key] = Bucket(len(self.buckets), layouts, own)
        bucket = self.buckets[key]
        _check_layouts(bucket.layouts, layouts, call)
        for name, value in shared.items():
            _check_same(name, value, bucket.shared[name], call)
        return bucket.number

    @staticmethod
    def _check_alike(
        first: Bucket,
        layouts: Mapping[str, str],
        inputs: Mapping[str, Tensor],
        shared: Mapping[str, Shared],
        call: str,
    ) -> None:
        """Refuse a call that differs from the first bucket by more than sizes."""
        _check_same_names(first.layouts, layouts, call)
        for name, value in {**inputs, **shared}.items():
            if not isinstance(value, Tensor):
                _check_layouts({name: first.layouts[name]}, {name: layouts[name]}, call)
                _check_same(name, value, first.shared[name], call)
            elif _axes_and_dtype(layouts[name]) != _axes_and_dtype(first.layouts[name]):
                raise _other_layout(name, layouts[name], first.layouts[name], call)


def _sizes_key(inputs: Mapping[str, Tensor], shared: Mapping[str, Shared]) -> SizesKey:
    sizes = {name: tuple(value.shape[1:]) for name, value in inputs.items()}
    sizes |= {name: tuple(value.shape) for name, value in shared.items() if isinstance(value, Tensor)}
    return tuple(sorted(sizes.items()))


def _axes_and_dtype(words: str) -> tuple[int, str]:
    """Number of axes, and what stands behind the sizes: dtype, with or without a batch axis."""
    sizes, _, rest = words.partition("]")
    return len([one for one in sizes.strip("[").split(",") if one.strip()]), rest


def _check_same_names(earlier: Mapping[str, str], layouts: Mapping[str, str], call: str) -> None:
    if layouts.keys() != earlier.keys():
        more, less = (sorted(a.keys() - b.keys()) for a, b in ((layouts, earlier), (earlier, layouts)))
        raise ValueError(
            f"{call} has the arguments {sorted(layouts)}, earlier ones {sorted(earlier)}: {more or 'none'}"
            f" came and {less or 'none'} went; a quantized denoiser takes the arguments it was recorded with, so"
            " record loops that pass different arguments separately"
        )


def _check_layouts(earlier: Mapping[str, str], layouts: Mapping[str, str], call: str) -> None:
    _check_same_names(earlier, layouts, call)
    for name, now in layouts.items():
        if now != earlier[name]:
            raise _other_layout(name, now, earlier[name], call)


def _other_layout(name: str, now: str, before: str, call: str) -> ValueError:
    return ValueError(
        f"{name} is {now} in {call}, and was {before} in earlier ones; sizes may differ, the number of axes, the batch"
        " axis and the dtype may not: record these calls separately"
    )


def _check_same(name: str, value: Shared, earlier: Shared, call: str) -> None:
    if not is_same(value, earlier):
        raise ValueError(
            f"{name} has no batch axis, so it must stay the same, but {call} changed it from"
            f" {describe(earlier)} to {describe(value)}; pass it as a tensor [batch, ...], or"
            " record one value at a time"
        )
