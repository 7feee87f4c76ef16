"""A recipe laid over a graph, as a torchao ``Quantizer``."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import (
    Q_ANNOTATION_KEY,
    QuantizationSpecBase,
    SharedQuantizationSpec,
)

from dmq_ao import graph
from dmq_ao.config import AttentionConfig, PowerOfTwo, Recipe, TensorConfig
from dmq_ao.graph.roles import roles_of
from dmq_ao.numerics import code_dtype, code_range
from dmq_ao.observers import ActivationObserver, AttentionObserver, WeightObserver
from dmq_ao.passes import decompose_attention, merge_layers, split_concat
from dmq_ao.passes.decompose_attention import PRODUCTS, whole_attention
from dmq_ao.quantizer.plan import ATTENTION, estimator, make_plan, scaled_layers
from dmq_ao.quantizer.prepared import Prepared, is_prepared, state_of
from dmq_ao.records import LayerPlan


class DiffusionQuantizer(Quantizer):
    """A recipe as a torchao pt2e quantizer.

    ``dmq_ao.prepare`` uses it on a graph from ``dmq_ao.graph.capture``; a pt2e user may pass it to ``prepare_pt2e``
    with a graph of their own, whose placeholders then go by their own names.
    """

    def __init__(self, recipe: Recipe) -> None:
        """A quantizer that annotates as ``recipe`` says."""
        super().__init__()
        self.recipe = recipe

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Merge copies of layers; split concatenations and write attention out where the recipe wants it."""
        graph.ensure_signature(model)
        state = Prepared(self.recipe, merged=merge_layers(model))
        if self.recipe.config.attention is not None:
            decompose_attention(model)
        if self.recipe.split_concat:
            plan = make_plan(model, self.recipe.config)
            roles = roles_of(model, graph.find_layers(model))
            model = split_concat(model, [name for name in roles if "@concat" in roles[name] and not plan[name].why])
        state.attach(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan and the torchao annotations."""
        plan = make_plan(model, self.recipe.config)
        nodes = graph.layer_nodes(model)
        first: dict[tuple[Node, TensorConfig, PowerOfTwo | None, int], Node] = {}
        axes = {layer.name: layer.ch_axis for layer in graph.find_layers(model)}
        for name, item in plan.items():
            if item.weight is None:
                continue
            node = nodes[name]
            source, weight = node.args[0], graph.weight_of(node)
            assert isinstance(source, Node)
            specs: dict[Node, QuantizationSpecBase | None] = {weight: _weight_spec(item)}
            if item.activation is not None:
                key = (source, item.activation, item.power_of_two, axes[name])
                if key in first:
                    specs[source] = SharedQuantizationSpec((source, first[key]))
                else:
                    first[key] = node
                    specs[source] = _activation_spec(item, axes[name])
            # torchao would share observers of one tensor whenever dtype and limits agree; siblings here share by key.
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                input_qspec_map=specs, allow_implicit_sharing=False, _annotated=True
            )
        if self.recipe.config.attention is not None:
            plan |= _annotate_attention(model, self.recipe.config.attention)
        merged = state_of(model).merged if is_prepared(model) else {}
        Prepared(self.recipe, plan, merged, scaled_layers(model, self.recipe)).attach(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to add: ``make_plan`` refuses what does not fit."""


def _annotate_attention(model: GraphModule, config: AttentionConfig) -> dict[str, LayerPlan]:
    """Annotate the factors of attention's products; returns a row for each attention, for the reports."""
    rows: dict[str, LayerPlan] = {}
    why = (
        f"queries, keys and values of {config.bits} bits, softmax of {config.softmax_bits}, multiplied as dequantized"
        " values: there is no integer kernel for products of two activations"
    )
    for node in model.graph.nodes:
        if PRODUCTS not in node.meta:
            continue
        specs: dict[Node, QuantizationSpecBase | None] = {}
        for factor in node.args:
            softmax = factor.target == graph.aten.softmax.int
            bits = config.softmax_bits if softmax else config.bits
            observer = AttentionObserver.with_args(bits=bits, unit_range=softmax)
            specs[factor] = QuantizationSpec(torch.uint8, observer, 0, 2**bits - 1)
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=specs, allow_implicit_sharing=False, _annotated=True
        )
        name = f"{node.meta[PRODUCTS]}.{ATTENTION}"
        rows[name] = LayerPlan(name, ATTENTION, 0, None, None, None, why)
    whole = {f"{path}.{ATTENTION}": why for path, why in whole_attention(model).items()}
    return rows | {name: LayerPlan(name, ATTENTION, 0, None, None, None, why) for name, why in whole.items()}


def _weight_spec(item: LayerPlan) -> QuantizationSpec:
    assert item.weight is not None
    low, high = code_range(item.weight.bits, item.weight.symmetric)
    observer = WeightObserver.with_args(layer=item.name, config=item.weight, estimator=estimator(item.weight.observer))
    return QuantizationSpec(code_dtype(item.weight.symmetric, item.weight.float8), observer, low, high)


def _activation_spec(item: LayerPlan, ch_axis: int) -> QuantizationSpec:
    assert item.activation is not None
    observer = ActivationObserver.with_args(
        layer=item.name,
        config=item.activation,
        ch_axis=ch_axis,
        estimator=estimator(item.activation.observer),
        power_of_two=item.power_of_two,
    )
    return QuantizationSpec(
        code_dtype(item.activation.symmetric, item.activation.float8),
        observer,
        *code_range(item.activation.bits, False),
    )
