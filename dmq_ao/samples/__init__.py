"""Where calibration samples come from: what a denoiser is given while a sampler runs."""

from dmq_ao.samples.calibration_set import CalibrationSet
from dmq_ao.samples.record import Recorder, record

__all__ = ["CalibrationSet", "Recorder", "record"]
