"""The whole bundled denoiser on the onednn kernels against its quantize/dequantize graph, evaluated exactly."""

import pytest
import torch

import dmq_ao
from dmq_ao.pipelines.adapter import load_pipeline, record_pipeline
from dmq_ao.recipes import minmax
from tests.backends.exact import run_exactly
from tests.integer_sums import EXACT


@pytest.mark.skipif(not EXACT, reason="this CPU has no VNNI, so there are no integer kernels to compare")
@pytest.mark.parametrize(
    ("bits", "power_of_two"), [pytest.param("w8a8", False, marks=pytest.mark.slow), ("w4a8", True)]
)
def test_the_demo_net_equals_its_exact_graph(bits: str, power_of_two: bool) -> None:
    pytest.importorskip("diffusers")
    pipeline = load_pipeline("demo")
    samples = record_pipeline(pipeline, num_samples=8, steps=4, seed=1000)
    prepared = dmq_ao.prepare(pipeline.unet, minmax(bits, power_of_two=power_of_two), samples.example())
    dmq_ao.calibrate(prepared, samples, progress=False)
    lowered, reference = dmq_ao.convert(prepared, "onednn"), dmq_ao.convert(prepared, "reference")
    inputs = samples.example(4)
    exact, _ = run_exactly(reference, **inputs)
    with torch.no_grad():
        actual, plain = lowered(**inputs).sample, reference(**inputs).sample
    # A last bit of float32 moves a code now and then, here as in the reference; nothing else may differ.
    assert (plain - exact).norm() <= 5e-3 * exact.norm()
    assert (actual - exact).norm() <= 1.5 * (plain - exact).norm()
