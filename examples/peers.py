"""The same denoiser in other tools' hands: PyTorch, torchao, OpenVINO with NNCF, ONNX Runtime.

Each function takes the float denoiser, one call's keyword arguments (static shapes: the friendliest case for all) and
calibration calls, and returns a function of keyword arguments to the denoiser's output. Needs the extra ``bench``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]
Call = Callable[..., Tensor]


class Plain(nn.Module):
    """A denoiser that returns its tensor bare."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Tensor:
        """Denoise."""
        result = self.net(**inputs)
        return result if isinstance(result, Tensor) else result[0]


def _exported(net: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    return torch.export.export(Plain(net), (), dict(inputs), strict=False)


def eager(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Call:
    """PyTorch, float32, as it is."""
    return torch.no_grad()(Plain(net))


def compiled(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Call:
    """PyTorch, float32, ``torch.compile``."""
    return torch.no_grad()(torch.compile(Plain(net), dynamic=False))


def compiled_bf16(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Call:
    """PyTorch, weights and values in bfloat16, ``torch.compile``."""
    half = torch.compile(Plain(copy.deepcopy(net).bfloat16()), dynamic=False)

    @torch.no_grad()
    def call(**inputs: Any) -> Tensor:
        narrow = {
            k: v.bfloat16() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for k, v in inputs.items()
        }
        return half(**narrow).float()

    return call


def torchao_x86(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Call:
    """Torchao's pt2e flow with its x86 quantizer, int8, compiled with freezing as its guide says."""
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
        with torch._inductor.config.patch(freezing=True):
            fast = torch.compile(converted, dynamic=False)
            fast(**inputs)
    return torch.no_grad()(fast)


def openvino(
    net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs], *, precision: str = "f32", preset: str | None = None
) -> Call:
    """OpenVINO at ``precision``; with ``preset`` quantized by NNCF first (``"default"`` or ``"transformer"``)."""
    import openvino as ov

    model = ov.convert_model(_exported(net, inputs))
    names = list(inputs)
    if preset is not None:
        import nncf

        kind = nncf.ModelType.TRANSFORMER if preset == "transformer" else None
        data = nncf.Dataset(list(calibration), lambda one: [_numpy(one[name]) for name in names])
        model = nncf.quantize(model, data, subset_size=len(calibration), model_type=kind)
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()

    def call(**inputs: Any) -> Tensor:
        result = request.infer([_numpy(inputs[name]) for name in names], share_inputs=True, share_outputs=True)
        return torch.from_numpy(np.asarray(result[0]))

    return call


def onnxruntime_int8(net: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Call:
    """ONNX Runtime, static int8 in quantize/dequantize form, per-channel weights."""
    import onnxruntime
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
            return None if row is None else {name: _numpy(value) for name, value in row.items()}

    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (str(Path(folder) / f"{name}.onnx") for name in ("float", "ready", "int8"))
        torch.onnx.export(Plain(net), (), source, kwargs=dict(inputs), dynamo=True, input_names=list(inputs))
        shape_inference.quant_pre_process(source, ready)
        quantize_static(
            ready,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        options = onnxruntime.SessionOptions()
        # Its threads would go on spinning after a call, and slow whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])

    def call(**inputs: Any) -> Tensor:
        return torch.from_numpy(session.run(None, {name: _numpy(value) for name, value in inputs.items()})[0])

    return call


def _numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


PEERS: dict[str, Callable[[nn.Module, Inputs, Sequence[Inputs]], Call]] = {
    "torch fp32": eager,
    "torch fp32 compiled": compiled,
    "torch bf16 compiled": compiled_bf16,
    "torchao pt2e int8": torchao_x86,
    "OpenVINO fp32": openvino,
    "OpenVINO bf16": partial(openvino, precision="bf16"),
    "OpenVINO NNCF int8": partial(openvino, preset="default"),
    "OpenVINO NNCF int8, bf16 hint": partial(openvino, preset="default", precision="bf16"),
    "OpenVINO NNCF int8, transformer preset": partial(openvino, preset="transformer"),
    "ONNX Runtime int8": onnxruntime_int8,
}
