"""Calibration, conversion and files of a denoiser that is not on the CPU: the tests of ``on_pretend_device.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("on_pretend_device.py")


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_a_device_that_is_not_there(tier: str) -> None:
    """In a process of its own: once it is registered, PyTorch takes it for this machine's accelerator."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, str(TESTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout
