"""Inputs that calls may leave out: residuals of a ControlNet, of which zeros are as if there were none."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import reseal
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.config import InvalidFile
from dmq_ao.graph import size_rules
from dmq_ao.samples.record import record

BOTH = ["down_block_additional_residuals", "mid_block_additional_residual"]
RECIPE = recipes.minmax("w8a8", ranges=dmq_ao.Ranges.STATIC)


def unet_call(batch: int, side: int, tokens: int = 7) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, tokens, 24),
    }


def residuals(batch: int, side: int) -> dict[str, Any]:
    half = side // 2
    downs = [(16, side), (16, side), (16, half), (32, half)]
    return {
        BOTH[0]: [torch.randn(batch, channels, size, size) for channels, size in downs],
        BOTH[1]: torch.randn(batch, 32, half, half),
    }


def quantized_with(net: nn.Module, inputs: dict[str, Any], optional: list[str], words: str = "") -> Any:
    with pytest.warns(UserWarning, match=words) if words else nullcontext():
        with record(net) as recorder, torch.no_grad():
            for _ in range(4):
                net(**inputs)
        samples = recorder.calibration_set()
    prepared = dmq_ao.prepare(net, RECIPE, samples.example(), backend="reference", optional=optional)
    dmq_ao.calibrate(prepared, samples, progress=False)
    return dmq_ao.convert(prepared, "reference")


def error_of(answer: Tensor, expected: Tensor) -> float:
    return float((answer - expected).detach().norm() / expected.detach().norm())


@pytest.fixture(scope="module")
def unet(tiny_unet2d_condition: tuple[nn.Module, dict[str, Tensor]]) -> nn.Module:
    return tiny_unet2d_condition[0]


@pytest.fixture(scope="module")
def quantized(unet: nn.Module) -> Any:
    torch.manual_seed(0)
    return quantized_with(unet, unet_call(2, 16) | residuals(2, 16), BOTH, "recorded with down_.*, mid_.*optional=")


@pytest.mark.parametrize(("batch", "side", "tokens"), [(2, 16, 7), (1, 16, 9), (3, 24, 7), (5, 8, 4)])
def test_a_call_may_leave_them_out(batch: int, side: int, tokens: int, unet: nn.Module, quantized: Any) -> None:
    call, more = unet_call(batch, side, tokens), residuals(batch, side)
    without, with_them = unet(**call).sample, unet(**call, **more).sample
    assert error_of(quantized(**call).sample, without) < 0.05
    assert error_of(quantized(**call, **dict.fromkeys(BOTH)).sample, without) < 0.05  # as pipelines pass None
    assert error_of(quantized(**call, **more).sample, with_them) < 0.05
    assert error_of(with_them, without) > 0.2


def test_some_of_them_are_refused(quantized: Any) -> None:
    call, more = unet_call(2, 16), residuals(2, 16)
    with pytest.raises(
        TypeError, match=r"missing argument 'mid_block_additional_residual': of the optional .* or none"
    ):
        quantized(**call, **{BOTH[0]: more[BOTH[0]]})
    with pytest.raises(TypeError, match=r"missing argument 'down_block_additional_residuals.3': of the optional"):
        quantized(**call, **{**more, BOTH[0]: more[BOTH[0]][:3]})
    with pytest.raises(TypeError, match=r"missing argument 'encoder_hidden_states'; .* record again without it"):
        quantized(call["sample"], call["timestep"])


def test_a_folder_keeps_them_optional(quantized: Any, tmp_path: Path) -> None:
    dmq_ao.save(quantized, tmp_path / "out")
    loaded, call = dmq_ao.load(tmp_path / "out", backend="reference"), unet_call(3, 8)
    assert torch.equal(loaded(**call).sample, quantized(**call).sample)
    assert loaded.signature.optional == quantized.signature.optional


def test_it_compiles(quantized: Any) -> None:
    call = unet_call(2, 16)
    run = torch.compile(quantized, backend="eager", fullgraph=True)
    assert torch.allclose(run(**call).sample, quantized(**call).sample, atol=1e-6)


class Adds(nn.Module):
    """Adds a hint [B, T + 1, 8] to what it computes of [B, T, 4], where one is given."""

    def __init__(self, needs: bool = False, bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.mid = nn.Linear(8, 8)
        self.needs, self.bias = needs, bias

    def forward(self, x: Tensor, t: Tensor, hint: Tensor | None = None, free: Tensor | None = None) -> Tensor:
        h = torch.cat([self.first(x), t.reshape(-1, 1, 1).expand(-1, 1, 8)], 1)
        if self.needs and hint is None:
            raise ValueError("the adapter is loaded, and there is no hint")
        if hint is not None:
            h = h + hint + self.bias
        if free is not None:
            h = h + free.mean(1, keepdim=True)
        return self.last(self.mid(torch.tanh(h)))


def adds_call(batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, tokens, 4), "t": torch.ones(batch), "hint": torch.randn(batch, tokens + 1, 8)}


@pytest.mark.parametrize("tokens", [5, 3, 9])
def test_sizes_follow_by_the_graphs_own_equations(tokens: int) -> None:
    net = Adds().eval()
    quantized = quantized_with(net, adds_call(), ["hint"])
    call = adds_call(3, tokens)
    del call["hint"]
    assert error_of(quantized(**call), net(**call)) < 0.05


@pytest.mark.parametrize(
    ("net", "optional", "words"),
    [
        (Adds(needs=True), ["hint"], "Adds fails without hint .*there is no hint.* record again without"),
        (Adds(bias=0.5), ["hint"], r"Adds without hint answers otherwise than with zeros there \(by 0\."),
        (Adds(), ["hints"], r"'hints' is none of the inputs that can be left out; the example inputs hold \['hint'"),
        (Adds(), ["x"], "'x' is none of the inputs that can be left out"),
        (Adds(), ["t"], "'t' is none of the inputs that can be left out"),
        (Adds(), ["free"], "the sizes of 'free' do not follow from those of the other inputs"),
    ],
)
def test_what_cannot_be_left_out_is_refused_at_once(net: nn.Module, optional: list[str], words: str) -> None:
    example = adds_call() | {"free": torch.randn(2, 7, 8)}
    with pytest.raises(ValueError, match=words):
        dmq_ao.prepare(net.eval(), RECIPE, example, optional=optional)


def test_without_the_option_the_call_says_what_to_do() -> None:
    quantized = quantized_with(Adds().eval(), adds_call(), [])
    call = adds_call()
    del call["hint"]
    with pytest.raises(
        TypeError, match=r"missing argument 'hint'; .* record again without it, or prepare\(..., optional"
    ):
        quantized(**call)
    quantized = quantized_with(Adds().eval(), call, [])
    with pytest.raises(
        TypeError, match="'hint' was not among the example inputs, .* record and prepare again with it"
    ):
        quantized(**adds_call())


def test_formulas_are_solved_through_each_other() -> None:
    rules = [
        "shape['a'][1] == 2*shape['b'][0]",
        "(1 + (((-1) + shape['x'][0]) // 2)) == shape['b'][0]",
        "shape['a'][0] == 4",
        "shape['x'][0] > 3",
        "shape['c'][0] == shape['c'][1]",
    ]
    formulas = size_rules.formulas(rules, {"a": 2, "b": 1, "c": 2})
    assert formulas.keys() == {"a", "b"}
    assert [formula({"x": (7,)}) for formula in formulas["a"]] == [4, 8]


@pytest.mark.parametrize("optional", [["sample"], ["timestep"], ["nobody"], ["encoder_hidden_states"]])
def test_a_file_cannot_make_another_input_optional(optional: list[str], quantized: Any, tmp_path: Path) -> None:
    _edit(quantized, tmp_path / "out", lambda call: call.update(optional=optional))
    with pytest.raises(InvalidFile, match=r"signature.optional"):
        dmq_ao.load(tmp_path / "out")


def test_a_file_cannot_ask_for_much_memory(quantized: Any, tmp_path: Path) -> None:
    grow = "shape['mid_block_additional_residual'][1] == 32 + 1000000000*(shape['sample'][2] - 16)"

    def edit(call: dict[str, Any]) -> None:
        mid = "shape['mid_block_additional_residual'][1] == 32"
        call["rules"] = [grow if rule == mid else rule for rule in call["rules"]]

    _edit(quantized, tmp_path / "out", edit)
    loaded = dmq_ao.load(tmp_path / "out", backend="reference")
    for side in (24, 8):
        with pytest.raises(ValueError, match="'mid_block_additional_residual' cannot be left out at these sizes"):
            loaded(**unet_call(2, side))


def _edit(quantized: Any, folder: Path, change: Any) -> None:
    """Change the signature in a folder, and make all checksums anew."""
    dmq_ao.save(quantized, folder)
    data = json.loads((folder / "graph.json").read_text())
    change(data["signature"])
    (folder / "graph.json").write_text(json.dumps(data))
    reseal(folder)
