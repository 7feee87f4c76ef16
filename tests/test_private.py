"""What is asked of PyTorch by private names: the answers, and those of releases that have other names."""

import copy

import pytest
import torch
from torch import nn

from dmq_ao.graph import private

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("instructions", "older"),
    [
        ("avx512_vnni", "_is_vnni_supported"),
        ("avx512_bf16", "_is_avx512_bf16_supported"),
        ("amx_tile", "_is_amx_tile_supported"),
    ],
)
@pytest.mark.parametrize("answer", [True, False])
def test_instructions_are_asked_for_in_two_ways(
    instructions: str, older: str, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: answer})
    assert private.cpu_has(instructions) is answer
    assert private.cpu_has("another") is False
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, older, lambda: answer)
    assert private.cpu_has(instructions) is answer
    monkeypatch.delattr(torch.cpu, older)
    assert private.cpu_has(instructions) is False
    assert private.cpu_has("another") is False


def test_operators_have_schemas_and_functions_have_none() -> None:
    assert [one.name for one in private.operator_arguments(aten.relu.default)] == ["self"]
    assert private.mutates_arguments(aten.relu_.default)
    assert not private.mutates_arguments(aten.relu.default)
    for other in (torch.relu, "aten.relu_", None):
        assert private.schema_of(other) is None
        assert private.operator_arguments(other) == []
        assert not private.mutates_arguments(other)


def test_one_module_under_two_names_is_two_children() -> None:
    shared = nn.Linear(1, 1)
    pair = nn.ModuleDict({"a": shared, "b": shared})
    assert set(private.children(pair)) == {"a", "b"}
    assert len(dict(pair.named_children())) == 1


def test_a_copy_with_another_child_leaves_the_first_alone() -> None:
    first = nn.Sequential(nn.Linear(1, 1))
    second = copy.copy(first)
    private.replace_child(second, "0", nn.ReLU())
    assert (type(first[0]), type(second[0])) == (nn.Linear, nn.ReLU)


def test_what_torch_compile_wrapped_is_found_again() -> None:
    module = nn.Linear(1, 1)
    assert private.uncompiled(torch.compile(module)) is module
    assert private.uncompiled(module) is module


def test_an_answer_is_taken_apart_as_export_puts_it_together() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": x + 1, "b": (x, x * 2)}

    gm = torch.export.export(Two(), (torch.ones(2),)).module()
    assert private.answer_spec(gm).num_leaves == 3
    assert private.leaves({"a": 1, "b": (2, [3])}) == [1, 2, 3]
    assert private.answer_spec(torch.fx.symbolic_trace(nn.ReLU())) is None


def test_sums_of_int8_are_exact() -> None:
    left, right = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((32, 64), (64, 16)))
    assert torch.equal(private.int_mm(left, right).long(), left.long() @ right.long())
