"""Triton's interpreter, where there is no GPU: asked for before anything imports Triton: ``conftest`` does.

With a GPU, kernels run on it; ``TRITON_INTERPRET=1`` asks for the interpreter there.
"""

import dataclasses
import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="TRITON_INTERPRET=1 is not set, and there is a GPU; or triton is missing"
)
# The interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers.
HALVES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


def without_lost_checks() -> None:
    """Spare the interpreter the checks for overflow: it makes them for every sum, half of its time, and drops them.

    Only ``debug`` raises what they find, and it is off.
    """
    if HAS_TRITON and INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        assert not interpreter_builder.options.debug
        interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
