"""What says what was wrong."""

from __future__ import annotations


class UnsupportedByBackend(ValueError):
    """A backend cannot run what the recipe asks for. ``reasons`` holds one sentence per layer or rule."""

    def __init__(self, backend: str, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"backend {backend!r} cannot run this recipe:\n  " + "\n  ".join(reasons))


class MissingStatistics(ValueError):
    """Something that must be seen before it can be quantized was not: an observer, or an empty recording."""


class InvalidFile(ValueError):
    """A file is truncated, foreign, of another version or of another model."""
