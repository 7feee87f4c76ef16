"""Options that several commands share, and the pipeline that they name. torch is loaded when a command runs."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmq_ao.backends import AUTO, NAMES
from dmq_ao.cli.terminal import Format, debug, debugging, option_values, read_prompts

if TYPE_CHECKING:
    from dmq_ao.pipelines.prompts import Prompts

BackendName = Enum("BackendName", {name.upper(): name for name in (AUTO, *NAMES)}, type=str)  # type: ignore[misc]
AUTO_BACKEND = BackendName(AUTO)


class CompileMode(str, Enum):
    """Choices of ``--mode``, which is that of ``dmq_ao.compile``."""

    DEFAULT = "default"
    MAX = "max"


class ObserverName(str, Enum):
    """Choices of ``--observer``."""

    MINMAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"
    EMA = "ema"


class Dtype(str, Enum):
    """Choices of ``--dtype``."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def examples(*lines: str) -> str:
    """Command lines as the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


Model = Annotated[str, typer.Argument(help="A diffusers pipeline folder, a .safetensors file, a Hub id, or `demo`.")]
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
Picture = Annotated[
    str | None,
    typer.Option("--image", metavar="PATH|noise", help="What the pipeline starts from: a picture, or a folder."),
]
Mask = Annotated[
    str | None, typer.Option("--mask", metavar="PATH|noise", help="Where to paint: white in a picture, or a folder.")
]
ControlPicture = Annotated[
    str | None, typer.Option("--control-image", metavar="PATH|noise", help="Of a ControlNet: a picture, or a folder.")
]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own by default.")]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own by default.")]
NegativePrompt = Annotated[str | None, typer.Option(metavar="TEXT", help="What not to draw.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Of classifier-free guidance; default: the pipeline's own.")]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Frames of a video.")]
Lora = Annotated[Path | None, typer.Option(help="LoRA weights, fused into the float pipeline (pip install peft).")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Dtype of the float pipeline.")]
Device = Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:1 ...")]
BackendOption = Annotated[
    BackendName, typer.Option(help="Backend of the quantized layers; auto takes the fastest that supports them.")
]
ModeOption = Annotated[
    CompileMode, typer.Option("--mode", help="Compilation mode; max is the fastest on CPUs (bfloat16 between layers).")
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Format of the result on stdout; all else goes to stderr.")
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=debug, help="Show tracebacks, and warnings of other libraries.")
]
Images = Annotated[int, typer.Option(min=1, help="Images from the same seeds, float and quantized.")]


def open_pipeline(
    model: str,
    prompt: Prompts,
    backend: BackendName = AUTO_BACKEND,
    packed: bool = False,
    device: str = "cpu",
    dtype: Dtype | None = None,
    lora: Path | None = None,
) -> Any:
    """A pipeline by folder, Hub id or name, ready to run; a prompt that it does not take is a usage error."""
    import torch

    from dmq_ao.pipelines.adapter import load_pipeline
    from dmq_ao.pipelines.prompts import call_arguments

    hide_loading_bars()
    float_dtype = None if dtype is None else getattr(torch, dtype.value)
    more = {} if lora is None else {"lora": lora}
    pipeline = load_pipeline(model, backend=backend.value, packed=packed, device=device, dtype=float_dtype, **more)
    with option_values():
        call_arguments(pipeline, [0], prompt)
    return pipeline


def call_conditions(prompt: list[str] | None, **rest: Any) -> Prompts:
    """What a pipeline's call is given, from the options: the prompts alone where there is nothing else."""
    from dmq_ao.pipelines.conditions import Conditions

    return Conditions(prompt, **rest) if any(value is not None for value in rest.values()) else prompt


def hide_loading_bars() -> None:
    """Of diffusers' components and transformers' weights: gone before they are read, unless ``--debug`` is given."""
    if debugging():
        return
    for library in ("diffusers", "transformers"):
        if find_spec(library) is not None:
            import_module(f"{library}.utils.logging").disable_progress_bar()
