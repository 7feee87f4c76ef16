"""The whole flow on a GPU: calibrated there, lowered, compiled, saved and loaded, equal to the reference there."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interpreted import needs_triton
from plain import relative, repeated_samples
from torch import Tensor, nn

import dmq_ao
from dmq_ao import QuantizedDenoiser
from dmq_ao.recipes import default, dmq, eda_dm, minmax

pytestmark = [
    needs_triton,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Flow = tuple[QuantizedDenoiser, QuantizedDenoiser, dict[str, Tensor]]


def flow(net: nn.Module, inputs: dict[str, Tensor], recipe: dmq_ao.Recipe, dtype: torch.dtype) -> Flow:
    """Lowered and reference denoisers of a copy on the GPU, calibrated on samples that are kept on the CPU."""
    moved = copy.deepcopy(net).to("cuda", dtype)
    inputs = {name: x.to(dtype) if x.dtype == torch.float32 else x for name, x in inputs.items()}
    samples = repeated_samples(inputs)
    prepared = dmq_ao.prepare(moved, recipe, samples.example(), backend="cuda")
    dmq_ao.calibrate(prepared, samples, progress=False)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    return dmq_ao.convert(prepared, "cuda"), dmq_ao.convert(prepared, "reference"), on_gpu


@pytest.mark.parametrize("net", ["tiny_unet2d", "tiny_unet2d_condition", "tiny_dit"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a16", "w8a8-fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_denoiser_equals_the_reference(
    net: str, bits: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    denoiser, given = request.getfixturevalue(net)
    recipe = minmax(bits, power_of_two=bits == "w4a8")
    lowered, reference, inputs = flow(denoiser, given, recipe, dtype)
    expected = reference(**inputs).sample
    exact = dtype == torch.float32 and "fp8" not in bits
    close = 0.03 if exact else 0.1  # a last bit moves a code, and in nets so small one code shows
    assert relative(lowered(**inputs).sample, expected) < close
    for mode in ("default", "max"):
        compiled = dmq_ao.compile(lowered, mode)
        for _ in range(3):
            assert relative(compiled(**inputs).sample, expected) < close
    dmq_ao.save(lowered, tmp_path)
    loaded = dmq_ao.load(tmp_path, backend="cuda", device="cuda")
    assert torch.equal(loaded(**inputs).sample, lowered(**inputs).sample)
    there = dmq_ao.load(tmp_path, backend="reference")
    assert relative(there(**{name: x.cpu() for name, x in inputs.items()}).sample.cuda(), expected) < close


@pytest.mark.parametrize("recipe", [default, dmq, eda_dm])
def test_all_of_calibration_runs_there(
    recipe: Callable[[str], dmq_ao.Recipe], tiny_unet2d: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    lowered, reference, inputs = flow(*tiny_unet2d, recipe("w4a8"), torch.float32)
    assert relative(lowered(**inputs).sample, reference(**inputs).sample) < 0.03
    assert all(record.weight.codes.device.type == "cuda" for record in lowered.records.values())
