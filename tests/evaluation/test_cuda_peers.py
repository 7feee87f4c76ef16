"""What others run on GPUs: the copy is in bfloat16, the denoiser stays as it is; what runs on a CPU too is run."""

import copy

import pytest
import torch
from plain import relative
from torch import Tensor, nn

from dmq_ao.benchmarks.cuda_peers import COMPILED_BF16, CUDA_PEERS
from dmq_ao.benchmarks.peer_benchmark import peers_on
from dmq_ao.benchmarks.peer_table import peer_rows
from dmq_ao.benchmarks.peers import chosen_peers

ON_A_CPU_TOO = {"CUDA bf16": 0.02, "CUDA bf16 compiled": 0.02, "CUDA torchao int8 weights": 0.05}


@pytest.mark.parametrize("name", ON_A_CPU_TOO)
def test_a_peer_computes_what_the_denoiser_does(
    name: str, tiny_dit: tuple[nn.Module, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # its compiler is not what is tested
    net, inputs = tiny_dit
    state = copy.deepcopy(net.state_dict())
    artifact = CUDA_PEERS[name].build(net, inputs, [inputs])
    result = artifact.compile()(**inputs)
    with torch.no_grad():
        assert relative(result, net(**inputs)[0]) < ON_A_CPU_TOO[name]
    assert result.dtype == torch.float32
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_sizes_are_those_of_the_numbers(tiny_dit: tuple[nn.Module, dict[str, Tensor]]) -> None:
    net, inputs = tiny_dit
    count = sum(tensor.numel() for tensor in net.state_dict().values())
    halves, bytes_ = (CUDA_PEERS[name].build(net, inputs, []).file_bytes for name in list(ON_A_CPU_TOO)[1:])
    assert halves == 2 * count
    assert bytes_ < halves


def test_each_device_has_peers_of_its_own() -> None:
    on_gpu = peers_on(torch.device("cuda"))
    assert on_gpu is CUDA_PEERS
    assert not set(on_gpu) & set(peers_on(torch.device("cpu")))
    assert chosen_peers(["*torchao int8*"], on_gpu) == ["CUDA torchao int8 dynamic", "CUDA torchao int8 weights"]


def test_a_table_of_a_gpu_is_relative_to_compiled_bfloat16() -> None:
    timed = {"p10_ms": 1.0, "p90_ms": 3.0}
    rows = {
        "ours": {**timed, "median_ms": 1.0, "device_bytes": 2**20},
        COMPILED_BF16: {**timed, "median_ms": 2.0, "device_bytes": 2**22},
    }
    heading, slow, fast = peer_rows({"rows": rows, "macs": None, "int8_peak": None})
    place = heading.index("compiled bf16 / this")
    assert (slow[0], slow[place], fast[place]) == (COMPILED_BF16, "1.00", "2.00")
    assert (slow[heading.index("GPU MiB")], fast[heading.index("GPU MiB")]) == ("4", "1")
    assert "compiled fp32 / this" not in heading
