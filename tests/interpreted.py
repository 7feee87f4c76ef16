"""Triton's interpreter, where there is no GPU: asked for before anything imports Triton: ``conftest`` does."""

import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
# The interpreter multiplies the bit patterns of bfloat16 as if they were whole numbers.
HALVES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float16]
