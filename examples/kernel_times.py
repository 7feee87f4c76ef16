"""Where the time of a compiled call goes: milliseconds by kind of kernel, for denoisers of ours.

    python examples/kernel_times.py --models dit-s-2 cifar-unet -o build/kernel_times
    python examples/kernel_times.py --loaders MODELS/loaders.py --models ddpm64 -o build/kernel_times

Operators are timed by PyTorch's profiler in the calling thread, which takes part in their work; what is left of a call
is the compiler's wrapper: memory, views, lookups of scales. Profiling costs time too, so shares count, not sums.
Writes ``<model>.json`` and ``<model>.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import OURS, case_of, ours
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dmq_ao
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.evaluation import machine

# The first that fits the name of an operator.
KINDS = {
    "integer convolutions": r"(dmq_ao_cpu|dmq_ao|onednn)::(q|int_)?conv",
    "integer linears": r"(dmq_ao_cpu|dmq_ao|onednn)::(q|int_)?linear",
    "attention": r"dmq_ao_cpu::attention|scaled_dot_product|flash_attention",
    "norm, SiLU and quantize": r"dmq_ao_cpu::group_norm_quantize",
    "GELU and quantize": r"dmq_ao_cpu::gelu_quantize",
    "Inductor's loops": r"cpp_fused|graph_\d+_cpp",
    "float convolutions": r"conv",
    "float products": r"mm\b|matmul|linear|bmm|baddbmm",
}
WRAPPER = "the rest"


def kind_of(operator: str) -> str:
    """The family that an operator's time is counted in."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operator)), WRAPPER)


def times(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Milliseconds a call by kind, in the calling thread; ``total`` is by the clock."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        total = (time.perf_counter() - started) * 1e3 / calls
    found = dict.fromkeys([*KINDS, WRAPPER], 0.0)
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / calls
    found[WRAPPER] += max(0.0, total - sum(found.values()))
    return {**{kind: ms for kind, ms in found.items() if ms}, "total": total}


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row a kind, a column a variant."""
    variants: Mapping[str, Mapping[str, float]] = report["ms"]
    where = report["machine"]
    kinds = [kind for kind in [*KINDS, WRAPPER, "total"] if any(kind in ms for ms in variants.values())]
    lines = [
        f"## {report['model']}, batch {report['batch_size']}",
        "",
        f"`examples/kernel_times.py`, {report['threads']} threads on {where['cpu']}, torch {where['torch']},"
        f" {report['date']}: ms a call (share).",
        "",
        f"| | {' | '.join(variants)} |",
        f"|---|{'---|' * len(variants)}",
    ]
    for kind in kinds:
        cells = [f"{ms.get(kind, 0.0):.1f} ({ms.get(kind, 0.0) / ms['total']:.0%})" for ms in variants.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def run(model: str, loaders: Path | None, names: Sequence[str], calls: int, folder: Path) -> dict[str, Any]:
    """The report of one model."""
    case = case_of(model, loaders, folder)
    found = {}
    for name, one in ours(case, names).items():
        with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}), torch.no_grad():
            net = dmq_ao.compile(one.denoiser, one.mode)

            def call(net: Callable[..., Tensor] = net) -> Tensor:
                return net(**case.inputs)

            for _ in range(2):
                call()
            found[name] = times(call, calls)
    return {
        "model": model,
        "batch_size": case.batch_size,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        **provenance({name: OURS[name][0]() for name in names}),
        "ms": found,
    }


def main() -> None:
    """Profile, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaders", type=Path, help="Python file with the models' functions and samplers")
    parser.add_argument("--models", nargs="+", default=["cifar-unet"])
    parser.add_argument("--ours", nargs="+", choices=sorted(OURS), default=["dmq_ao W8A8, max"], metavar="OURS")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        report = run(model, args.loaders, args.ours, args.calls, args.out)
        (args.out / f"{model}.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / f"{model}.md").write_text(table(report))
        print(table(report), flush=True)


if __name__ == "__main__":
    main()
