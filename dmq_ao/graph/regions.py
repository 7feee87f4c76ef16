"""Regions of an export (``no_grad``, ``autocast``, checkpoints ...) put back into the graph that calls them.

Export keeps a stretch of code that runs under another mode as a graph of its own, called by a higher-order operator.
What such an operator does is nothing for a denoiser that is not trained, except for ``autocast``, whose casts become
operators of the graph: each is found by calling the operator on fake tensors under that autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dmq_ao.graph.layers import aten
from dmq_ao.graph.private import HigherOrderOperator, OpOverload, TorchDispatchMode, children
from dmq_ao.graph.values import VAL
from dmq_ao.graph.vmaps import enclose_vmaps, is_vmap

# By operator: the body, what it is called on, and the autocast that it sets.
_Call = tuple[Node, tuple[Any, ...], "Autocast | None"]
_CALLS: Mapping[str, Callable[..., _Call]] = {
    "wrap_with_set_grad_enabled": lambda enabled, body, *args: (body, args, None),
    "wrap_with_autocast": lambda device, dtype, enabled, cache, body, *args: (
        body,
        args,
        Autocast(device, dtype, enabled),
    ),
    "tag_activation_checkpoint": lambda body, *args: (body, args, None),
    "wrap_activation_checkpoint": lambda body, *args: (body, args, None),
    "wrap": lambda body, *args: (body, args, None),
    "strict_mode": lambda body, args: (body, tuple(args), None),
    "invoke_subgraph": lambda body, name, *args: (body, args, None),
    "hints_wrapper": lambda body, args, kwargs, **hints: (body, tuple(args), None),
}


@dataclass(frozen=True)
class Autocast:
    """What ``torch.autocast`` was told."""

    device: str
    dtype: torch.dtype | None
    enabled: bool


class _CannotInline(Exception):
    """A region whose code does not mean the same outside of it."""


def inline_regions(gm: GraphModule) -> None:
    """Replace every call of a region by the operators inside it, in place.

    Before:  wrap_with_autocast(cpu, bfloat16, body, x, w)      After:  conv2d(x.to(bfloat16), w.to(bfloat16))

    A region stays whole where it is called once for each of several values, or for none (``torch.cond``,
    ``while_loop``, ``scan``), and so does an autocast around one of those.
    """
    enclose_vmaps(gm)
    for node in list(gm.graph.nodes):
        if name_of_region(node) in _CALLS:
            try:
                _inline(gm, node)
            except _CannotInline:
                continue
    _cast_between_marks(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()


def _cast_between_marks(gm: GraphModule) -> None:
    """Casts where export marks the begin and the end of an autocast, as it does around a region that stays whole.

    The marks stay: what is inside the region is cast by them. Marks of ``no_grad`` change nothing.
    """
    modes: list[Autocast] = []
    for node in list(gm.graph.nodes):
        mark = getattr(node.target, "__name__", "")
        if mark == "_enter_autocast":
            modes.append(Autocast(*node.args[:3]))
        elif mark == "_exit_autocast":
            modes.pop()
        elif mark == "_set_grad_enabled":
            gm.graph.erase_node(node)
        elif any(mode.enabled for mode in modes) and isinstance(node.target, OpOverload):
            with suppress(_CannotInline):
                _Splice(gm, node).cast(node, tuple(modes))


def name_of_region(node: Node) -> str:
    """Name of the higher-order operator that a node calls, empty for any other node."""
    target = node.target
    return target.name() if isinstance(target, HigherOrderOperator) else ""


def _is_module(gm: GraphModule, target: str) -> bool:
    path, _, last = target.rpartition(".")
    return last in children(gm.get_submodule(path))


def _inline(gm: GraphModule, node: Node) -> None:
    """Put the body in the place of one region; nothing is changed where that cannot be done."""
    before = list(gm.graph.nodes)
    try:
        results = _Splice(gm, node).call(gm, node, {}, ())
    except _CannotInline:
        added = set(gm.graph.nodes) - set(before)
        for one in reversed([n for n in gm.graph.nodes if n in added]):
            gm.graph.erase_node(one)
        raise
    for user in list(node.users):
        assert user.target.__name__ == "getitem"  # type: ignore[union-attr]
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


@dataclass
class _Splice:
    """Copies the nodes of a region, and of those inside it, to before ``place``."""

    gm: GraphModule
    place: Node
    fake: dict[Node, Any] = field(default_factory=dict)

    def call(
        self, owner: GraphModule, node: Node, values: Mapping[Node, Node], modes: tuple[Autocast, ...]
    ) -> list[Any]:
        """The results of a region that ``owner`` calls, under the autocasts around it, outermost first."""
        body_node, args, mode = _CALLS[name_of_region(node)](*node.args, **_without_options(node.kwargs))
        body = owner.get_submodule(str(body_node.target))
        if not isinstance(body, GraphModule):
            raise _CannotInline
        modes = modes if mode is None else (*modes, mode)
        inside: dict[Node, Any] = {}
        operands = iter(args)
        for one in body.graph.nodes:
            if one.op == "placeholder":
                operand = next(operands)
                inside[one] = values.get(operand, operand) if isinstance(operand, Node) else operand
            elif one.op == "output":
                results = one.args[0]
                return list(map_arg(results if isinstance(results, (tuple, list)) else (results,), inside.__getitem__))
            elif one.op == "get_attr" and _is_module(body, str(one.target)):
                inside[one] = one  # read by the region that calls it
            elif name_of_region(one) in _CALLS:
                inside[one] = self.call(body, one, inside, modes)
            elif name_of_region(one) or is_vmap(one):
                raise _CannotInline
            elif one.target.__name__ == "getitem" and isinstance(inside.get(one.args[0]), list):
                inside[one] = inside[one.args[0]][one.args[1]]
            else:
                inside[one] = self._copy(body, one, inside, modes)
        raise AssertionError("a graph without output")

    def _copy(self, body: GraphModule, node: Node, inside: Mapping[Node, Any], modes: tuple[Autocast, ...]) -> Node:
        with self.gm.graph.inserting_before(self.place):
            if node.op == "get_attr":
                return self._read(body, node)
            twin = self.gm.graph.create_node(
                node.op,
                node.target,
                map_arg(node.args, inside.__getitem__),
                map_arg(node.kwargs, inside.__getitem__),
                node.name,
            )
            twin.meta = dict(node.meta)
            if any(mode.enabled for mode in modes) and isinstance(node.target, OpOverload):
                self.cast(twin, modes)
            return twin

    def _read(self, body: GraphModule, node: Node) -> Node:
        """A tensor of the region's own, moved to the graph."""
        tensor: Any = body
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        name, count = str(node.target).replace(".", "_"), 0
        while hasattr(self.gm, f"{name}_{count}"):
            count += 1
        self.gm.register_buffer(f"{name}_{count}", tensor, persistent=False)
        read = self.gm.graph.get_attr(f"{name}_{count}")
        read.meta = dict(node.meta)
        return read

    def cast(self, node: Node, modes: tuple[Autocast, ...]) -> None:
        """Give an operator the casts that it makes under autocast."""
        casts = casts_of(node, modes)
        casted: dict[Node, Node] = {}
        with self.gm.graph.inserting_before(node):
            for source, dtype in casts.items():
                casted[source] = self.gm.graph.call_function(aten.to.dtype, (source, dtype))
                casted[source].meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
                casted[source].meta[VAL] = source.meta[VAL].to(dtype)
        if casted:
            node.args = map_arg(node.args, lambda one: casted.get(one, one))
            node.kwargs = map_arg(node.kwargs, lambda one: casted.get(one, one))


def _without_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of checkpoints: how to compute again in a backward pass, which there is none."""
    return {key: value for key, value in kwargs.items() if key in ("args", "hints")}


def casts_of(node: Node, modes: tuple[Autocast, ...]) -> dict[Node, torch.dtype]:
    """Which inputs of an operator an autocast converts, and to what.

    Raises:
        _CannotInline: for an operator of several steps that converts something on the way.
    """
    sources = {id(one.meta[VAL]): one for one in node.all_input_nodes if isinstance(one.meta.get(VAL), Tensor)}
    fake = map_arg((node.args, node.kwargs), lambda one: one.meta[VAL])
    with torch.no_grad(), _entered(modes), _Casts() as casts:
        result = node.target(*fake[0], **fake[1])  # type: ignore[operator]
    unknown = {dtype for key, dtype in casts.conversions if key not in sources}
    if not unknown:
        dtypes = {sources[key]: dtype for key, dtype in casts.conversions}
    elif node.target is aten.einsum.default and len(unknown) == 1:  # products of permuted inputs
        (dtype,) = unknown
        dtypes = {source: dtype for source in sources.values() if source.meta[VAL].is_floating_point()}
    else:
        raise _CannotInline
    if isinstance(result, Tensor) and isinstance(node.meta.get(VAL), Tensor):
        node.meta[VAL] = result
    return dtypes


@contextmanager
def _entered(modes: tuple[Autocast, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(torch.autocast(mode.device, mode.dtype, enabled=mode.enabled, cache_enabled=False))
        yield


class _Casts(TorchDispatchMode):
    """Notes what is converted before anything else is computed of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conversions: list[tuple[int, torch.dtype]] = []
        self.kept: list[Any] = []  # so that no other tensor gets the same id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("dtype") is not None:
            self.conversions.append((id(args[0]), kwargs["dtype"]))
        result = func(*args, **kwargs)
        self.kept.append((args, result))
        return result
