"""What is minimised: every objective gives one number per sample, and step weights say how much each counts."""

from dmq_ao.objectives.fine_grained import Compared, fine_grained_error
from dmq_ao.objectives.output import output_error, relative_error
from dmq_ao.objectives.relation import relation_error, smoothed
from dmq_ao.objectives.rounding import rounding_regularizer, temperature
from dmq_ao.objectives.step_weights import StepWeighting

__all__ = [
    "Compared",
    "StepWeighting",
    "fine_grained_error",
    "output_error",
    "relation_error",
    "relative_error",
    "rounding_regularizer",
    "smoothed",
    "temperature",
]
