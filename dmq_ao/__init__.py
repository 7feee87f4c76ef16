"""Post-training quantization of diffusion models: a torch.ao / FX graph-mode backend.

The public names are loaded when first used, so that ``dmq-ao --help`` need not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmq_ao import recipes
    from dmq_ao.api.calibrate import CalibrationReport, calibrate
    from dmq_ao.api.compile import compile
    from dmq_ao.api.quantize import convert, prepare, quantize
    from dmq_ao.api.saving import load, save
    from dmq_ao.api.search_bits import search_bits
    from dmq_ao.config import (
        Granularity,
        InvalidFile,
        MissingStatistics,
        Override,
        PowerOfTwo,
        QuantConfig,
        Ranges,
        Recipe,
        Selection,
        TensorConfig,
        UnsupportedByBackend,
    )
    from dmq_ao.denoiser import QuantizedDenoiser
    from dmq_ao.mixed_precision.bit_plan import BitPlan
    from dmq_ao.quantizer.quantizer import DiffusionQuantizer
    from dmq_ao.samples import CalibrationSet
    from dmq_ao.samples.record import record

__all__ = [
    "BitPlan",
    "CalibrationReport",
    "CalibrationSet",
    "DiffusionQuantizer",
    "Granularity",
    "InvalidFile",
    "MissingStatistics",
    "Override",
    "PowerOfTwo",
    "QuantConfig",
    "QuantizedDenoiser",
    "Ranges",
    "Recipe",
    "Selection",
    "TensorConfig",
    "UnsupportedByBackend",
    "calibrate",
    "compile",
    "convert",
    "load",
    "prepare",
    "quantize",
    "recipes",
    "record",
    "save",
    "search_bits",
]
_HOMES = (
    "config",
    "quantizer.quantizer",
    "mixed_precision.bit_plan",
    "samples",
    "denoiser",
    "api.calibrate",
    "api.compile",
    "api.quantize",
    "api.saving",
    "api.search_bits",
)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """A public name, from the file that defines it."""
        if name == "recipes":
            return import_module("dmq_ao.recipes")
        for home in _HOMES if name in __all__ else ():
            value = getattr(import_module(f"dmq_ao.{home}"), name, None)
            if value is not None:
                setattr(self, name, value)
                return value
        raise AttributeError(f"module 'dmq_ao' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
