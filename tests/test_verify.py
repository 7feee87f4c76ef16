"""``verify`` reads all of a folder, compares a signature with its signer, and says which file is not what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import failure, run
from plain import flow, reseal
from safetensors.torch import load_file, save_file
from torch import nn

import dmq_ao
from dmq_ao.config import InvalidFile
from dmq_ao.pipelines.verify import SIGNATURE, verify
from dmq_ao.recipes import minmax
from dmq_ao.serialization.folder import CONFIG, TENSORS
from dmq_ao.serialization.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("captures_are_shared")


@pytest.fixture
def folder(model: nn.Module, samples: dmq_ao.CalibrationSet, tmp_path: Path) -> Path:
    dmq_ao.save(flow(model, minmax("w4a8"), samples)[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "secret.pem").write_bytes(secret)
    (tmp_path / "public.pem").write_bytes(public)
    return tmp_path / "secret.pem", tmp_path / "public.pem"


def sign(folder: Path, secret: Path) -> None:
    """As the command line of model_signing does."""
    from model_signing import hashing, signing

    config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE]))
    config.use_elliptic_key_signer(private_key=secret).sign(folder, folder / SIGNATURE)


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(bytes(data))


def test_a_whole_folder_is_counted(folder: Path) -> None:
    report = verify(folder)
    tensors = load_file(folder / TENSORS)
    assert report["tensors"] == len(tensors)
    assert report["layers"] == 4
    assert report["operators"] > 20
    assert report["signed_by"] is None
    assert report["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    out = run("verify", str(folder)).stdout
    assert f"{len(tensors)} tensors by checksum; 4 layers" in out
    assert "not compared with a signature" in out


def test_codes_that_load_leaves_in_the_file_are_read(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["conv.weight"] ^= 1
    save_file(tensors, folder / TENSORS)
    with pytest.raises(InvalidFile, match="the checksum of conv.weight is not the one in manifest.json"):
        verify(folder)
    assert "the checksum of conv.weight" in failure(1, "verify", str(folder))


def test_a_folder_without_a_manifest_has_one_checksum_for_all(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert verify(folder)["tensors"] == 0
    assert "no manifest, one checksum for all" in run("verify", str(folder)).stdout


def test_a_signature_tells_the_signer_from_an_editor(folder: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    sign(folder, secret)
    assert verify(folder, public_key=public)["signed_by"] == str(public)
    assert "signed by" in run("verify", str(folder), "--public-key", str(public)).stdout
    tensors = load_file(folder / TENSORS)
    tensors["last.bias"] += 1
    save_file(tensors, folder / TENSORS)
    reseal(folder)  # all checksums are right again
    assert verify(folder)["layers"] == 4
    with pytest.raises(InvalidFile, match="is not as .*public.pem signed it in .*model.sig"):
        verify(folder, public_key=public)


@pytest.mark.parametrize("what", ["signature", "key", "added file"])
def test_a_signature_that_does_not_fit_is_refused(what: str, folder: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    sign(folder, secret)
    if what == "signature":
        flip(folder / SIGNATURE, 0.5)
    elif what == "key":
        public.write_bytes(public.read_bytes()[:40])
    else:
        (folder / "extra.json").write_text("{}")
    with pytest.raises(InvalidFile, match="is not as .* signed it"):
        verify(folder, public_key=public)


def test_a_signer_is_asked_for_in_full(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    with pytest.raises(ValueError, match="give public_key=, or identity= and issuer="):
        verify(folder, signature=tmp_path / "model.sig")
    with pytest.raises(ValueError, match="either public_key=, or identity= with issuer="):
        verify(folder, identity="me@example.org")
    with pytest.raises(ValueError, match="either public_key=, or identity= with issuer="):
        verify(folder, public_key=tmp_path, identity="me@example.org", issuer="https://example.org")
    with pytest.raises(InvalidFile, match=r"model.sig is missing; sign the folder with `model_signing sign key`"):
        verify(folder, public_key=tmp_path / "public.pem")


def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ValueError, match=r"pip install 'dmq_ao\[sign\]'"):
        verify(folder, public_key="public.pem")


def test_a_pipeline_is_verified_by_its_denoiser(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    folder.rename(tmp_path / "pipe" / "unet")
    assert verify(tmp_path / "pipe")["denoiser"] == str(tmp_path / "pipe" / "unet")
    flip(tmp_path / "pipe" / "unet" / CONFIG, 0.9)
    with pytest.raises(InvalidFile):
        verify(tmp_path / "pipe")
