"""Other tools: each computes what the float denoiser does, has a size, and is found by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain import Plain as Denoiser
from plain import plain_samples, relative, seeded

from dmq_ao.benchmarks import peers
from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.peer_benchmark import Case
from dmq_ao.benchmarks.peers import PEERS, MissingPackage, Peer, check_installed, chosen_peers

TOLERANCE = {"int8": 0.15, "fp32": 1e-5, "bf16": 0.02}  # by the first of these words in the name


@pytest.fixture(scope="module")
def case() -> Case:
    net = seeded(Denoiser)
    samples = plain_samples(net)
    return Case(net, first_rows(samples, 2), samples, samples, 2)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_the_denoiser_does(case: Case, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for package in PEERS[name].packages:
        pytest.importorskip(package)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # its compiler is not what is tested
    state = copy.deepcopy(case.net.state_dict())
    artifact = PEERS[name].build(case.net, case.inputs, case.calibration())
    result = artifact.compile()(**case.inputs)
    with torch.no_grad():
        expected = case.net(**case.inputs)
    assert result.dtype == torch.float32
    assert relative(result, expected) < next(value for word, value in TOLERANCE.items() if word in name)
    assert PEERS[name].integer == ("int8" in name)
    assert artifact.file_bytes > 0
    assert all(torch.equal(value, state[key]) for key, value in case.net.state_dict().items())


def test_sizes_are_those_of_the_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    count = sum(parameter.numel() for parameter in case.net.parameters())
    sizes = {
        name: PEERS[name].build(case.net, case.inputs, case.calibration()).file_bytes
        for name in ("torch fp32", "torch bf16", "torchao pt2e int8")
    }
    assert sizes["torch fp32"] == 4 * count
    assert sizes["torch bf16"] == 2 * count
    assert count < sizes["torchao pt2e int8"] < 2 * count


def test_nested_arguments_are_handed_over_by_position() -> None:
    inputs: dict[str, Any] = {"x": torch.ones(1), "more": {"y": torch.zeros(2), "flag": True}}
    assert {name: value.tolist() for name, value in peers._arrays(inputs).items()} == {"x": [1], "more.y": [0, 0]}


def test_peers_are_chosen_by_pattern_in_their_own_order() -> None:
    assert chosen_peers(["openvino fp32", "TORCH fp32*"]) == [
        "torch fp32",
        "torch fp32 compiled",
        "torch fp32 compiled, frozen",
        "OpenVINO fp32",
    ]
    assert chosen_peers(["*"]) == list(PEERS)
    assert chosen_peers([]) == []
    with pytest.raises(
        ValueError, match="'nonsense' matches no peer; the peers are 'torch fp32', .*ONNX Runtime int8"
    ):
        chosen_peers(["*", "nonsense"])


def test_what_is_not_installed_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, packages in {"OpenVINO fp32": ("no_one",), "ONNX Runtime int8": ("no_one", "no_two")}.items():
        monkeypatch.setitem(PEERS, name, Peer(PEERS[name].build, packages))
    check_installed(["torch fp32"])
    check_installed(["torch fp32", "OpenVINO fp32", "ONNX Runtime int8"])
    check_installed([])
    with pytest.raises(MissingPackage) as raised:
        check_installed(["OpenVINO fp32", "ONNX Runtime int8"])
    words = str(raised.value)
    assert words.startswith(
        "unavailable: 'OpenVINO fp32', 'ONNX Runtime int8' need no_one, no_two; install with: pip install"
    )
    assert 'pip install "dmq_ao[bench]"' in words
    assert "'torchao pt2e int8'" in words
