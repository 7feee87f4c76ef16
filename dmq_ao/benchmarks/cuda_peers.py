"""What others run on NVIDIA GPUs: PyTorch's compiled bfloat16, and torchao's integers and float8, compiled as hard.

As in ``peers``, each takes the float denoiser and makes what it would store. torchao quantizes linears; convolutions
stay in bfloat16, for which it has no kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dmq_ao.benchmarks.peers import Artifact, Inputs, Peer, bf16, narrow_call, narrowed

COMPILED_BF16 = "CUDA bf16 compiled"
_MODE = "max-autotune"  # times its kernels, and replays CUDA graphs


def torchao(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], *, config: str, **options: Any) -> Artifact:
    """Torchao's eager flow on a bfloat16 copy: ``quantize_`` with a configuration of its own, by name."""
    import torchao.quantization as quantization

    half = narrowed(net)
    quantization.quantize_(half, getattr(quantization, config)(**options))
    return Artifact(_stored_bytes(half), partial(narrow_call, half, True, _MODE))


def _stored_bytes(net: nn.Module) -> int:
    """Bytes of a model's tensors; those that are made of others count as these."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _plain(net.state_dict().values()))


def _plain(tensors: Iterable[Any]) -> Iterable[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain(getattr(tensor, name) for name in names)
        elif isinstance(tensor, Tensor):
            yield tensor


CUDA_PEERS: dict[str, Peer] = {
    "CUDA bf16": Peer(partial(bf16, compiled=False)),
    COMPILED_BF16: Peer(partial(bf16, compiled=True, mode=_MODE)),
    "CUDA torchao int8 dynamic": Peer(
        partial(torchao, config="Int8DynamicActivationInt8WeightConfig"), ("triton",), integer=True
    ),
    "CUDA torchao fp8 dynamic": Peer(partial(torchao, config="Float8DynamicActivationFloat8WeightConfig")),
    "CUDA torchao int8 weights": Peer(partial(torchao, config="Int8WeightOnlyConfig")),
    "CUDA torchao int4 weights": Peer(partial(torchao, config="Int4WeightOnlyConfig")),
}
