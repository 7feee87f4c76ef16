"""The same denoiser in other tools' hands: PyTorch, torchao, OpenVINO with NNCF, ONNX Runtime.

A peer takes the float denoiser, one call's keyword arguments (static shapes: the friendliest case for all) and
calibration calls. It makes what the tool would store, and that compiles to a function of keyword arguments to the
denoiser's output. All run on as many threads as torch does.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmq_ao.evaluation.cost import folder_bytes
from dmq_ao.graph.arguments import flatten_inputs, moved_inputs
from dmq_ao.graph.private import inductor_freezing

Inputs = Mapping[str, Any]
Call = Callable[..., Tensor]
COMPILED_FP32 = "torch fp32 compiled"


class MissingPackage(ImportError):
    """A peer's packages are not installed."""


@dataclass(frozen=True)
class Artifact:
    """A denoiser as a tool stores it.

    Attributes:
        file_bytes: on disk; where the tool has no format of its own, bytes of the tensors that it would have to store.
        compile: makes it ready to run; the first call may do the rest.
    """

    file_bytes: int
    compile: Callable[[], Call]


@dataclass(frozen=True)
class Peer:
    """Another tool.

    Attributes:
        build: float denoiser, a call's arguments, calibration calls -> what it stores.
        packages: that it needs besides torch and torchao.
        integer: whether its products are of integers.
    """

    build: Callable[[nn.Module, Inputs, Sequence[Inputs]], Artifact]
    packages: tuple[str, ...] = ()
    integer: bool = False


class Plain(nn.Module):
    """A denoiser that returns its tensor bare."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def forward(self, **inputs: Any) -> Tensor:
        """Denoise: the output [B, ...] for the inputs of one call."""
        result = self.net(**inputs)
        return result if isinstance(result, Tensor) else result[0]


def chosen_peers(patterns: Iterable[str], among: Mapping[str, Peer] | None = None) -> list[str]:
    """Names of peers that match ``fnmatch`` patterns, upper and lower case alike, in their own order.

    Args:
        patterns: of names.
        among: by name; None means ``PEERS``.

    Raises:
        ValueError: for a pattern that matches none.
    """
    peers = PEERS if among is None else among
    names: set[str] = set()
    for pattern in patterns:
        matches = {name for name in peers if fnmatchcase(name.lower(), pattern.lower())}
        if not matches:
            raise ValueError(f"{pattern!r} matches no peer; the peers are {', '.join(map(repr, peers))}")
        names |= matches
    return [name for name in peers if name in names]


NOT_INSTALLED = "not installed: pip install "
"""How the row of a peer begins whose packages are not there."""


def missing_packages(peer: Peer) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    return [package for package in peer.packages if importlib.util.find_spec(package) is None]


def check_installed(names: Iterable[str], among: Mapping[str, Peer] | None = None) -> None:
    """See that the packages of some peer are there, before any is given work. One that lacks its own has a row.

    Args:
        names: of the peers.
        among: by name; None means ``PEERS``.

    Raises:
        MissingPackage: when none is there, with those that are not, and what to do.
    """
    peers = PEERS if among is None else among
    all_names = list(names)
    absent = {name: missing for name in all_names if (missing := missing_packages(peers[name]))}
    if absent and len(absent) == len(all_names):
        packages = ", ".join(dict.fromkeys(package for missing in absent.values() for package in missing))
        rest = ", ".join(repr(name) for name, peer in peers.items() if not peer.packages)
        raise MissingPackage(
            f'unavailable: {", ".join(map(repr, absent))} need {packages}; install with: pip install "dmq_ao[bench]".'
            f" Peers that need no other package: {rest}"
        )


def eager(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Artifact:
    """PyTorch, float32, as it is."""
    return Artifact(_tensor_bytes(net.state_dict().values()), lambda: torch.no_grad()(Plain(net)))


def compiled(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Artifact:
    """PyTorch, float32, ``torch.compile``."""
    return Artifact(
        _tensor_bytes(net.state_dict().values()), lambda: torch.no_grad()(torch.compile(Plain(net), dynamic=False))
    )


def frozen(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Artifact:
    """PyTorch, float32, compiled with freezing: weights are constants, and laid out for their kernels."""

    def ready() -> Call:
        with torch.no_grad(), inductor_freezing():
            fast: Call = torch.compile(Plain(net), dynamic=False)
            fast(**inputs)
        call: Call = torch.no_grad()(fast)
        return call

    return Artifact(_tensor_bytes(net.state_dict().values()), ready)


def bf16(
    net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], *, compiled: bool, mode: str | None = None
) -> Artifact:
    """PyTorch, weights and values in bfloat16; ``mode`` is that of ``torch.compile``."""
    half = narrowed(net)
    return Artifact(_tensor_bytes(half.state_dict().values()), partial(narrow_call, half, compiled, mode))


def narrow_call(half: nn.Module, compiled: bool, mode: str | None = None) -> Call:
    """A denoiser in bfloat16 as a function from float32 to float32."""
    run = torch.compile(Plain(half), mode=mode, dynamic=False) if compiled else Plain(half)

    @torch.no_grad()
    def call(**inputs: Any) -> Tensor:
        result: Tensor = run(**moved_inputs(inputs, floats=torch.bfloat16))
        return result.float()

    return call


def torchao_x86(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], *, autocast: bool = False) -> Artifact:
    """Torchao's pt2e flow with its x86 quantizer, int8, compiled with freezing as its guide says.

    With ``autocast`` what is no integer is computed in bfloat16, as the guide says, too.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer()
    for kind in (nn.Conv2d, nn.Linear):  # set_global also takes sums of whole numbers, and fails on them
        quantizer.set_module_type_qconfig(kind, config)
    prepared = prepare_pt2e(_exported(net, inputs).module(), quantizer)
    with torch.no_grad():
        for one in calibration:
            prepared(**one)
    converted = convert_pt2e(prepared)

    def ready() -> Call:
        half = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
        with torch.no_grad(), inductor_freezing(), half():
            fast: Call = torch.compile(converted, dynamic=False)
            fast(**inputs)

        @torch.no_grad()
        def call(**inputs: Any) -> Tensor:
            with half():
                return fast(**inputs).float()

        return call

    # The float weights stay in it, unread.
    read = {node.target for node in converted.graph.nodes if node.op == "get_attr"}
    return Artifact(_tensor_bytes(value for name, value in converted.state_dict().items() if name in read), ready)


def openvino(
    net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], *, precision: str = "f32", preset: str | None = None
) -> Artifact:
    """OpenVINO at ``precision``; with ``preset`` quantized by NNCF first (``"default"`` or ``"transformer"``)."""
    import openvino as ov

    model = ov.convert_model(_exported(net, inputs))
    if preset is not None:
        import nncf

        kind = nncf.ModelType.TRANSFORMER if preset == "transformer" else None
        data = nncf.Dataset(list(calibration), lambda one: list(_arrays(one).values()))
        model = nncf.quantize(model, data, subset_size=len(calibration), model_type=kind)
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, Path(folder) / "model.xml", compress_to_fp16=precision != "f32")
        size = folder_bytes(folder)

    def ready() -> Call:
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()

        def call(**inputs: Any) -> Tensor:
            result = request.infer(list(_arrays(inputs).values()), share_inputs=True, share_outputs=True)
            return torch.from_numpy(np.asarray(result[0]))

        return call

    return Artifact(size, ready)


def onnxruntime_int8(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Artifact:
    """ONNX Runtime, static int8 in quantize/dequantize form, per-channel weights."""
    import onnxruntime

    folder = tempfile.TemporaryDirectory()  # it lives as long as what reads it
    target = Path(folder.name) / "int8" / "model.onnx"
    target.parent.mkdir()
    _write_int8_onnx(net, inputs, calibration, Path(folder.name), target)

    def ready() -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning after a call, and slow whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        source = Path(folder.name) / "int8" / "model.onnx"
        session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return lambda **inputs: torch.from_numpy(session.run(None, _arrays(inputs))[0])

    return Artifact(folder_bytes(target.parent), ready)


def _write_int8_onnx(
    net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], folder: Path, target: Path
) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
        shape_inference,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else _arrays(row)

    source, prepared = str(folder / "float.onnx"), str(folder / "prepared.onnx")
    names = list(_arrays(inputs))
    torch.onnx.export(Plain(net), (), source, kwargs=dict(inputs), dynamo=True, input_names=names)
    large = _tensor_bytes(net.state_dict().values()) >= _ONNX_LIMIT
    shape_inference.quant_pre_process(source, prepared, save_as_external_data=large, all_tensors_to_one_file=large)
    quantize_static(
        prepared,
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
    )


_ONNX_LIMIT = 2**31  # of one protobuf file; larger models keep their tensors beside it


def _exported(net: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    return torch.export.export(Plain(net), (), dict(inputs), strict=False)


def narrowed(net: nn.Module) -> nn.Module:
    """A copy in bfloat16, without a copy in float32 on the way."""
    memo: dict[int, Any] = {}
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            half = tensor.detach().bfloat16()
            memo[id(tensor)] = nn.Parameter(half, requires_grad=False) if isinstance(tensor, nn.Parameter) else half
    return copy.deepcopy(net, memo)


def _arrays(inputs: Inputs) -> dict[str, Any]:
    """The tensors of a call by dotted name, in the order of the exported signature; what is constant is left out."""
    return {name: value.numpy() for name, value in flatten_inputs(inputs).items() if isinstance(value, Tensor)}


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_OPENVINO, _NNCF = ("openvino",), ("openvino", "nncf")
PEERS: dict[str, Peer] = {
    "torch fp32": Peer(eager),
    COMPILED_FP32: Peer(compiled),
    "torch fp32 compiled, frozen": Peer(frozen),
    "torch bf16": Peer(partial(bf16, compiled=False)),
    "torch bf16 compiled": Peer(partial(bf16, compiled=True)),
    "torchao pt2e int8": Peer(torchao_x86, integer=True),
    "torchao pt2e int8, bf16 autocast": Peer(partial(torchao_x86, autocast=True), integer=True),
    "OpenVINO fp32": Peer(openvino, _OPENVINO),
    "OpenVINO bf16": Peer(partial(openvino, precision="bf16"), _OPENVINO),
    "OpenVINO NNCF int8": Peer(partial(openvino, preset="default"), _NNCF, integer=True),
    "OpenVINO NNCF int8, bf16 hint": Peer(partial(openvino, preset="default", precision="bf16"), _NNCF, integer=True),
    "OpenVINO NNCF int8, transformer preset": Peer(partial(openvino, preset="transformer"), _NNCF, integer=True),
    "OpenVINO NNCF int8, transformer preset, bf16 hint": Peer(
        partial(openvino, preset="transformer", precision="bf16"), _NNCF, integer=True
    ),
    "ONNX Runtime int8": Peer(onnxruntime_int8, ("onnx", "onnxscript", "onnxruntime"), integer=True),
}
