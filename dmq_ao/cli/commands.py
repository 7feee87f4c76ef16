"""The commands of ``dmq-ao``: each reads its options, calls the library, and prints. torch is loaded when one runs."""

from __future__ import annotations

import inspect as inspection
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from dmq_ao import recipes
from dmq_ao.backends import AUTO, NAMES
from dmq_ao.cli.terminal import FAILURE, Commands, Format, debug, emit, option_values, read_prompts, say
from dmq_ao.config import BitAllocation, Override, Ranges, Recipe, SelectMethod

app = typer.Typer(
    cls=Commands,
    help="Post-training quantization of diffusion models: integers on disk and in the kernels.",
    epilog="`dmq-ao COMMAND --help` has examples of each command; `dmq-ao demo` shows all of it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


BackendChoice = Enum("BackendChoice", {name.upper(): name for name in (AUTO, *NAMES)}, type=str)  # type: ignore[misc]
_AUTO = BackendChoice(AUTO)


class ModeChoice(str, Enum):
    """Of ``dmq_ao.compile``."""

    DEFAULT = "default"
    MAX = "max"


class Observer(str, Enum):
    """Range estimators by name."""

    MINMAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"
    EMA = "ema"


class Dtype(str, Enum):
    """Of a float pipeline."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


Model = Annotated[str, typer.Argument(help="A diffusers pipeline folder, a Hub id, or `demo`: the bundled denoiser.")]
Quantized = Annotated[Path, typer.Argument(help="A folder that `quantize` or dmq_ao.save wrote.")]
Bits = Annotated[str, typer.Option(help="Weight and activation bits: w8a8, w4a6 ..., w8a8-fp8; 16 stays in float.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Seed = Annotated[int, typer.Option(min=0, help="First seed; one for each image or trajectory, counting up.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT|@FILE",
        callback=read_prompts,
        help="What to draw, or a class (number or name); repeatable, or a file, one a line. Seeds take them in turn.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the float pipeline.")]
Device = Annotated[str, typer.Option(help="Where it runs: cpu, cuda, cuda:1 ...")]
BackendOption = Annotated[BackendChoice, typer.Option(help="What runs the integers; auto takes the fastest that can.")]
ModeOption = Annotated[
    ModeChoice, typer.Option("--mode", help="Of compilation; max is the fastest on CPUs (bfloat16 between layers).")
]
FormatOption = Annotated[Format, typer.Option("--format", help="Of the result on stdout; all else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", callback=debug, help="Tracebacks, and warnings of other libraries.")]
Images = Annotated[int, typer.Option(min=1, help="Images from the same seeds, float and quantized.")]


@app.callback()
def _root() -> None:
    """Post-training quantization of diffusion models: integers on disk and in the kernels."""


@app.command(
    epilog=_examples(
        "dmq-ao quantize demo -o out/",
        "dmq-ao quantize ./my-ddpm -o out/ --recipe default --bits w4a8 --trajectories 64",
        "dmq-ao quantize ./my-ddpm -o out/ --bits w4a8 --power-of-two --steps 50",
        "dmq-ao quantize ./my-ddpm -o out/ --recipe default --select tdac --trajectories 64",
        "dmq-ao quantize ./my-ddpm -o out/ --recipe mpq_dm --bits w3a6 --mean-bits 3.3",
        "dmq-ao quantize ./my-ddpm -o out/ --recipe mpq_dm --bits w3a6 --bit-plan edited.json",
        "dmq-ao quantize ./my-ddpm -o out/ --keep-float '*to_out*' --dry-run",
        "dmq-ao quantize ./my-sd -o out/ --prompt @prompts.txt --dtype bfloat16 --device cuda --backend cuda",
    )
)
def quantize(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Pipeline folder to write: absent or empty.")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"Method: {', '.join(recipes.ALL_RECIPES)}.")] = "minmax",
    bits: Bits = "w4a8",
    power_of_two: Annotated[
        bool | None,
        typer.Option("--power-of-two/--no-power-of-two", help="Channel exponents where skip connections join."),
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option("--embeddings/--no-embeddings", help="Time and label embeddings at 8 bits, instead of in float."),
    ] = None,
    ranges: Annotated[Ranges | None, typer.Option(help="When activation ranges are decided.")] = None,
    observer: Annotated[Observer | None, typer.Option(help="Range estimator.")] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="More layers to leave in float; repeatable.")
    ] = None,
    mean_bits: Annotated[
        float | None,
        typer.Option(help="Mean bits of weights below 8 bits; each output channel gets what saves most error."),
    ] = None,
    bit_plan: Annotated[
        Path | None, typer.Option(help="Bits of each output channel: a bit_plan.json of an earlier run, or edited.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, spread over the timesteps.")] = 256,
    trajectories: Annotated[
        int | None,
        typer.Option(min=1, help="Trajectories to take the samples from; more make learning recipes generalise."),
    ] = None,
    select: Annotated[
        SelectMethod | None,
        typer.Option(help="Share of each timestep in the samples; tdac looks at the denoiser's features."),
    ] = None,
    steps: Steps = 20,
    prompt: Prompt = None,
    seed: Seed = 0,
    backend: BackendOption = _AUTO,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    max_memory: Annotated[
        float | None,
        typer.Option(min=0.01, help="GiB of intermediate values that learning recipes hold; the rest goes to disk."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep progress here: the same command resumes an interrupted calibration.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show layers, bits and bytes; write nothing.")] = False,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Quantize a pipeline's denoiser after training.

    Calibration samples are recorded from the pipeline's own sampler; ranges and exponents are decided on them; the
    pipeline is written with packed integers and a report.json. Loading it needs no float weights.
    """
    given: dict[str, Any] = {"power_of_two": power_of_two, "embeddings": embeddings, "ranges": ranges}
    given["observer"] = observer and observer.value
    with option_values():
        chosen = _recipe(recipe, bits, given, keep_float or [], samples)
    with option_values():
        if select is not None:
            chosen = replace(chosen, select=replace(chosen.select, method=select))
        if mean_bits is not None:
            chosen = replace(chosen, allocation=replace(chosen.allocation or BitAllocation(), mean_bits=mean_bits))
    if out is None and not dry_run:
        raise typer.BadParameter("where to write; only --dry-run does without", param_hint="--output")
    from dmq_ao.cli import output as cli_output
    from dmq_ao.mixed_precision.bit_plan import BitPlan
    from dmq_ao.pipelines import ptq
    from dmq_ao.pipelines.adapter import check_free

    if out is not None:
        check_free(out)
    plan = None if bit_plan is None else BitPlan.load(bit_plan)
    pipeline = _pipeline(model, prompt, device=device, dtype=dtype)
    say(f"{model}: export the denoiser")
    with option_values():
        prepared = ptq.prepare_pipeline(pipeline, chosen, prompt=prompt, seed=seed, backend=backend.value)
    if dry_run or out is None:
        report = ptq.forecast(pipeline, prepared, chosen, steps)
        return emit(report, lambda: cli_output.forecast_text(report), form)
    report = ptq.quantize_pipeline(
        pipeline,
        prepared,
        chosen,
        out,
        steps=steps,
        prompt=prompt,
        seed=seed,
        backend=backend.value,
        batch_size=batch_size,
        state_dir=state_dir,
        trajectories=trajectories,
        max_memory=None if max_memory is None else int(max_memory * 2**30),
        bits=plan,
    )
    return emit({"model": model, **report}, lambda: cli_output.quantize_text(report), form)


@app.command(
    epilog=_examples(
        "dmq-ao sample out/ -o grid.png",
        "dmq-ao sample demo -o pictures/ --num 64 --seed 1000",
        "dmq-ao sample out/ -o grid.png --device cuda --backend cuda",
    )
)
def sample(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="A .png file for a grid, else a folder.")],
    num: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    steps: Steps = 20,
    seed: Seed = 0,
    prompt: Prompt = None,
    backend: BackendOption = _AUTO,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep 4-bit codes packed in memory: half the bytes, slower calls.")
    ] = False,
    device: Device = "cpu",
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="Of what is float; that which a quantized denoiser takes, and else float32."),
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the denoiser first.")] = False,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Draw images with a pipeline, float or quantized.

    A seed gives the same image in any batch, so grids of two pipelines can be laid side by side.
    """
    from dmq_ao.cli import gallery
    from dmq_ao.pipelines import adapter as diffusers_adapter

    pipeline = _pipeline(model, prompt, backend, packed, device, dtype)
    if compile_:
        diffusers_adapter.compile_denoiser(pipeline)
    seeds = range(seed, seed + num)
    images = diffusers_adapter.sample(pipeline, seeds, steps=steps, prompt=prompt, progress=True)
    files = [str(path) for path in gallery.write_images(images, seeds, out)]
    text = files[0] if len(files) == 1 else f"{len(files)} pictures in {out}"
    emit({"model": model, "seeds": list(seeds), "steps": steps, "files": files}, lambda: text, form)


@app.command(
    epilog=_examples(
        "dmq-ao compare demo out/",
        "dmq-ao compare ./my-ddpm w8a8/ w4a8/ -o report/ --images 64 --steps 50",
    )
)
def compare(
    model: Annotated[str, typer.Argument(metavar="FLOAT", help="The float pipeline, as for `quantize`.")],
    quantized: Annotated[list[Path], typer.Argument(help="Folders that were quantized from it.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for report.html, report.json and pictures.")
    ] = None,
    images: Images = 16,
    steps: Steps = 20,
    seed: Seed = 0,
    prompt: Prompt = None,
    backend: BackendOption = _AUTO,
    device: Device = "cpu",
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Compare quantized pipelines with the float one they came from.

    One-step error: single calls of the denoiser on states of float trajectories that calibration did not see, at each
    timestep. PSNR: images from the same seeds. Sizes and true mean bits stand beside them.
    """
    from dmq_ao.benchmarks.compare import compare as run
    from dmq_ao.evaluation import render_table, write_report

    _hide_loading_bars()
    where = {"backend": backend.value, "device": device}
    report, pictures = run(model, quantized, images=images, steps=steps, seed=seed, prompt=prompt, **where, say=say)
    if out is not None:
        say(f"report: {write_report(report, pictures, out)['report.html']}")
    emit(report, lambda: render_table(report), form)


@app.command(
    epilog=_examples(
        "dmq-ao inspect out/",
        "dmq-ao inspect out/ --all",
        "dmq-ao inspect out/ --format json",
        "dmq-ao inspect out/bit_plan.json",
    )
)
def inspect(
    quantized: Annotated[
        Path, typer.Argument(help="A folder that `quantize` or dmq_ao.save wrote, or a bit_plan.json.")
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer; else those kept, those that fall back, and the noisiest.")
    ] = False,
    backend: BackendOption = _AUTO,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Show what was done to each layer of a quantized denoiser, or the bits that a plan gives it.

    Kept in float or quantized, to how many bits, which kernel runs it on this machine, its output noise as calibration
    measured it (SQNR), and why where there is a reason.
    """
    from dmq_ao.cli import output as cli_output
    from dmq_ao.pipelines import ptq

    if quantized.suffix == ".json":
        from dmq_ao.mixed_precision.bit_plan import BitPlan

        plan = BitPlan.load(quantized).summary()
        return emit(plan, lambda: cli_output.plan_text(plan), form)
    report = ptq.describe_folder(quantized, backend.value)
    return emit(report, lambda: cli_output.inspect_text(report, everything), form)


@app.command(
    epilog=_examples(
        "dmq-ao benchmark cifar-unet --mode max",
        "dmq-ao benchmark demo --bits w8a8 --batch-size 16 --threads 1",
        "dmq-ao benchmark out/",
        "dmq-ao benchmark dit-s-2 --bits w8a8 --mode max --peers",
        "dmq-ao benchmark cifar-unet --peer 'openvino*' --peer 'torch bf16*' --format json",
    )
)
def benchmark(
    model: Annotated[
        str,
        typer.Argument(
            help="As for `quantize`; a quantized folder; or, with random weights, `cifar-unet`, `dit-s-2` or"
            " `sd15-unet`."
        ),
    ],
    bits: Bits = "w4a8",
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="With channel exponents.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a call; 4 by default, 2 of `sd15-unet`.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, and of the peers.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time torch, torchao, OpenVINO with NNCF and ONNX Runtime too.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only the peers of such a name ('openvino*'); repeatable."),
    ] = None,
    prompt: Prompt = None,
    backend: BackendOption = _AUTO,
    mode: ModeOption = ModeChoice.DEFAULT,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Time the integer kernels against float32 on this machine.

    Both denoisers are compiled and called in turns on the same inputs, so that a slow minute slows both. A quantized
    folder is timed as it is, against its own architecture in float32.

    With peers, all are given the same calibration samples, and their sizes, compilation and one-step errors stand
    beside the times. It needs pip install "dmq_ao[bench]"; a peer that fails has a row that says so.
    """
    with option_values("--bits"):
        recipes.minmax(bits)
    from dmq_ao.benchmarks.benchmark import run_benchmark
    from dmq_ao.benchmarks.peers import chosen_peers
    from dmq_ao.cli import output as cli_output

    with option_values("--peer"):
        names = chosen_peers(peer or ["*"]) if peers or peer else []
    _hide_loading_bars()
    report = run_benchmark(
        model,
        bits,
        power_of_two=power_of_two,
        batch_size=batch_size,
        repeats=repeats,
        threads=threads,
        backend=backend.value,
        mode=mode.value,
        prompt=prompt,
        peers=names,
        progress=True,
        say=say,
    )
    emit(report, lambda: cli_output.benchmark_text(report), form)


@app.command(
    epilog=_examples(
        "dmq-ao verify OUT                                            # damage, and whether a file is what it says",
        "dmq-ao verify OUT --public-key publisher.pem                 # and who signed it: OUT/model.sig",
        "dmq-ao verify OUT --identity me@example.org --issuer https://accounts.google.com",
    )
)
def verify(
    quantized: Quantized,
    signature: Annotated[Path | None, typer.Option(help="Of the folder; model.sig in it if not given.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="PEM file of the signer's key.")] = None,
    identity: Annotated[str | None, typer.Option(help="Of the signer by Sigstore, instead of a key.")] = None,
    issuer: Annotated[str | None, typer.Option(help="Of that identity (OpenID Connect).")] = None,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Check a quantized folder: every checksum, record and operator, and who signed it.

    Nothing of it is run. Signatures are those of OpenSSF model signing: pip install 'dmq_ao[sign]'.
    """
    from dmq_ao.cli import output as cli_output
    from dmq_ao.pipelines.verify import verify as verified

    report = verified(quantized, signature=signature, public_key=public_key, identity=identity, issuer=issuer)
    emit(report, lambda: cli_output.verify_text(report), form)


@app.command(epilog=_examples("dmq-ao doctor", "dmq-ao doctor --format json"))
def doctor(form: FormatOption = Format.HUMAN, debug: Debug = False) -> None:
    """Check this installation and this machine.

    Versions against those that were tested, vector instructions, whether integer kernels will run and what is slow
    where they do not, and one int8 convolution against the sum of its integers. Exits with 1 when something is broken,
    not when it is merely slow.
    """
    from dmq_ao.cli import output as cli_output
    from dmq_ao.cli.doctor import examine

    report = examine()
    emit(report, lambda: cli_output.doctor_text(report), form)
    if not report["healthy"]:
        raise typer.Exit(FAILURE)


@app.command(epilog=_examples("dmq-ao demo", "dmq-ao demo -o report/ --images 64 --no-latency"))
def demo(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("demo_report"),
    backend: BackendOption = _AUTO,
    mode: Annotated[ModeChoice | None, typer.Option("--mode", help="Of compilation; max where it can.")] = None,
    images: Images = 16,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Compile and time; most of the run.")] = True,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Quantize the bundled denoiser, measure, write a page.

    Rounded to nearest and by the default recipe: size, one-step error, PSNR of same-seed images and, compiled, latency
    (``--mode max`` needs a C++ compiler, as torch.compile itself does, and ninja). Takes minutes; needs no network.
    """
    from dmq_ao.benchmarks.demo import run_demo
    from dmq_ao.evaluation import render_table

    _hide_loading_bars()
    report = run_demo(
        out,
        backend=backend.value,
        mode=None if mode is None else mode.value,
        images=images,
        with_latency=latency,
        say=say,
    )
    emit(report, lambda: f"{render_table(report)}\n\nreport: {out / 'report.html'}", form)


def _recipe(name: str, bits: str, given: dict[str, Any], keep_float: list[str], samples: int) -> Recipe:
    """A recipe by name, with what was given of its own parameters.

    Raises:
        ValueError: for an unknown recipe, bits, or a parameter that the recipe does not have.
    """
    if name not in recipes.ALL_RECIPES:
        raise ValueError(f"recipe {name!r} is not known; the recipes are {sorted(recipes.ALL_RECIPES)}")
    build = recipes.ALL_RECIPES[name]
    wanted = {key: value for key, value in given.items() if value is not None}
    foreign = sorted(wanted.keys() - inspection.signature(build).parameters.keys())
    if foreign:
        raise ValueError(f"the recipe {name!r} decides {', '.join(foreign)} itself; leave the options out")
    recipe = build(bits, **wanted)
    kept = (Override(pattern, keep_float=True) for pattern in keep_float)  # last, so that they win
    config = replace(recipe.config, overrides=(*recipe.config.overrides, *kept))
    return replace(recipe, config=config, num_samples=samples)


def _pipeline(
    model: str,
    prompt: list[str] | None,
    backend: BackendChoice = _AUTO,
    packed: bool = False,
    device: str = "cpu",
    dtype: Dtype | None = None,
) -> Any:
    import torch

    from dmq_ao.pipelines.adapter import load_pipeline
    from dmq_ao.pipelines.prompts import told

    _hide_loading_bars()
    wanted = None if dtype is None else getattr(torch, dtype.value)
    pipeline = load_pipeline(model, backend=backend.value, packed=packed, device=device, dtype=wanted)
    with option_values("--prompt"):
        told(pipeline, [0], prompt)
    return pipeline


def _hide_loading_bars() -> None:
    """Of diffusers' own components: gone before they are read."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
