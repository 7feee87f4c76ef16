"""Where calibration samples come from: what a denoiser is given while a sampler runs."""

from dmq_ao.calibration.samples import CalibrationSet, Recorder, record

__all__ = ["CalibrationSet", "Recorder", "record"]
