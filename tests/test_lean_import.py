"""Importing the library brings in no more than torch and torchao, and wakes no device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# torchao may import triton or others by itself: only what comes on top of it is ours.
PROBE = """
import json, sys
import torch
import torchao.quantization.pt2e
before = set(sys.modules)
import dmq_ao
loaded_by_name = "dmq_ao.api.quantize" not in sys.modules
assert [getattr(dmq_ao, name) for name in dmq_ao.__all__]
print(json.dumps({"added": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized(),
    "by_name": loaded_by_name}))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    elsewhere: Path = tmp_path_factory.mktemp("elsewhere")  # not the root, where the checkout hides the siblings
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    [
        "diffusers",
        "transformers",
        "triton",
        "matplotlib",
        "typer",
        "torchmetrics",
        "scipy",
        "openvino",
        "nncf",
        "onnx",
        "onnxruntime",
    ],
)
def test_import_leaves_out(probe: dict[str, object], name: str) -> None:
    assert [module for module in probe["added"] if module.split(".")[0] == name] == []


def test_import_leaves_kernels_alone(probe: dict[str, object]) -> None:
    assert [module for module in probe["added"] if module.startswith("dmq_ao.") and "triton" in module] == []


def test_import_does_not_initialise_cuda(probe: dict[str, object]) -> None:
    assert probe["cuda"] is False


def test_public_names_bring_the_library_when_they_are_used(probe: dict[str, object]) -> None:
    assert probe["by_name"] is True
    assert "dmq_ao.api.quantize" in probe["added"]


def test_public_names_are_those_of_their_files() -> None:
    import dmq_ao.api.calibrate
    import dmq_ao.api.quantize

    assert dmq_ao.quantize is dmq_ao.api.quantize.quantize
    assert dmq_ao.calibrate is dmq_ao.api.calibrate.calibrate
    assert {"quantize", "recipes"} <= set(dir(dmq_ao))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = dmq_ao.nonsense
