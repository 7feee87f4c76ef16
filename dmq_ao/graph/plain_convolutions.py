"""Convolutions whose padding is given as a word, as those that are told numbers."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from dmq_ao.graph.layers import aten

_WITH_NUMBERS = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def number_paddings(gm: GraphModule) -> None:
    """Replace ``padding="same"`` and ``"valid"`` by the zeros that they stand for, in place.

    Before:  conv2d(x, w, b, 1, "same")      After:  conv2d(x, w, b, 1, [1, 1])

    Where a side gets a zero more than the other (windows of an even size), the input is padded by an operator of its
    own, on the right, as PyTorch does.
    """
    changed = False
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _WITH_NUMBERS:
            _replace_padding(gm, node)
            changed = True
    if changed:
        gm.recompile()


def _replace_padding(gm: GraphModule, node: Node) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults: dict[str, Any] = {"bias": None, "stride": [1], "padding": "valid", "dilation": [1], "groups": 1}
    call = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    kernel = call["weight"].meta["val"].shape[2:]
    dilation = list(call["dilation"]) * (len(kernel) if len(call["dilation"]) == 1 else 1)
    totals = [d * (k - 1) if call["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        sides = [side for total in reversed(totals) for side in (0, total % 2)]
        with gm.graph.inserting_before(node):
            source = call["input"]
            padded = gm.graph.call_function(aten.constant_pad_nd.default, (source, sides, 0.0))
        padded.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        padded.meta["val"] = aten.constant_pad_nd.default(source.meta["val"], sides, 0.0)
        call["input"] = padded
    call["padding"] = [total // 2 for total in totals]
    node.target = _WITH_NUMBERS[node.target]  # type: ignore[index]
    node.args, node.kwargs = tuple(call[name] for name in names), {}
