"""Commands that measure: ``dmq-ao compare``, ``benchmark`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmq_ao import recipes
from dmq_ao.cli.options import (
    AUTO_BACKEND,
    BackendOption,
    Bits,
    CompileMode,
    ControlPicture,
    Debug,
    Device,
    FormatOption,
    GuidanceScale,
    Height,
    Images,
    Lora,
    Mask,
    ModeOption,
    NegativePrompt,
    NumFrames,
    Picture,
    Prompt,
    Steps,
    Width,
    call_conditions,
    examples,
    hide_loading_bars,
)
from dmq_ao.cli.terminal import Format, emit, option_values, say

COMPARE_EXAMPLES = examples(
    "dmq-ao compare demo out/",
    "dmq-ao compare ./my-ddpm w8a8/ w4a8/ -o report/ --images 64 --steps 50",
)

BENCHMARK_EXAMPLES = examples(
    "dmq-ao benchmark cifar-unet --mode max",
    "dmq-ao benchmark demo --bits w8a8 --batch-size 16 --threads 1",
    "dmq-ao benchmark out/",
    "dmq-ao benchmark ./my-img2img --image photos/ --prompt 'a cat' --height 512 --width 512",
    "dmq-ao benchmark dit-s-2 --bits w8a8 --mode max --peers",
    "dmq-ao benchmark cifar-unet --peer 'openvino*' --peer 'torch bf16*' --format json",
)

DEMO_EXAMPLES = examples(
    "dmq-ao demo",
    "dmq-ao demo -o report/ --images 64 --no-latency",
)


def compare_command(
    model: Annotated[str, typer.Argument(metavar="FLOAT", help="The float pipeline, as for `quantize`.")],
    quantized: Annotated[list[Path], typer.Argument(help="Folders that were quantized from it.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for report.html, report.json and pictures.")
    ] = None,
    images: Images = 16,
    steps: Steps = 20,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="First seed of the images; default: from 1000000 on, where no calibration was."),
    ] = None,
    allow_calibration_seeds: Annotated[
        bool, typer.Option("--allow-calibration-seeds", help="Compare on the noise of the calibration set, too.")
    ] = False,
    prompt: Prompt = None,
    image: Picture = None,
    mask: Mask = None,
    control_image: ControlPicture = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    num_frames: NumFrames = None,
    lora: Lora = None,
    backend: BackendOption = AUTO_BACKEND,
    device: Device = "cpu",
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Compare quantized pipelines with the float one they came from.

    One-step error: single calls of the denoiser on states of float trajectories that calibration did not see, at each
    timestep. PSNR: images from the same seeds, none of which a calibration took: a quantized pipeline's folder knows
    its own. Sizes and true mean bits stand beside them.
    """
    from dmq_ao.benchmarks.compare import compare
    from dmq_ao.evaluation import render_table, write_report

    hide_loading_bars()
    conditions = call_conditions(
        prompt,
        image=image,
        mask=mask,
        control_image=control_image,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
    )
    report, pictures = compare(
        model,
        quantized,
        images=images,
        steps=steps,
        seed=seed,
        allow_calibration_seeds=allow_calibration_seeds,
        prompt=conditions,
        lora=lora,
        backend=backend.value,
        device=device,
        say=say,
    )
    if out is not None:
        say(f"report: {write_report(report, pictures, out)['report.html']}")
    emit(report, lambda: render_table(report), form)


def benchmark_command(
    model: Annotated[
        str,
        typer.Argument(
            help="As for `quantize`; a quantized folder; or, with random weights, `cifar-unet`, `sd15-unet`,"
            " `sdxl-unet`, `dit-s-2`, `dit-xl-2` or `flux-blocks`."
        ),
    ],
    bits: Bits = "w4a8",
    power_of_two: Annotated[bool, typer.Option("--power-of-two", help="With channel exponents.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a call; 4 by default, 2 of `sd15-unet`.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch and of the peers.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time torch, torchao, OpenVINO with NNCF and ONNX Runtime too.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only the peers of such a name ('openvino*'); repeatable."),
    ] = None,
    prompt: Prompt = None,
    image: Picture = None,
    mask: Mask = None,
    control_image: ControlPicture = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    num_frames: NumFrames = None,
    lora: Lora = None,
    backend: BackendOption = AUTO_BACKEND,
    mode: ModeOption = CompileMode.DEFAULT,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Time the integer kernels against float32 on this machine.

    Both denoisers are compiled and called in turns on the same inputs, so that a slow minute slows both. A quantized
    folder is timed as it is, against its own architecture in float32.

    With peers, all are given the same calibration samples, and their sizes, compilation and one-step errors stand
    beside the times. They need pip install "dmq_ao[bench]"; a peer that fails, or is not installed, has a row
    that says so.
    """
    with option_values("--bits"):
        recipes.minmax(bits)
    from dmq_ao.benchmarks.benchmark import run_benchmark, torch_threads
    from dmq_ao.benchmarks.peers import chosen_peers
    from dmq_ao.cli import output

    with option_values("--peer"):
        names = chosen_peers(peer or ["*"]) if peers or peer else []
    hide_loading_bars()
    conditions = call_conditions(
        prompt,
        image=image,
        mask=mask,
        control_image=control_image,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
    )
    with torch_threads(threads):
        report = run_benchmark(
            model,
            bits,
            power_of_two=power_of_two,
            batch_size=batch_size,
            repeats=repeats,
            backend=backend.value,
            mode=mode.value,
            prompt=conditions,
            lora=lora,
            peers=names,
            progress=True,
            say=say,
        )
    emit(report, lambda: output.benchmark_text(report), form)


def demo_command(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("demo_report"),
    backend: BackendOption = AUTO_BACKEND,
    mode: Annotated[
        CompileMode | None, typer.Option("--mode", help="Compilation mode; default: max where it is available.")
    ] = None,
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

    hide_loading_bars()
    report = run_demo(
        out,
        backend=backend.value,
        mode=None if mode is None else mode.value,
        images=images,
        with_latency=latency,
        say=say,
    )
    emit(report, lambda: f"{render_table(report)}\n\nreport: {out / 'report.html'}", form)
