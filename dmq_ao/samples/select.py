"""How many calibration samples each timestep gets, from weights or from the denoiser's own features.

Temporal distribution-aligned calibration (EDA-DM, arXiv 2401.04585, section on TDAC) scores step i by how many other
steps look like it, its density, and by how far it points away from them all, its diversity::

    density_i   = #{j != i : MSE(F_i, F_j) <= radius}
    diversity_i = sum_{j != i} mean over samples and positions of (1 - cos(F_i, F_j)), along channels
    score       = minmax(density) + diversity_weight * minmax(diversity)

Both need no more than sums over pairs of steps, which add up batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmq_ao.config import Selection, SelectMethod

# A step without any weight of its own still takes what others have no room for.
_SMALLEST_SHARE = 1e-9
_HALVINGS = 200


def pair_sums(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances between all pairs of steps, summed over what was seen of both.

    Args:
        features: [steps, rows, positions, channels], row n of every step from one trajectory.

    Returns:
        Squared differences summed over all elements and cosine distances summed over rows and positions, each
        [steps, steps] float64 with a diagonal of zeros. An all-zero position is at distance 1 from any other.
    """
    features = features.double()
    # Distances do not change when all features move together, and close ones cancel less around their mean.
    centred = (features - features.mean(0)).flatten(1)
    squares = centred.square().sum(1)
    squared = squares[:, None] + squares - 2 * centred @ centred.T
    units = torch.nn.functional.normalize(features, dim=-1, eps=1e-12).flatten(1)
    positions = features[0, ..., 0].numel()
    angular = positions - units @ units.T
    energy = float(features.square().sum()) / len(features)
    return _hollow(squared, 1e-28 * energy), _hollow(angular, 1e-13 * positions)


def _hollow(pairs: Tensor, noise: float) -> Tensor:
    """Symmetric, 0 on the diagonal and where there is no more than rounding."""
    pairs = ((pairs + pairs.T) / 2).fill_diagonal_(0)
    return torch.where(pairs > noise, pairs, 0.0)


def tdac_scores(squared: Tensor, angular: Tensor, selection: Selection) -> Tensor:
    """Density plus weighted diversity of each step.

    Args:
        squared: [steps, steps], mean squared difference of the features of two steps.
        angular: [steps, steps], mean cosine distance.
        selection: radius or quantile, and the weight of diversity.

    Returns:
        [steps] float64, 0 or more; all 0 where no step differs from the others.
    """
    steps = len(squared)
    if steps < 2:
        return torch.zeros(steps, dtype=torch.float64)
    others = ~torch.eye(steps, dtype=torch.bool)
    radius = selection.radius
    if radius is None:
        radius = float(torch.quantile(squared[others], selection.quantile))
    density = ((squared <= radius) & others).sum(1).double()
    return _min_max(density) + selection.diversity_weight * _min_max(angular.sum(1))


def _min_max(values: Tensor) -> Tensor:
    """``values`` spread over 0 to 1; all 0 where they are equal but for rounding."""
    low, high = values.min(), values.max()
    if float(high - low) <= 1e-12 * float(high.abs()):
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def normal_weights(steps: int, mean: float, deviation: float) -> Tensor:
    """Normal density at each of ``steps`` steps, noisiest first (PTQ4DM, arXiv 2211.15736, section on NDTC).

    Args:
        steps: length of the sampler's list.
        mean: centre, as a share of the schedule counted from its clean end.
        deviation: likewise.

    Returns:
        [steps] float64, 1 at the centre.
    """
    place = 1 - (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return torch.exp(-0.5 * ((place - mean) / deviation).square())


def counts_of(weights: Tensor, total: int, selection: Selection, maximum: Sequence[int] | None = None) -> list[int]:
    """Samples of each step by a selection's way of rounding; where they are too few, some steps get none.

    Args:
        weights: [steps], 0 or more.
        total: samples in all.
        selection: minimum and rounding.
        maximum: most samples that each step has; no bound when None.
    """
    if selection.reference_rounding and selection.method is SelectMethod.TDAC:
        return reference_counts(weights, total)
    most = [total] * len(weights) if maximum is None else list(maximum)
    total = min(total, sum(most))
    minimum = selection.minimum
    while minimum and sum(min(minimum, bound) for bound in most) > total:
        minimum -= 1
    return apportion(weights, total, minimum, most)


def apportion(weights: Tensor, total: int, minimum: int, maximum: Sequence[int]) -> list[int]:
    """Integers in proportion to ``weights`` within bounds, by largest remainders; ties go to the earlier step.

    Args:
        weights: [steps] finite, 0 or more; all 0 counts as all alike.
        total: what the integers sum to.
        minimum: of every step that has as many.
        maximum: of each step.

    Returns:
        One integer a step; each is ``clip(m * weight, minimum, maximum)`` rounded, with one ``m`` for all.

    Raises:
        ValueError: for weights that are negative or not finite, or bounds that do not allow ``total``.
    """
    weights = weights.double()
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise ValueError(f"weights must be finite and 0 or more, got {weights.tolist()}")
    high = torch.tensor(list(maximum), dtype=torch.float64)
    low = high.clamp(max=minimum)
    if not int(low.sum()) <= total <= int(high.sum()):
        raise ValueError(
            f"{total} samples do not fit {len(weights)} steps of at least {minimum} and together at most"
            f" {int(high.sum())}"
        )
    top = float(weights.max())
    weights = (weights / top).clamp_min(_SMALLEST_SHARE) if top > 0 else torch.ones_like(weights)
    below, above = 0.0, float(total) / _SMALLEST_SHARE
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        fits = float((middle * weights).clamp(low, high).sum()) <= total
        below, above = (middle, above) if fits else (below, middle)
    shares = (below * weights).clamp(low, high)
    counts = shares.floor()
    missing = total - int(counts.sum())
    remainders = torch.where(counts < high, shares - counts, -1.0)
    counts[torch.sort(remainders, descending=True, stable=True).indices[:missing]] += 1
    return [int(count) for count in counts]


def reference_counts(weights: Tensor, total: int) -> list[int]:
    """Counts as the published code rounds them: half to even, then the sum mended; a count may be 0.

    What is missing goes to the largest counts, one each; what is too much is taken from the last step backwards, one
    from each that has any. Where the published code gives up, this goes round again.

    Args:
        weights: [steps], 0 or more; all 0 counts as all alike.
        total: what the counts sum to.
    """
    share = (
        weights.double() / weights.sum() if float(weights.sum()) > 0 else torch.full((len(weights),), 1 / len(weights))
    )
    counts = torch.round(share * total).long()
    while (left := total - int(counts.sum())) != 0:
        if left > 0:
            counts[torch.sort(counts, descending=True, stable=True).indices[:left]] += 1
        else:
            counts[counts.nonzero()[:, 0].flip(0)[:-left]] -= 1
    return [int(count) for count in counts]


def deal(need: Sequence[int], rows: int) -> list[tuple[int, ...]]:
    """Which steps each of ``rows`` trajectories gives a sample of.

    Every trajectory gives as many as any other, give or take one, spread over the schedule and no step twice; sorted
    by the last step, so that a batch of neighbours can stop early.

    Args:
        need: samples of each step, none more than ``rows``.
        rows: trajectories.
    """
    assert max(need, default=0) <= rows
    steps = [step for step, count in enumerate(need) for _ in range(count)]
    # Neighbours on the list are at most one step apart, and those ``rows`` apart never the same step.
    return sorted((tuple(steps[row::rows]) for row in range(rows)), key=lambda share: share[-1] if share else -1)
