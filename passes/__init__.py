"""Rewrites of a graph: GraphModule in, GraphModule out."""

from dmq_ao.passes.decompose_attention import decompose_attention
from dmq_ao.passes.fast_gelu import fast_gelu
from dmq_ao.passes.hoist_tables import hoist_tables
from dmq_ao.passes.join_siblings import join_projections, join_siblings
from dmq_ao.passes.look_up_codes import look_up_codes
from dmq_ao.passes.lower_precision import lower_precision
from dmq_ao.passes.merge_layers import merge_layers
from dmq_ao.passes.out_of_place import out_of_place
from dmq_ao.passes.own_tensors import own_tensors
from dmq_ao.passes.place_on import place_on
from dmq_ao.passes.split_concat import split_concat

__all__ = [
    "decompose_attention",
    "fast_gelu",
    "hoist_tables",
    "join_projections",
    "join_siblings",
    "look_up_codes",
    "lower_precision",
    "merge_layers",
    "out_of_place",
    "own_tensors",
    "place_on",
    "split_concat",
]
