"""What a denoiser costs a fresh process: seconds from disk to the first output, and memory, against float32.

    python examples/footprint.py --models cifar-unet dit-s-2 -o build/footprint
    python examples/footprint.py --loaders MODELS/loaders.py --models ddpm64 --bits w4a8 w8a8 -o build/footprint

Each variant is written to disk, and then loaded in a process of its own, which imports everything, notes its resident
memory, loads, calls the denoiser once (eager, the same inputs) and tells its peak. The float model is loaded as
frugally as PyTorch can: its architecture without weights, and the tensors of a safetensors file in their places.
Medians of ``--repeats`` processes. Prints a table, and writes ``<model>.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from quantize_custom_module import load_module, record, samplers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmq_ao
from dmq_ao import recipes
from dmq_ao.benchmarks.benchmark import first_rows
from dmq_ao.benchmarks.named import NAMED, named_denoiser
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.cli.output import aligned
from dmq_ao.evaluation import folder_bytes, machine, peak_rss_bytes, rss_bytes
from dmq_ao.graph.arguments import flatten_inputs, unflatten_inputs

FLOAT = "float32"
MIB = 2**20


@contextmanager
def uninitialised() -> Iterator[None]:
    """Modules built in here do not fill their weights: memory that nobody writes to takes up no room."""
    names = (
        "kaiming_uniform_",
        "xavier_uniform_",
        "uniform_",
        "normal_",
        "trunc_normal_",
        "ones_",
        "zeros_",
        "constant_",
    )
    with patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in names}):
        yield


def architecture(model: str, loaders: Path | None, class_name: str) -> nn.Module:
    """The module without its weights; that of a loaders file is the class, which has defaults for all it takes."""
    with uninitialised():
        net: nn.Module = (
            NAMED[model].build() if model in NAMED else getattr(load_module(_given(loaders)), class_name)()
        )
    return net.eval()


def _given(loaders: Path | None) -> Path:
    if loaders is None:
        raise SystemExit(f"give the model's --loaders FILE; without one there are {sorted(NAMED)}")
    return loaders


def measure(
    model: str,
    loaders: Path | None,
    net: nn.Module,
    inputs: Mapping[str, Any],
    ours: Mapping[str, dmq_ao.QuantizedDenoiser],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Write all to a temporary folder, load each in processes of its own: figures by name, ``float32`` first."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = {"model": model, "loaders": loaders and str(loaders.resolve()), "class": type(net).__name__}
        spec |= _written_inputs(inputs, folder / "inputs.safetensors")
        (folder / FLOAT).mkdir()
        save_file(_contiguous(net.state_dict()), folder / FLOAT / "model.safetensors")
        rows = {FLOAT: _loaded({**spec, "float": True, "folder": str(folder / FLOAT)}, repeats)}
        for number, (name, quantized) in enumerate(ours.items()):
            dmq_ao.save(quantized, folder / str(number))
            rows[name] = _loaded({**spec, "float": False, "folder": str(folder / str(number))}, repeats)
    for row in rows.values():
        row["rss_ratio"] = row["peak_rss_bytes"] / rows[FLOAT]["peak_rss_bytes"]
        row["net_ratio"] = row["net_rss_bytes"] / rows[FLOAT]["net_rss_bytes"]
    return rows


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _written_inputs(inputs: Mapping[str, Any], file: Path) -> dict[str, Any]:
    flat = flatten_inputs(inputs)
    save_file(_contiguous({name: value for name, value in flat.items() if isinstance(value, Tensor)}), file)
    constants = {name: value for name, value in flat.items() if not isinstance(value, Tensor)}
    return {"inputs": str(file), "constants": constants}


def _loaded(spec: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    runs = [_run(spec) for _ in range(repeats)]
    row = {key: median(run[key] for run in runs) for key in runs[0]}
    return {**row, "file_bytes": folder_bytes(spec["folder"])}


def _run(spec: Mapping[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loading {spec['folder']} in a process of its own failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def load(spec: Mapping[str, Any]) -> dict[str, float]:
    """What the fresh process does: load, call once, tell seconds and bytes."""
    _import_everything()
    inputs = unflatten_inputs({**load_file(spec["inputs"]), **spec["constants"]})
    before = rss_bytes()
    started = time.perf_counter()
    denoiser = _float(spec) if spec["float"] else dmq_ao.load(spec["folder"])
    with torch.no_grad():
        denoiser(**inputs)
    seconds, peak = time.perf_counter() - started, peak_rss_bytes()
    if before is None or peak is None:
        raise SystemExit("resident memory is read from /proc, which only Linux has")
    return {"load_seconds": seconds, "peak_rss_bytes": peak, "net_rss_bytes": peak - before}


def _import_everything() -> None:
    """What either variant would import on its way: neither pays for it, in seconds or in bytes."""
    import diffusers
    import torch._dynamo
    import torch.export  # noqa: F401

    import dmq_ao.api.saving  # noqa: F401

    for name in ("DiTTransformer2DModel", "UNet2DConditionModel", "UNet2DModel"):  # loaded by diffusers when asked for
        getattr(diffusers, name)


def _float(spec: Mapping[str, Any]) -> nn.Module:
    net = architecture(spec["model"], spec["loaders"] and Path(spec["loaders"]), spec["class"])
    net.load_state_dict(load_file(Path(spec["folder"]) / "model.safetensors"), assign=True)
    return net


def table(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures in columns, and what they come to in a sentence each."""
    heading = [model, "file MiB", "load to output s", "peak RSS MiB", "net of imports", "peak / float", "net / float"]
    cells = [heading]
    for name, row in rows.items():
        sizes = [f"{row[key] / MIB:.1f}" for key in ("file_bytes", "peak_rss_bytes", "net_rss_bytes")]
        ratios = [f"{row[key]:.2f}" for key in ("rss_ratio", "net_ratio")]
        cells.append([name, sizes[0], f"{row['load_seconds']:.2f}", *sizes[1:], *ratios])
    lines = [
        f"{name}: {row['load_seconds']:.1f} s from disk to the first output; peak RSS {row['rss_ratio']:.2f} x"
        f" float32's, {row['net_ratio']:.2f} x without what imports take"
        for name, row in rows.items()
        if name != FLOAT
    ]
    return "\n".join([aligned(cells), "", *lines])


def recipe_of(bits: str) -> dmq_ao.Recipe:
    """Rounded to nearest, embeddings too."""
    return recipes.minmax(bits, embeddings=True)


def quantized(net: nn.Module, samples: dmq_ao.CalibrationSet, bits: Sequence[str], batch: int) -> dict[str, Any]:
    """Rounded to nearest at each of ``bits``, embeddings too: how codes were found costs nothing here."""
    made = {}
    for scheme in bits:
        prepared = dmq_ao.prepare(net, recipe_of(scheme), samples.example())
        dmq_ao.calibrate(prepared, samples, progress=False, batch_size=batch)
        made[f"dmq_ao {scheme.upper()}"] = dmq_ao.convert(prepared)
    return made


def subject(model: str, loaders: Path | None) -> tuple[nn.Module, dmq_ao.CalibrationSet, int]:
    """A denoiser, samples and the rows of a call."""
    if model in NAMED:
        return *named_denoiser(model), NAMED[model].batch_size
    module = load_module(_given(loaders))
    net: nn.Module = getattr(module, model)()
    return net, record(net, samplers(module)[model], 4, 16, 1000), 4


def main() -> None:
    """Quantize, write, load in fresh processes, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=Path, help="Python file with the models' functions and samplers")
    parser.add_argument("--models", nargs="+", default=["cifar-unet"])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each")
    parser.add_argument("-o", "--out", type=Path, help="folder for the JSON files")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(json.loads(args.load))))
        return
    for model in args.models:
        net, samples, batch = subject(model, args.loaders)
        ours = quantized(net, samples, args.bits, batch)
        rows = measure(model, args.loaders, net, first_rows(samples, batch), ours, args.repeats)
        print(table(model, rows), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            report = {"model": model, "batch_size": batch, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
            report |= provenance({bits: recipe_of(bits) for bits in args.bits})
            (args.out / f"{model}.json").write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
