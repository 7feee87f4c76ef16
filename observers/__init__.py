"""What is seen of a tensor becomes its integers. ``ALL_OBSERVERS`` names the range estimators."""

from dmq_ao.observers.activation import ActivationObserver
from dmq_ao.observers.attention import AttentionObserver
from dmq_ao.observers.ema import MovingAverage
from dmq_ao.observers.histogram import Histogram
from dmq_ao.observers.minmax import MinMax
from dmq_ao.observers.mse import MSE
from dmq_ao.observers.per_step import RangeEstimator, RangeTable
from dmq_ao.observers.percentile import Percentile
from dmq_ao.observers.power_of_two import Election, Vote, VoteReport, ballots, candidate_errors, elect
from dmq_ao.observers.weight import WeightObserver, quantize_weight

ALL_OBSERVERS: dict[str, type[RangeEstimator]] = {
    "minmax": MinMax,
    "mse": MSE,
    "percentile": Percentile,
    "ema": MovingAverage,
}

__all__ = [
    "ALL_OBSERVERS",
    "ActivationObserver",
    "AttentionObserver",
    "Election",
    "Histogram",
    "MSE",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "RangeEstimator",
    "RangeTable",
    "Vote",
    "VoteReport",
    "WeightObserver",
    "ballots",
    "candidate_errors",
    "elect",
    "quantize_weight",
]
