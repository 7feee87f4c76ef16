"""GELU as a sigmoid is GELU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import symbolic_trace

from dmq_ao.passes import fast_gelu

aten = torch.ops.aten


@given(st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_gelu(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value], dtype=dtype)
    found = torch.ops.dmq_ao.gelu_tanh(x)
    assert found.dtype == dtype
    expected = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_only_the_tanh_formula_is_replaced(approximate: str) -> None:
    gm = symbolic_trace(lambda x: aten.gelu.default(x, approximate=approximate) + 1)
    fast_gelu(gm)
    x = torch.randn(50)
    torch.testing.assert_close(gm(x), F.gelu(x, approximate=approximate) + 1)
    assert any("gelu_tanh" in str(node.target) for node in gm.graph.nodes) == (approximate == "tanh")


def test_a_gradient_passes() -> None:
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.ops.dmq_ao.gelu_tanh(x.float()).double(), x, eps=1e-3, atol=1e-2)
