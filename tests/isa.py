"""The layer suite on the instructions that ``ONEDNN_MAX_CPU_ISA`` leaves oneDNN: ``make test-isa``.

``python -m tests.isa`` runs the tests of the backend and counts its layers under each name; ``--layers`` counts those
of this process, as JSON: on integers and equal to exact sums, in float and equal to the reference with a reason, or
neither.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

import dmq_ao
from dmq_ao.backends.onednn.self_test import WORDS, sums
from tests.backends.exact import run_exactly
from tests.backends.one_layer import FLOAT, LAYERS, RECIPES, calibrated, distance, example, run

NAMES = ("AVX2", "AVX512_CORE", "AVX2_VNNI")
# What ATen may use beside oneDNN on such a CPU.
ATEN = {"AVX2": "avx2", "AVX512_CORE": "avx512", "AVX2_VNNI": "avx2"}
ROOT = Path(__file__).resolve().parents[1]
SUITE = (
    *("test_onednn.py", "test_onednn_fused.py", "test_onednn_measured.py", "test_onednn_packed.py"),
    *("test_self_test.py", "test_capabilities.py"),
)


def outcome(kind: str, recipe: str) -> str:
    """What becomes of one layer: ``integer``, ``float``, or how it is neither."""
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    samples = example(shape, -1 if kind == "tokens" else 1)
    prepared = calibrated(build(), RECIPES[recipe], samples)
    lowered, reference = dmq_ao.convert(prepared, "onednn"), dmq_ao.convert(prepared, "reference")
    x, t = samples.inputs["x"][:5], torch.tensor([900, 100, 520, 100, 0])
    actual = run(lowered, x, t)
    (row,) = lowered.layer_reports()
    if lowered.kernels["layer"].is_integer:
        off = distance(actual, run_exactly(reference, x=x, t=t)[0])
        return "integer" if off < 1e-6 else f"{kind} {recipe}: {row['kernel']}, off by {off:.2g}"
    same = torch.equal(actual, run(reference, x, t)) and row["kernel"] == FLOAT and row["why"]
    return "float" if same else f"{kind} {recipe}: {row['kernel']} ({row['why']}), not the reference"


def count_layers(recipes: Iterable[str]) -> dict[str, object]:
    """The verdicts of this process, and how many layers ran how."""
    counts = Counter(outcome(kind, recipe) for kind in LAYERS for recipe in recipes)
    faults = [name for name in counts if name not in ("integer", "float")]
    verdicts = {word: sums(word).value for word in WORDS}
    return {"sums": verdicts, "integer": counts["integer"], "float": counts["float"], "faults": faults}


def environment(name: str) -> dict[str, str]:
    """That of a process in which oneDNN has the instructions ``name``, and ATen no more."""
    return {**os.environ, "ONEDNN_MAX_CPU_ISA": name, "ATEN_CPU_CAPABILITY": ATEN.get(name, "default")}


def layers_under(name: str, recipes: Iterable[str]) -> dict[str, object]:
    """``count_layers`` of a process of its own."""
    command = [sys.executable, "-m", "tests.isa", "--layers", *recipes]
    done = subprocess.run(command, cwd=ROOT, env=environment(name), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", metavar="RECIPE", help="count layers here, of some recipes or of all")
    layers = parser.parse_args().layers
    if layers is not None:
        print(json.dumps(count_layers(layers or RECIPES)))
        return 0
    failed = 0
    asked = os.environ.get("ONEDNN_MAX_CPU_ISA")
    for name in [asked] if asked else NAMES:
        counts = layers_under(name, RECIPES)
        print(f"{name}: {json.dumps(counts)}", flush=True)
        suite = [f"tests/backends/{file}" for file in SUITE]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suite]
        failed += bool(counts["faults"]) + (subprocess.run(command, cwd=ROOT, env=environment(name)).returncode != 0)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
