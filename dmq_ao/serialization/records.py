"""The layer records of a file: checked when it is opened, their codes read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmq_ao.config import InvalidFile
from dmq_ao.records import LayerRecord
from dmq_ao.serialization import meaning
from dmq_ao.serialization.layers import FIELDS, StoredLayer, layer_outline, layer_record
from dmq_ao.serialization.manifest import Manifest, sha256


class StoredRecords(Mapping[str, LayerRecord]):
    """The layer records of a file, each with its codes when asked for: memory holds one copy of those, the kernels'.

    Attributes:
        rest: tensors of the file that are of no layer, by name.
    """

    def __init__(
        self,
        file: Path,
        layers: Mapping[str, StoredLayer],
        checksum: str,
        manifest: Manifest | None,
        max_exponent: int,
    ) -> None:
        """Read all but the codes, and check all of it.

        Args:
            file: of tensors.
            layers: what the config says of them.
            checksum: of ``file`` now; a file that changes is not read from any more.
            manifest: of its tensors; None for a file of which the checksum was compared.
            max_exponent: of power-of-two scaling.

        Raises:
            InvalidFile: for tensors that are not those of the manifest.
            ValueError: for those that cannot be the layers', ``meaning.Meaningless`` among them.
        """
        self._file, self._layers, self._checksum = file.absolute(), dict(layers), checksum
        self._manifest, self._stamp = manifest, _stamp(file)
        with safe_open(self._file, "pt") as archive:
            self._names = frozenset(archive.keys())
            if manifest is not None:
                manifest.check_names(file, self._names)
            self._outlines = {
                name: self._outline(name, layer, archive, max_exponent) for name, layer in layers.items()
            }
            layer_keys = {key for name in layers for key in self.tensor_names(name)}
            self.rest = {key: self._tensor(archive, key) for key in sorted(self._names - layer_keys)}

    def _outline(self, name: str, layer: StoredLayer, archive: Any, max_exponent: int) -> LayerRecord:
        fields = meaning.check_record(name, layer, self._names)
        packed = archive.get_slice(f"{name}.weight")
        meaning.check_codes(name, layer, packed.get_shape(), packed.get_dtype())
        tensors = {one: self._tensor(archive, f"{name}.{one}") for one in fields - {"weight"}}
        meaning.check_tensors(name, layer, tensors, max_exponent, signed=self._manifest is None)
        return layer_outline(name, layer, {f"{name}.{one}": tensor for one, tensor in tensors.items()})

    def _tensor(self, archive: Any, key: str) -> Tensor:
        # Cloned, for what is read maps the file, and all that was ever looked at would count as memory.
        tensor: Tensor = archive.get_tensor(key).clone()
        if self._manifest is not None:
            self._manifest.check_tensor(self._file, key, tensor)
        return tensor

    def __getitem__(self, name: str) -> LayerRecord:
        """The record of a layer.

        Raises:
            KeyError: for an unknown layer.
            InvalidFile: when the file is gone or changed, or its codes are not those that were written.
        """
        layer = self._layers[name]
        self._check_unchanged()
        try:
            with safe_open(self._file, "pt") as archive:
                tensors = {key: self._tensor(archive, key) for key in self.tensor_names(name)}
            return layer_record(name, layer, tensors)
        except (SafetensorError, ValueError) as error:
            if isinstance(error, InvalidFile):
                raise
            raise InvalidFile(f"{self._file}: {name}: {error}; it is damaged or was edited, save again") from error

    def without_codes(self, name: str) -> LayerRecord:
        """The record with codes on the meta device.

        Raises:
            KeyError: for an unknown layer.
        """
        return self._outlines[name]

    @property
    def checksums(self) -> int:
        """How many tensors of the file are known by a checksum of their own."""
        return 0 if self._manifest is None else len(self._manifest.tensors)

    def tensor_names(self, name: str) -> list[str]:
        """The tensors of a layer's record in the file."""
        return [key for part in FIELDS if (key := f"{name}.{part}") in self._names]

    def _check_unchanged(self) -> None:
        if not self._file.exists():
            raise InvalidFile(f"{self._file} is gone, and the codes were still in it; load again from where it is now")
        if (stamp := _stamp(self._file)) != self._stamp:
            if sha256(self._file) != self._checksum:
                raise InvalidFile(f"{self._file} has changed since it was loaded; load again")
            self._stamp = stamp  # written again with the same bytes

    def __contains__(self, name: object) -> bool:
        """Whether there is a record of that layer; reads nothing."""
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        """Layer names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """How many layers."""
        return len(self._layers)


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
