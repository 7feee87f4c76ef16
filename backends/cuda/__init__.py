"""Triton kernels on NVIDIA GPUs: int8 products of packed weights."""
