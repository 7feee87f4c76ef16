"""The commands of ``dmq-ao``: each reads its options, calls the library, and prints. torch is loaded when one runs."""

from __future__ import annotations

import typer

from dmq_ao.cli import check, measure, quantize, sample
from dmq_ao.cli.terminal import Commands

app = typer.Typer(
    cls=Commands,
    help="Post-training quantization of diffusion models: integers on disk and in the kernels.",
    epilog="`dmq-ao COMMAND --help` has examples of each command; `dmq-ao demo` shows all of it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


@app.callback()
def _root() -> None:
    """Post-training quantization of diffusion models: integers on disk and in the kernels."""


for _command, _examples in (
    (quantize.quantize_command, quantize.QUANTIZE_EXAMPLES),
    (sample.sample_command, sample.SAMPLE_EXAMPLES),
    (measure.compare_command, measure.COMPARE_EXAMPLES),
    (check.inspect_command, check.INSPECT_EXAMPLES),
    (measure.benchmark_command, measure.BENCHMARK_EXAMPLES),
    (check.verify_command, check.VERIFY_EXAMPLES),
    (check.doctor_command, check.DOCTOR_EXAMPLES),
    (measure.demo_command, measure.DEMO_EXAMPLES),
):
    app.command(_command.__name__.removesuffix("_command"), epilog=_examples)(_command)
