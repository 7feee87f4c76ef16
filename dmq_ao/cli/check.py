"""Commands that look at what there is: ``dmq-ao inspect``, ``verify`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmq_ao.cli.options import AUTO_BACKEND, BackendOption, Debug, FormatOption, Quantized, examples
from dmq_ao.cli.terminal import FAILURE, Format, emit

INSPECT_EXAMPLES = examples(
    "dmq-ao inspect out/",
    "dmq-ao inspect out/ --all",
    "dmq-ao inspect out/ --format json",
    "dmq-ao inspect out/bit_plan.json",
)

VERIFY_EXAMPLES = examples(
    "dmq-ao verify OUT                                            # damage, and whether a file is what it says",
    "dmq-ao verify OUT --public-key publisher.pem                 # and who signed it: OUT/model.sig",
    "dmq-ao verify OUT --identity me@example.org --issuer https://accounts.google.com",
)

DOCTOR_EXAMPLES = examples(
    "dmq-ao doctor",
    "dmq-ao doctor --format json",
)


def inspect_command(
    quantized: Annotated[
        Path, typer.Argument(help="A folder that `quantize` or dmq_ao.save wrote, or a bit_plan.json.")
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer; else those kept, those that fall back, and the noisiest.")
    ] = False,
    backend: BackendOption = AUTO_BACKEND,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Show what was done to each layer of a quantized denoiser, or the bits that a plan gives it.

    Kept in float or quantized, to how many bits, which kernel runs it on this machine, its output noise as calibration
    measured it (SQNR), and why where there is a reason.
    """
    from dmq_ao.cli import output
    from dmq_ao.pipelines import ptq

    if quantized.suffix == ".json":
        from dmq_ao.mixed_precision.bit_plan import BitPlan

        plan = BitPlan.load(quantized).summary()
        return emit(plan, lambda: output.plan_text(plan), form)
    report = ptq.describe_folder(quantized, backend.value)
    return emit(report, lambda: output.inspect_text(report, everything), form)


def verify_command(
    quantized: Quantized,
    signature: Annotated[Path | None, typer.Option(help="Signature file; default: model.sig in the folder.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="PEM file of the signer's key.")] = None,
    identity: Annotated[str | None, typer.Option(help="Identity of the signer (Sigstore), instead of a key.")] = None,
    issuer: Annotated[str | None, typer.Option(help="OpenID Connect issuer of that identity.")] = None,
    form: FormatOption = Format.HUMAN,
    debug: Debug = False,
) -> None:
    """Check a quantized folder: every checksum, record and operator, and who signed it.

    Nothing of it is run. Signatures are those of OpenSSF model signing: pip install 'dmq_ao[sign]'.
    """
    from dmq_ao.cli import output
    from dmq_ao.pipelines.verify import verify

    report = verify(quantized, signature=signature, public_key=public_key, identity=identity, issuer=issuer)
    emit(report, lambda: output.verify_text(report), form)


def doctor_command(form: FormatOption = Format.HUMAN, debug: Debug = False) -> None:
    """Check this installation and this machine.

    Versions against those that were tested, vector instructions, whether integer kernels will run and what is slow
    where they do not, and one int8 convolution against the sum of its integers. Exits with 1 when something is broken,
    not when it is merely slow.
    """
    from dmq_ao.cli import output
    from dmq_ao.cli.doctor import examine

    report = examine()
    emit(report, lambda: output.doctor_text(report), form)
    if not report["healthy"]:
        raise typer.Exit(FAILURE)
