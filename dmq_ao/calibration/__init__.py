"""Where calibration samples come from: what a denoiser is given while a sampler runs."""

from dmq_ao.calibration.record import Recorder, record
from dmq_ao.calibration.samples import CalibrationSet

__all__ = ["CalibrationSet", "Recorder", "record"]
