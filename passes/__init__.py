"""Rewrites of a captured float graph: GraphModule in, the same GraphModule out."""

from dmq_ao.passes.split_concat import split_concat

__all__ = ["split_concat"]
