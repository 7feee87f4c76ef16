"""Saved folders, calibration sets and bit plans, edited as damage or malice would: anything at any place of them.

``tests/fuzz_files.py`` counts what becomes of ten thousand; ``tests/serialization/test_edits.py`` looks at some.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain import reseal
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmq_ao.serialization.folder import CONFIG, GRAPH, TENSORS

CANARY = "canary_7f3a"
_TEXTS = [
    "",
    "x9",
    CANARY,
    f'"); open("{CANARY}", "w").write("x"); ("',
    f"x', __import__('os').system('touch {CANARY}'), '",
    f"a\nopen('{CANARY}','w')\n",
    "__class__",
    "__init__.__globals__.x",
    "forward",
    "../../etc/passwd",
    "/etc/passwd",
    "subprocess.Popen",
    "a" * 5000,
    "\ud7ff\u202e",
    "conv",
    "float64",
    "inf",
]
_OPERATORS = [
    "aten.from_file.default",
    "aten.copy_.default",
    "aten._reshape_alias.default",
    "aten.as_strided.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.resize_.default",
    "aten.repeat.default",
    "aten.full.default",
    "aten.randn_like.default",
    "aten.bernoulli.default",
    "aten.mul.Tensor",
    "aten.sub.Tensor",
    "aten.neg.default",
    "aten.relu.default",
    "aten.unbind.int",
    "operator.pow",
    "operator.mul",
    "operator.mod",
    "operator.floordiv",
    "dmq_ao.quantize.default",
    "dmq_ao.dequantize.default",
    "builtins.eval",
    "os.system",
]
_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 9, 16, 255, 256, 65536, 2**31, 2**62, 2**63 - 1, -(2**63), 10**12, -7]
_FLOATS = [0.0, -0.0, 0.5, -1.0, 1e-45, 1e-38, 3e38, 1e300, -1e300]
_RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 30, "[" * 5000 + "]" * 5000, '{"a":1,"a":2}']


class Raw(str):
    """JSON text to be put in as it is, which Python would not write."""


def _value(rng: random.Random) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice(_NUMBERS),
        lambda: rng.choice(_FLOATS),
        lambda: rng.choice(_TEXTS),
        lambda: rng.choice(_OPERATORS),
        lambda: [],
        lambda: {},
        lambda: [_value(rng) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(_TEXTS): _value(rng) for _ in range(rng.randrange(3))},
        lambda: {rng.choice(["node", "tuple", "slice", "device", "dtype", "float"]): rng.choice(_TEXTS)},
        lambda: Raw(rng.choice(_RAW)),
    ]
    return rng.choice(kinds)()


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [path]
    if isinstance(data, dict):
        for key, value in data.items():
            places += _places(value, (*path, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            places += _places(value, (*path, number))
    return places


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


def edit_json(data: Any, rng: random.Random) -> str:
    """Change one place of ``data`` in place; says what was done."""
    places = [path for path in _places(data) if path]
    path = rng.choice(places)
    above, last = _at(data, path[:-1]), path[-1]
    old = above[last]
    kind = rng.choice(["value", "value", "near", "near", "drop", "add", "rename", "swap", "twice"])
    if kind == "drop":
        del above[last]
    elif kind == "add" and isinstance(old, dict):
        old[rng.choice([*_TEXTS, *old])] = _value(rng)
    elif kind == "add" and isinstance(old, list):
        old.insert(rng.randrange(len(old) + 1), _value(rng))
    elif kind == "rename" and isinstance(above, dict):
        above[rng.choice([*_TEXTS, *above])] = above.pop(last)
    elif kind == "swap":
        other = rng.choice(places)
        theirs = _at(data, other)
        _at(data, other[:-1])[other[-1]], above[last] = copy.deepcopy(old), copy.deepcopy(theirs)
    elif kind == "twice" and isinstance(above, list):
        above.insert(last, copy.deepcopy(old))
    elif kind == "near" and isinstance(old, bool):
        above[last] = not old
    elif kind == "near" and isinstance(old, int):
        above[last] = old + rng.choice([-2, -1, 1, 2, old])
    elif kind == "near" and isinstance(old, float):
        above[last] = old * rng.choice([-1, 0, 0.5, 2, 1e30])
    elif kind == "near" and isinstance(old, str):
        siblings = [value for place in places if isinstance(value := _at(data, place), str)]
        above[last] = rng.choice([*siblings, *_OPERATORS, old + "x", old[:-1]])
    else:
        above[last] = _value(rng)
    return f"{kind} at {'.'.join(map(str, path))[:80]}"


def _written(data: Any) -> str:
    """JSON with ``Raw`` put in as it is."""
    raws: list[Raw] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"raw-{len(raws) - 1}-raw"
        if isinstance(value, dict):
            return {key: marked(one) for key, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(marked(data))
    for number, raw in enumerate(raws):
        text = text.replace(f'"raw-{number}-raw"', raw)
    return text


def _edit_file(file: Path, rng: random.Random) -> str:
    data = json.loads(file.read_text())
    what = edit_json(data, rng)
    file.write_text(_written(data), errors="surrogatepass" if rng.random() < 0.5 else "replace")
    return f"{file.name}: {what}"


def edit_tensors(tensors: dict[str, Tensor], rng: random.Random) -> str:
    """Change one tensor in place of ``tensors``; says what was done."""
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    kind = rng.choice(["drop", "rename", "dtype", "shape", "value", "value", "value", "all", "swap", "add"])
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice([*_TEXTS[:8], name + "x", *tensors])] = tensors.pop(name)
    elif kind == "dtype":
        wanted = [torch.float64, torch.float16, torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64]
        tensors[name] = old.to(rng.choice(wanted))
    elif kind == "shape":
        shapes = [
            old.reshape(-1),
            old[None],
            old.reshape(-1)[:1],
            old.reshape(-1)[:0],
            torch.cat([old.reshape(-1)] * 2),
        ]
        tensors[name] = rng.choice(shapes).clone()
    elif kind == "swap":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), old.clone()
    elif kind == "add":
        tensors[rng.choice([name + "_scale", "graph.x", "x9", *_TEXTS[1:4]])] = old.clone()
    elif old.numel():
        flat = old.clone().reshape(-1)
        where = slice(None) if kind == "all" else rng.randrange(len(flat))
        values = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, 1e38] if flat.is_floating_point() else [0, 1, 127]
        values += (
            [] if flat.is_floating_point() else ([255, 200, 16] if flat.dtype == torch.uint8 else [-1, -100, 100])
        )
        flat[where] = rng.choice(values)
        tensors[name] = flat.reshape(old.shape)
    return f"{TENSORS}: {kind} {name}"


def edit_folder(folder: Path, rng: random.Random, *, sealed: bool) -> str:
    """Edit one file of a saved folder.

    Args:
        folder: that ``dmq_ao.save`` wrote.
        rng: decides.
        sealed: whether the editor makes all checksums anew, as far as the files allow it.
    """
    file = rng.choice([CONFIG, GRAPH, GRAPH, TENSORS])
    if file == TENSORS:
        tensors = load_file(folder / TENSORS)
        what = edit_tensors(tensors, rng)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    else:
        what = _edit_file(folder / file, rng)
    if sealed:
        try:
            reseal(folder)
        except (ValueError, RecursionError, TypeError, AttributeError):
            what += " (not sealed: no JSON)"
    return what


def edit_json_file(file: Path, rng: random.Random) -> str:
    """Edit a file of JSON."""
    return _edit_file(file, rng)


def edit_safetensors(file: Path, header: str, rng: random.Random) -> str:
    """Edit a safetensors file with JSON under one key of its metadata: tensors, or that JSON."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    tensors = load_file(file)
    if rng.random() < 0.5:
        data = json.loads(metadata[header])
        what = f"metadata: {edit_json(data, rng)}"
        metadata[header] = _written(data)
    else:
        what = edit_tensors(tensors, rng)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return what
