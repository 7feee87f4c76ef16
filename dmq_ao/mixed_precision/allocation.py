"""How bits are shared out among output channels: outlier scores, error curves, swaps and exchanges (MPQ-DM, OMQ).

An error curve is a channel's weighted error at each candidate width, on the grid that is finally used. Kurtosis swaps
give the channels of the heaviest tails a bit that those of the lightest give up; an exchange gives every next bit to
the channel whose error falls most for it, under an exact budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmq_ao.config import TensorConfig
from dmq_ao.observers import RangeEstimator, quantize_weight

GAUSSIAN_KURTOSIS = 3.0


def kurtosis(rows: Tensor) -> Tensor:
    """Kurtosis [rows] of each row of ``rows`` [rows, n], as published: fourth moment over squared sample variance.

    Pearson's, 3 for a Gaussian up to ``((n - 1) / n)**2``. A constant row says nothing of tails and gets 3 (the
    published code gets NaN, and with it an extra bit).
    """
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    squares = centred.square()
    variance = squares.sum(1) / max(rows.shape[1] - 1, 1)
    alive = variance > torch.finfo(torch.float32).eps ** 2 * rows.double().square().mean(1)
    result = squares.square().mean(1) / variance.square().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(alive, result, GAUSSIAN_KURTOSIS)


def error_curves(
    weight: Tensor,
    importance: Tensor,
    config: TensorConfig,
    estimator: type[RangeEstimator],
    candidates: Sequence[int],
) -> Tensor:
    """Weighted squared error [out, len(candidates)] of each output channel at each width.

    Args:
        weight: [out, ...], channel scale multiplied in.
        importance: [out, n] or [n] of a row's weights: second moments of what they are multiplied with.
        config: granularity and kind of codes; its ``bits`` are not looked at.
        estimator: of the final grid's range.
        candidates: widths, ascending.
    """
    rows = weight.detach().float().flatten(1)
    curves = []
    for bits in candidates:
        widths = torch.full((len(rows),), bits, dtype=torch.uint8, device=rows.device)
        rounded = quantize_weight(rows, config, estimator, widths).dequantize()
        curves.append(((rounded - rows).square() * importance).sum(1))
    return torch.stack(curves, 1).double()


def swap(scores: Tensor, curves: Tensor, nominal: int, candidates: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Widths [out] with as many channels one bit above ``nominal`` as one below; the best of ``sizes`` by error.

    The channels of the highest scores go up, those of the lowest down; equal scores keep the order of channels.

    Args:
        scores: [out].
        curves: [out, candidates] of ``error_curves``.
        nominal: width of all others, hence the mean.
        candidates: of the curves; they hold ``nominal`` and its neighbours.
        sizes: numbers of channels to move each way, the fewest first; the fewest wins a tie.
    """
    order = torch.argsort(scores, stable=True)
    best, least = torch.full_like(order, nominal), float("inf")
    for size in sizes:
        widths = torch.full_like(order, nominal)
        widths[order[:size]], widths[order[len(order) - size :]] = nominal - 1, nominal + 1
        error = float(curves.gather(1, places(widths, candidates)[:, None]).sum())
        if error < least:
            best, least = widths, error
    return best


def places(widths: Tensor, candidates: Sequence[int]) -> Tensor:
    """Column [...] of each of ``widths`` [...] among the ascending ``candidates``."""
    return torch.searchsorted(torch.tensor(list(candidates), device=widths.device), widths.long())


def exchange(
    curves: Sequence[Tensor], costs: Sequence[int], candidates: Sequence[Sequence[int]], budget: int
) -> list[Tensor]:
    """Widths [out] of each layer, of least total error within ``budget`` bits.

    Every channel starts at its smallest candidate and climbs the lower convex hull of its curve, steepest step of all
    channels first (the Lagrangian optimum up to the last step that fits); what is left then goes to smaller steps.

    Args:
        curves: [out, candidates] of each layer; errors may be scaled by the layer's weight in the whole.
        costs: weights of one output channel, by layer: what a bit costs.
        candidates: widths of each layer, ascending.
        budget: bits for all.

    Raises:
        ValueError: for a budget below the smallest candidates.
    """
    least = sum(cost * len(curve) * options[0] for curve, cost, options in zip(curves, costs, candidates, strict=True))
    if budget < least:
        raise ValueError(f"the budget is {budget} bits, and the smallest widths take {least}; ask for more mean bits")
    steps = [_hull_steps(curve, cost, options) for curve, cost, options in zip(curves, costs, candidates, strict=True)]
    layer = torch.cat([torch.full((len(s[0]),), i) for i, s in enumerate(steps)])
    channel, column, price, gain = (torch.cat(parts) for parts in zip(*steps, strict=True))
    # Hulls are convex, so a channel's steps come in their own order; a stable sort keeps that among equal gains.
    order = torch.argsort(gain / price, descending=True, stable=True)
    left, reached = budget - least, [torch.zeros(len(curve), dtype=torch.long) for curve in curves]
    stuck: set[tuple[int, int]] = set()
    prices, layers, channels, columns = price.tolist(), layer.tolist(), channel.tolist(), column.tolist()
    for place in order.tolist():
        key = (layers[place], channels[place])
        if key in stuck:
            continue
        if prices[place] > left:
            stuck.add(key)
            continue
        left -= prices[place]
        reached[key[0]][key[1]] = columns[place]
    return [torch.tensor(list(options))[at] for options, at in zip(candidates, reached, strict=True)]


def _hull_steps(curve: Tensor, cost: int, options: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps of all channels along the lower convex hull: channel, column reached, bits it costs, error it saves."""
    channels, columns, prices, gains = [], [], [], []
    for channel, errors in enumerate(curve.tolist()):
        hull = [0]
        for place in range(1, len(options)):
            while len(hull) > 1 and _slope(errors, options, hull[-2], hull[-1]) <= _slope(
                errors, options, hull[-1], place
            ):
                hull.pop()
            hull.append(place)
        for before, after in zip(hull, hull[1:], strict=False):
            if errors[after] < errors[before]:
                channels.append(channel)
                columns.append(after)
                prices.append(cost * (options[after] - options[before]))
                gains.append(errors[before] - errors[after])
    return (
        torch.tensor(channels, dtype=torch.long),
        torch.tensor(columns, dtype=torch.long),
        torch.tensor(prices, dtype=torch.long),
        torch.tensor(gains, dtype=torch.float64),
    )


def _slope(errors: Sequence[float], options: Sequence[int], low: int, high: int) -> float:
    """Error saved a bit between two columns."""
    return (errors[low] - errors[high]) / (options[high] - options[low])
