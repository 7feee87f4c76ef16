"""Rewrites of a graph: GraphModule in, GraphModule out."""

from dmq_ao.passes.decompose_attention import decompose_attention
from dmq_ao.passes.lower_precision import lower_precision
from dmq_ao.passes.split_concat import split_concat

__all__ = ["decompose_attention", "lower_precision", "split_concat"]
