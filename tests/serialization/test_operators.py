"""The operators that a file may name are pure, and are those that graphs of denoisers hold."""

from __future__ import annotations

import json
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import dmq_ao
from dmq_ao.graph.arguments import flatten_inputs
from dmq_ao.numerics import ops  # noqa: F401  registers our operators
from dmq_ao.recipes import minmax
from dmq_ao.serialization import operators

# Views share memory with what they show; of these, none takes a stride or a place in memory.
MAY_SHARE = (
    "alias broadcast_to chunk conj contiguous detach diagonal dsplit expand expand_as flatten hsplit imag moveaxis"
)
MAY_SHARE += (
    " movedim narrow numpy_T permute ravel real reshape reshape_as select slice split split_with_sizes squeeze"
)
MAY_SHARE += (
    " swapaxes swapdims t to transpose unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real"
)
# Draw only where told to, which ``check_call`` refuses.
TOLD_NOT_TO_DRAW = "dropout feature_dropout scaled_dot_product_attention"


def overload(name: str) -> torch._ops.OpOverload:
    namespace, packet, last = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), last)
    return found


@pytest.mark.parametrize("name", sorted(operators.ATEN | operators.OURS))
def test_an_operator_of_the_list_is_pure(name: str) -> None:
    operator, packet = overload(name), name.split(".")[1]
    schema = operator._schema
    assert not schema.is_mutable
    assert not any(argument.is_out for argument in schema.arguments)
    assert torch.Tag.nondeterministic_seeded not in operator.tags or packet in TOLD_NOT_TO_DRAW.split()
    if any(result.alias_info is not None for result in schema.returns):
        assert packet in MAY_SHARE.split()
    assert not {"strides", "storage_offset", "filename", "generator"} & {one.name for one in schema.arguments}
    assert not any(
        word in packet for word in ("empty", "resize", "storage", "file", "rand", "as_strided", "_alias", "set_")
    )


@pytest.mark.parametrize("name", ["aten.dropout.default", "aten.batch_norm.default", "aten.instance_norm.default"])
def test_an_operator_is_told_not_to_draw_or_remember(name: str) -> None:
    place, argument, wanted = operators._REQUIRED[name]
    operator = overload(name)
    names = [one.name for one in operator._schema.arguments]
    assert names[place] == argument
    args = [None] * place
    operators.check_call(name, operator, (*args, wanted), {})
    for value in (True, 1, 0.5, "tanh"):
        with pytest.raises(ValueError, match=argument):
            operators.check_call(name, operator, (*args, value), {})
        with pytest.raises(ValueError, match=argument):
            operators.check_call(name, operator, (*args[:1],), {argument: value})


def graph_operators(model: nn.Module, example: dict[str, Any]) -> set[str]:
    tensors = {key: x for key, x in flatten_inputs(example).items() if isinstance(x, Tensor)}
    tensors = {key: x for key, x in tensors.items() if x.dim() and len(x) == 2}
    time = tensors["timestep"]
    prepared = dmq_ao.prepare(model, minmax("w8a8"), example)
    fractions = time.is_floating_point()
    rows = {key: torch.cat([x] * 2) for key, x in tensors.items() if key != "timestep"}
    shared = {key: x for key, x in flatten_inputs(example).items() if key not in tensors and x is not None}
    times = torch.tensor([0.9, 0.9, 0.3, 0.3]) if fractions else torch.tensor([900, 900, 300, 300])
    samples = dmq_ao.CalibrationSet(rows, shared, times, torch.tensor([0, 0, 1, 1]))
    dmq_ao.calibrate(prepared, samples, progress=False)
    stored = dmq_ao.convert(prepared, "reference").stored_graph
    assert stored is not None
    return {node["target"] for node in json.loads(stored.text)["nodes"] if node["op"] == "call_function"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "wan" else pytest.mark.slow) for name in families.OWN]
)
def test_graphs_of_all_families_are_stored_in_operators_of_the_list(family: str) -> None:
    case = families.built(family)
    assert graph_operators(case.model, case.inputs(2, 2)) <= operators.ALLOWED
