"""Post-training quantization of diffusion models: a torch.ao / FX graph-mode backend."""

from dmq_ao import recipes
from dmq_ao.annotate import DiffusionQuantizer
from dmq_ao.calibrate import CalibrationReport, calibrate
from dmq_ao.calibration import CalibrationSet, record
from dmq_ao.config import (
    Granularity,
    InvalidFile,
    MissingStatistics,
    Override,
    PowerOfTwo,
    QuantConfig,
    Ranges,
    Recipe,
    TensorConfig,
    UnsupportedByBackend,
)
from dmq_ao.module import QuantizedDenoiser
from dmq_ao.quantize import convert, load, prepare, quantize, save

__all__ = [
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
    "TensorConfig",
    "UnsupportedByBackend",
    "calibrate",
    "convert",
    "load",
    "prepare",
    "quantize",
    "recipes",
    "record",
    "save",
]
