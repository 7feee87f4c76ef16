"""What this installation and this machine can do: versions, vector instructions, integer kernels, a self-test."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from torch.nn import functional

from dmq_ao.backends.cuda import backend as cuda
from dmq_ao.backends.onednn.backend import has_vnni
from dmq_ao.evaluation import machine

OK, NOTE, SLOW, BROKEN = "ok", "note", "slow", "broken"
# First version tried, and the first beyond: None where there is none yet.
TESTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 11), (2, 16)),
    "torchao": ((0, 17), None),
    "diffusers": ((0, 40), None),
}
_IMPORTS = {"torch": "torch.export", "torchao": "torchao.quantization.pt2e.quantize_pt2e", "diffusers": "diffusers"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``level``: ``ok``, ``note``, ``slow`` (works, not at full speed) or ``broken``."""

    level: str
    subject: str
    text: str


def examine() -> dict[str, Any]:
    """Look at everything; takes seconds, most of them importing.

    Returns:
        ``findings`` (level, subject, text), ``machine``, ``versions``, ``integer_kernels`` and ``healthy``, which is
        False when something is broken, not when it is merely slow.
    """
    findings = [Finding(OK, "python", sys.version.split()[0]), *(_package(name) for name in TESTED)]
    findings += [_processor(), _kernels(), _cuda()]
    if has_kernels():
        findings.append(_self_test())
    return {
        "healthy": all(finding.level != BROKEN for finding in findings),
        "integer_kernels": has_kernels() and has_vnni(),
        "versions": {name: _version(name) for name in ("dmq_ao", *TESTED)},
        "machine": machine(),
        "findings": [asdict(finding) for finding in findings],
    }


def has_kernels() -> bool:
    """Whether this PyTorch was built with oneDNN's int8 kernels."""
    return hasattr(torch.ops.onednn, "qconv_pointwise") and hasattr(torch.ops.onednn, "qlinear_pointwise")


def _cpu_says(question: str) -> bool:
    check = getattr(torch.cpu, question, None)
    return bool(check and check())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(BROKEN, name, f"not installed; pip install {name}")
    try:
        import_module(_IMPORTS[name])
    except Exception as error:  # whatever a broken installation raises, it is the finding
        return Finding(BROKEN, name, f"{version} does not import: {type(error).__name__}: {error}")
    first, beyond = TESTED[name]
    release = _release(version)
    if release < first or (beyond is not None and release >= beyond):
        upper = f" to {beyond[0]}.{beyond[1] - 1}" if beyond else " and newer"
        return Finding(NOTE, name, f"{version}, outside of the tested {first[0]}.{first[1]}{upper}")
    return Finding(OK, name, version)


def _release(version: str) -> tuple[int, int]:
    major, minor = (version.split("+")[0].split(".") + ["0"])[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _processor() -> Finding:
    facts = machine()
    has = {
        "AVX512": bool(facts["avx512"]),
        "VNNI": has_vnni(),
        "AMX": _cpu_says("_is_amx_tile_supported"),
    }
    words = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    return Finding(OK, "cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {words}")


def _kernels() -> Finding:
    if not has_kernels():
        text = "this PyTorch build has no oneDNN int8 operators: the reference backend runs, in float, slowly"
        return Finding(SLOW, "kernels", text)
    if not has_vnni():
        text = (
            "this CPU has no VNNI: its int8 products saturate, so layers run as float on dequantized values, no faster"
            " than float32; files are as small, pictures the same"
        )
        return Finding(SLOW, "kernels", text)
    return Finding(OK, "kernels", "backend 'auto' uses oneDNN's int8 kernels (onednn)")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding(OK, "cuda", "none; not needed")
    why = cuda.why_not_here(torch.device("cuda"))
    if why:
        return Finding(SLOW, "cuda", f"{torch.cuda.get_device_name()}: no integer kernels here: {why}")
    return Finding(OK, "cuda", f"{torch.cuda.get_device_name()}: backend 'cuda' has integer kernels for it")


def _self_test() -> Finding:
    """An int8 convolution against the sum of its integers: u8 and s8 over their whole ranges."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1, 64, 9, 9), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-128, 128, (32, 64, 3, 3), generator=generator, dtype=torch.int8)
    exact = functional.conv2d(codes.double() - 128, weight.double(), padding=1)
    try:
        actual = _int8_convolution(codes, weight, zero_point=128)
    except Exception as error:  # a kernel that does not run is the finding
        return Finding(BROKEN, "self-test", f"the int8 convolution fails: {type(error).__name__}: {error}")
    if torch.equal(actual.double(), exact):
        return Finding(OK, "self-test", "an int8 convolution equals the sum of its integers")
    if not has_vnni():
        return Finding(NOTE, "self-test", "int8 products saturate on this CPU, as said above; they are not used")
    return Finding(
        BROKEN, "self-test", "an int8 convolution differs from the sum of its integers; use backend 'reference'"
    )


def _int8_convolution(codes: torch.Tensor, weight: torch.Tensor, zero_point: int) -> torch.Tensor:
    """The raw sums [N, O, H, W] of a padded convolution on oneDNN, all scales one. Sums here are exact in float32."""
    kernels: Any = torch.ops.onednn
    ones = torch.ones(weight.shape[0])
    geometry = ([1, 1], [1, 1], [1, 1])
    packed = kernels.qconv_prepack(weight, ones, 1.0, 0, *geometry, 1, None)
    codes = codes.contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros_like(ones, dtype=torch.int32)
    inputs = (codes, 1.0, zero_point, packed, ones, zeros, None)
    plain: tuple[Any, ...] = (
        1,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )  # one group, scale and zero point of the output, nothing fused
    result: torch.Tensor = kernels.qconv_pointwise.default(*inputs, *geometry, *plain)
    return result
