"""What a quantized denoiser says of itself: a row a layer, bytes in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from dmq_ao.records import Kernel, LayerPlan, LayerRecord, outline


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what ``tensors`` [...] are stored in; opaque ones of oneDNN do not tell, their elements are counted."""
    sizes = {}
    for tensor in tensors:
        if tensor.is_mkldnn:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def record_tensors(record: LayerRecord) -> Iterator[Tensor]:
    """Every tensor [...] of a record."""
    parts = (record.weight, record.activation, record)
    values = chain.from_iterable(vars(part).values() for part in parts if part is not None)
    return (value for value in values if isinstance(value, Tensor))


def layer_row(
    item: LayerPlan,
    records: Mapping[str, LayerRecord],
    kernel: Kernel,
    sqnr_db: float | None,
    float_bits: int,
) -> dict[str, Any]:
    """A layer's row of the report.

    Args:
        item: what the recipe did with it.
        records: of all layers.
        kernel: that multiplies it.
        sqnr_db: of its output, None where it was not measured.
        float_bits: of the model's own numbers.
    """
    bits: float = float_bits if item.weight is None else item.weight.bits
    input_bits = float_bits if item.activation is None else item.activation.bits
    widths = {}
    if item.name in records:
        record = outline(records, item.name)
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
        "sqnr_db": sqnr_db,
        "why": item.why or kernel.why,
    }
