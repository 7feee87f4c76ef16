"""Whether a folder is what it says, and who signed it: ``dmq-ao verify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmq_ao.api.saving import check
from dmq_ao.config import InvalidFile
from dmq_ao.pipelines.denoisers import denoiser_folders

SIGNATURE = "model.sig"
COUNTS = ("tensors", "layers", "operators", "bytes")


def verify(
    folder: str | Path,
    *,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    identity: str | None = None,
    issuer: str | None = None,
) -> dict[str, Any]:
    """Read all of a quantized folder, every tensor of it, as ``dmq_ao.load`` would; build and run nothing.

    Checksums find damage, and not an editor who made them anew. A signature (OpenSSF model signing, the extra
    ``sign``) says who wrote the folder, all files of it.

    Args:
        folder: of a quantized pipeline, or what ``dmq_ao.save`` wrote.
        signature: file of it; ``model.sig`` in the folder where only a signer is given.
        public_key: PEM file of the signer's elliptic-curve key.
        identity: of a signer by Sigstore, instead of a key; needs the network.
        issuer: of that identity (OpenID Connect).

    Returns:
        JSON-ready: what was checked, counted over all denoisers; ``signed_by`` is None without a signature.

    Raises:
        InvalidFile: for anything damaged, or signed by another, or not at all.
        ValueError: for a signature without a signer, or a signer without the package that knows signatures.
    """
    signer = _signer(public_key, identity, issuer)
    if signature is not None and signer is None:
        raise ValueError("signature needs a signer to compare with; give public_key=, or identity= and issuer=")
    if signer is not None:  # before anything else of it is read
        _check_signature(Path(folder), Path(signature or Path(folder) / SIGNATURE), signer)
    denoisers = [str(part) for part in denoiser_folders(folder).values()]
    counts = sum((Counter(check(part)) for part in denoisers), Counter[str]())
    return {
        "folder": str(folder),
        "denoiser": " and ".join(denoisers),
        **{name: counts[name] for name in COUNTS},
        "signed_by": signer and signer["name"],
    }


def _signer(public_key: str | Path | None, identity: str | None, issuer: str | None) -> dict[str, Any] | None:
    if public_key is not None and (identity or issuer) or bool(identity) != bool(issuer):
        raise ValueError("the signer must be either public_key=, or identity= with issuer=")
    if public_key is not None:
        return {"name": str(public_key), "public_key": Path(public_key)}
    return {"name": f"{identity} ({issuer})", "identity": identity, "oidc_issuer": issuer} if identity else None


def _check_signature(folder: Path, signature: Path, signer: Mapping[str, Any]) -> None:
    try:
        from model_signing import hashing, verifying
    except ImportError as error:
        raise ValueError(
            f"checking a signature needs model_signing ({error}); install it with: pip install 'dmq_ao[sign]'"
        ) from error
    if not signature.is_file():
        raise InvalidFile(
            f"{signature} is missing; sign the folder with `model_signing sign key`, or verify without a signer"
        )
    config: Any = verifying.Config()  # type: ignore[no-untyped-call]
    try:
        hashes: Any = hashing.Config()  # type: ignore[no-untyped-call]
        config.set_hashing_config(hashes.set_ignored_paths(paths=[signature]))
        if "public_key" in signer:
            config.use_elliptic_key_verifier(public_key=signer["public_key"])
        else:
            config.use_sigstore_verifier(identity=signer["identity"], oidc_issuer=signer["oidc_issuer"])
        config.verify(folder, signature)
    except Exception as error:  # the package's own, of any type: the signature, the key, or the files
        raise InvalidFile(
            f"{folder} is not as {signer['name']} signed it in {signature}: {error or type(error).__name__}"
        ) from error
