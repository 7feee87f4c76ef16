"""What this installation and this machine can do: versions, vector instructions, integer kernels, a self-test."""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import import_module, metadata
from typing import Any

from dmq_ao.backends.backend import BROKEN, NOTE, OK, Finding
from dmq_ao.backends.registry import ALL_BACKENDS
from dmq_ao.evaluation import machine
from dmq_ao.graph.private import cpu_has

# First version tried, and the first beyond: None where there is none yet.
TESTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 11), (2, 16)),
    "torchao": ((0, 17), None),
    "diffusers": ((0, 40), None),
}
_IMPORTS = {"torch": "torch.export", "torchao": "torchao.quantization.pt2e.quantize_pt2e", "diffusers": "diffusers"}


def examine() -> dict[str, Any]:
    """Look at everything; takes seconds, most of them importing.

    Returns:
        ``findings`` (level, subject, text), ``machine``, ``versions``, ``integer_kernels`` and ``healthy``, which is
        False when something is broken, not when it is merely slow.
    """
    findings = [Finding(OK, "python", sys.version.split()[0]), *(_package(name) for name in TESTED)]
    findings.append(_processor())
    findings += [finding for backend in ALL_BACKENDS.values() for finding in backend.examine()]
    return {
        "healthy": all(finding.level != BROKEN for finding in findings),
        "integer_kernels": any(backend.multiplies_integers() for backend in ALL_BACKENDS.values()),
        "versions": {name: _version(name) for name in ("dmq_ao", *TESTED)},
        "machine": machine(),
        "findings": [asdict(finding) for finding in findings],
    }


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
        "VNNI": cpu_has("avx512_vnni"),
        "AMX": cpu_has("amx_tile"),
    }
    words = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    return Finding(OK, "cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {words}")
