"""Quantize a denoiser that is nobody's library model: a plain ``nn.Module`` with its own sampling loop.

    python examples/quantize_custom_module.py MODELS/loaders.py ddpm64 --bits w4a8 --power-of-two -o build/ddpm64

``loaders.py`` is a Python file with a function that builds the denoiser (``ddpm64()``, ``flowvit()`` or ``dit()``) and
its sampler. Prints how long it took and how much memory, the file's size against float32, the one-step error at ten
timesteps and the same-seed PSNR against float, and writes the quantized denoiser and ``report.json`` to the folder.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import dmq_ao
from dmq_ao.benchmarks.measure import by_timestep
from dmq_ao.benchmarks.provenance import provenance
from dmq_ao.evaluation import folder_bytes, image_fidelity, machine, one_step_error, peak_rss_bytes
from dmq_ao.evaluation.cost import float_bytes
from dmq_ao.samples import CalibrationSet

Sampler = Callable[[nn.Module, int, int], Tensor]  # denoiser, images, seed -> images in 0..1


def samplers(loaders: ModuleType) -> dict[str, Sampler]:
    """The sampling loop of each model, as its authors run it."""

    def flow(net: nn.Module, count: int, seed: int) -> Tensor:
        images: Tensor = loaders.sample_flowvit(net, torch.arange(count) % 10, steps=50, seed=seed)
        return images

    def ddim(net: nn.Module, count: int, seed: int) -> Tensor:
        return (loaders.sample_ddpm64(net, n=count, steps=20, seed=seed) + 1) / 2

    return {"ddpm64": ddim, "flowvit": flow, "dit": _dit}


@torch.no_grad()
def _dit(net: nn.Module, count: int, seed: int, steps: int = 20) -> Tensor:
    """DDIM on a linear schedule of 1000 timesteps, labels 0 to 9 in turn."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    x = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.linspace(999, 0, steps).round().long()
    for i, t in enumerate(timesteps):
        noise = net(x, t.expand(count), torch.arange(count) % 10)
        clean = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        after = alphas[timesteps[i + 1]] if i + 1 < steps else torch.tensor(1.0)
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return ((x + 1) / 2).clamp(0, 1)


def record(
    net: nn.Module,
    run: Sampler,
    trajectories: int,
    num_samples: int,
    seed: int,
    select: str | dmq_ao.Selection = "uniform",
) -> CalibrationSet:
    """Samples from trajectories drawn four at a time."""
    with dmq_ao.record(net, num_samples=num_samples, seed=seed, select=select) as recorder:
        for start in range(0, trajectories, 4):
            count = min(4, trajectories - start)
            with recorder.trajectory(part=count / (trajectories - start)):
                run(net, count, seed + start)
    return recorder.calibration_set()


def spread(states: CalibrationSet, timesteps: int) -> CalibrationSet:
    """The states at ``timesteps`` steps spread over the schedule."""
    steps = torch.linspace(0, len(states.timesteps) - 1, timesteps).round().long()
    return states.select(torch.nonzero(torch.isin(states.step, steps))[:, 0])


def load_module(file: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location("loaders", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaders"] = module  # torch.compile looks its classes up there
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Record, quantize, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaders", type=Path, help="Python file with the model's function and sampler")
    parser.add_argument("model", choices=("ddpm64", "flowvit", "dit"))
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--recipe", choices=sorted(dmq_ao.recipes.ALL_RECIPES), default="minmax")
    parser.add_argument("--power-of-two", action="store_true", help="for minmax")
    parser.add_argument("--ranges", choices=[r.value for r in dmq_ao.Ranges], default="static", help="for minmax")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--samples", type=int, default=80, help="calibration samples")
    parser.add_argument("--select", choices=("uniform", "normal", "tdac"), help="instead of the recipe's own")
    parser.add_argument("--trajectories", type=int, default=8, help="trajectories they are taken from")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    loaders = load_module(args.loaders)
    net, run = getattr(loaders, args.model)(), samplers(loaders)[args.model]

    started = time.monotonic()
    if args.recipe == "minmax":
        recipe = dmq_ao.recipes.minmax(args.bits, power_of_two=args.power_of_two, ranges=dmq_ao.Ranges(args.ranges))
    else:
        recipe = dmq_ao.recipes.ALL_RECIPES[args.recipe](args.bits)
    select = args.select or recipe.select
    samples = record(net, run, trajectories=args.trajectories, num_samples=args.samples, seed=1000, select=select)
    prepared = dmq_ao.prepare(net, recipe, samples.example(), backend=args.backend)
    calibration = dmq_ao.calibrate(prepared, samples, batch_size=args.batch_size)
    quantized = dmq_ao.convert(prepared, args.backend)
    dmq_ao.save(quantized, args.out)
    seconds, peak = time.monotonic() - started, peak_rss_bytes()

    loaded = dmq_ao.load(args.out, model=net, backend=args.backend)
    states = spread(record(net, run, trajectories=8, num_samples=10_000, seed=2000), timesteps=10)
    errors = one_step_error(net, loaded, by_timestep(states))
    pairs = [(run(loaded, 4, seed), run(net, 4, seed)) for seed in range(0, args.images, 4)]
    images = image_fidelity(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), data_range=1.0)
    report = {
        "model": args.model,
        "recipe": recipe.to_dict(),
        **provenance(recipe),
        "machine": machine(),
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "size_ratio": folder_bytes(args.out) / float_bytes(net),
        "mean_bits": loaded.mean_bits,
        "one_step_error": errors.mean,
        "errors_by_timestep": errors.to_dict(),
        **images,
        "calibration": calibration.to_dict(),
        "layers": loaded.layer_reports(),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{args.model} {args.bits}{' + PTS' if args.power_of_two else ''}: {len(loaded.records)} layers in integers")
    print(f"quantized in {seconds:.0f} s, peak memory {(peak or 0) / 2**30:.2f} GiB")
    print(f"file {report['size_ratio']:.4f} x float32, {loaded.mean_bits:.2f} mean bits over all weights")
    for timestep, error in zip(errors.timesteps, errors.errors, strict=True):
        print(f"  t = {timestep:8.3f}   one-step error {error:.4f}")
    print(f"one-step error {errors.mean:.4f}, PSNR {images['psnr_db']:.2f} dB (std {images['psnr_std_db']:.2f})")


if __name__ == "__main__":
    main()
