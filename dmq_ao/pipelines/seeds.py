"""Which seeds a calibration drew its trajectories from, kept in the pipeline it made, so that measuring takes others.

A seed is the noise that a trajectory starts from. A quantized pipeline that is compared with the float one on the
noise of its own calibration set looks better than it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmq_ao.config import InvalidFile, Selection, SelectMethod, as_json

INDEX = "model_index.json"
# diffusers leaves keys of the index alone that begin so, and older versions of dmq_ao do not read this one.
INDEX_KEY = "_dmq_ao"
_SEEDS = "calibration_seeds"


class OverlappingSeeds(ValueError):
    """Measuring was asked for on seeds that a calibration took. ``seeds`` holds those."""

    def __init__(self, what: str, seeds: range, name: str, calibration: range, instead: int) -> None:
        self.seeds = range(max(seeds.start, calibration.start), min(seeds.stop, calibration.stop))
        super().__init__(
            f"{what} from seeds {span(seeds)}, and {name} was calibrated on trajectories from seeds"
            f" {span(calibration)}: the same noise is in both, and the result flatters; leave the seed out, take one"
            f" from {instead} on, or allow it (allow_calibration_seeds=True, --allow-calibration-seeds)"
        )


def span(seeds: range) -> str:
    """Seeds as text: ``"4"``, or ``"0 to 12"``."""
    return str(seeds.start) if len(seeds) == 1 else f"{seeds.start} to {seeds.stop - 1}"


def trajectory_seeds(
    num_samples: int,
    *,
    steps: int,
    seed: int,
    trajectories: int | None,
    select: str | Selection,
    denoisers: int = 1,
) -> range:
    """Seeds of the trajectories that a recording runs, counting up from ``seed``; one a trajectory.

    Args:
        num_samples: rows to keep.
        steps: of the sampler.
        seed: the first.
        trajectories: how many; None for enough to give every kept row a trajectory of its own at each timestep, and
            twice that where the timesteps' shares are uneven.
        select: how the rows are spread over the timesteps.
        denoisers: that share the steps among them; each wants as many rows.
    """
    method = select.method if isinstance(select, Selection) else select
    even = denoisers * max(2, -(-num_samples // steps))
    return range(seed, seed + (trajectories or (even if method == SelectMethod.UNIFORM else 2 * even)))


def note_seeds(pipeline: Any, seeds: Iterable[range]) -> None:
    """Keep the seeds of a calibration in a pipeline's config: ``save_pipeline`` writes them into its index."""
    pipeline.register_to_config(**{INDEX_KEY: {_SEEDS: [[one.start, one.stop] for one in seeds]}})


def calibration_seeds(folder: str | Path) -> tuple[range, ...] | None:
    """Seeds that the calibration of a pipeline folder took, also by the folder of its denoiser; None where unknown.

    Unknown are those of a denoiser that stands alone, and of pipelines that were written before this was noted.

    Raises:
        InvalidFile: for an index that is not JSON, or whose seeds are no pairs of numbers.
    """
    folder = Path(folder).resolve()
    file = next((place / INDEX for place in (folder, folder.parent) if (place / INDEX).is_file()), None)
    if file is None:
        return None
    try:
        index = as_json.read_json(file)
        pairs = index.get(INDEX_KEY, {}).get(_SEEDS) if isinstance(index, dict) else None
        return None if pairs is None else tuple(_range(pair) for pair in pairs)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidFile(
            f"{file}: {INDEX_KEY}.{_SEEDS} must be a list of pairs [first, last + 1] ({error}); it was edited, copy it"
            " again"
        ) from error


def _range(pair: Sequence[int]) -> range:
    first, stop = pair
    if not 0 <= first < stop:
        raise ValueError(f"got {pair!r}")
    return range(first, stop)


def overlap(one: range, other: range) -> bool:
    """Whether two spans of seeds share one."""
    return max(one.start, other.start) < min(one.stop, other.stop)


def fresh_seeds(count: int, others: Iterable[range], first: int) -> range:
    """The first ``count`` seeds in a row, from ``first`` on, that are none of ``others``."""
    start = first
    for seeds in sorted(others, key=lambda one: one.start):
        if overlap(range(start, start + count), seeds):
            start = seeds.stop
    return range(start, start + count)


def check_seeds(what: str, seeds: range, calibrations: Mapping[str, Iterable[range] | None]) -> None:
    """Refuse seeds that a calibration took.

    Args:
        what: happens with them: "images are drawn".
        seeds: for it.
        calibrations: seeds by the name of what was calibrated on them; None where they are unknown.

    Raises:
        OverlappingSeeds: naming both, and seeds that are free.
    """
    spans = [(name, one) for name, ranges in calibrations.items() for one in ranges or ()]
    for name, one in spans:
        if overlap(seeds, one):
            raise OverlappingSeeds(what, seeds, name, one, max(other.stop for _, other in spans))
