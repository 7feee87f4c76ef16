"""What a layer multiplies, as rows: patches of its input, their means and second moments, weighted by sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmq_ao.graph.geometry import Geometry

# How far above the noise of rounding a damped variance must be.
_NOISE_MARGIN = 16


def windows(x: Tensor, shape: Geometry) -> Tensor:
    """The inputs of each output position: [B, positions, K], K in the order of the flattened weight rows.

    Args:
        x: [B, C, ...] of a convolution, [B, ..., C] of a linear layer.
        shape: of the layer.

    Returns:
        A view where that is possible: [B, positions..., C, kernel...] for convolutions, [B, positions, C] for linears.
    """
    if not shape.kernel:
        return x.reshape(len(x), -1, x.shape[-1])
    pads = [pad for one in reversed(shape.padding) for pad in (one, one)]
    x = torch.nn.functional.pad(x, pads)
    axes = len(shape.kernel)
    for axis, (size, stride, gap) in enumerate(zip(shape.kernel, shape.stride, shape.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))


def rows(x: Tensor, shape: Geometry, keep: Tensor | None = None) -> Tensor:
    """Rows [B * positions, groups, K / groups] that a layer multiplies with its weight.

    Args:
        x: as for ``windows``.
        shape: of the layer.
        keep: output positions to keep, counted in the flattened spatial axes; None for all.
    """
    view = windows(x, shape)
    if not shape.kernel:
        inputs = view if keep is None else view[:, keep]
        return inputs.reshape(-1, 1, inputs.shape[-1])
    axes = len(shape.kernel)
    spatial = view.shape[1 : 1 + axes]
    if keep is not None:
        index = torch.unravel_index(keep, spatial)
        places: list[Any] = [slice(None), *index]
        view = view[tuple(places)]
    return view.reshape(view.shape[: -1 - axes].numel(), shape.groups, -1)


def outputs(y: Tensor, shape: Geometry, keep: Tensor | None = None) -> Tensor:
    """A layer's output [B, ...] as rows [B * positions, out], in the order of ``rows``."""
    flat = y.flatten(2).transpose(1, 2) if shape.kernel else y.reshape(len(y), -1, y.shape[-1])
    flat = flat if keep is None else flat[:, keep]
    return flat.reshape(-1, flat.shape[-1])


class Moments:
    """Weighted means of inputs ``x`` [n, K] and of residuals ``r`` [n, out], and their second moments on request.

    Sums of squares lose the variance of rows that hardly vary about a large mean. ``precise`` tells; then the same
    rows, seen again ``around`` the means of the first time, lose nothing.
    """

    def __init__(
        self,
        inputs: int,
        out: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        second: bool = True,
        mixed: bool = True,
        around: Moments | None = None,
    ) -> None:
        """All zero.

        Args:
            inputs: K.
            out: outputs of the layer, or of one of its groups.
            dtype: to sum in.
            device: of the sums.
            second: keep the inputs' second moments [K, K], most of the work.
            mixed: keep those of residuals and inputs [out, K].
            around: of the same rows, whose means are taken off before anything is summed; None for zeros.
        """
        self.weight, self.centred, self.precision = 0.0, False, torch.finfo(dtype).eps
        self.sum_x, self.sum_r = (torch.zeros(n, dtype=dtype, device=device) for n in (inputs, out))
        self.xx = torch.zeros(inputs, inputs, dtype=dtype, device=device) if second else None
        self.rx = torch.zeros(out, inputs, dtype=dtype, device=device) if mixed else None
        self.origin = None if around is None else (around.mean_x().to(dtype), around.mean_r().to(dtype))

    def update(self, x: Tensor, r: Tensor, weight: Tensor) -> None:
        """Add rows ``x`` [n, K] and ``r`` [n, out] with one ``weight`` [n] each."""
        assert not self.centred, "the second moments were turned into a covariance"
        weight, x, r = weight.to(self.sum_x), x.to(self.sum_x), r.to(self.sum_x)
        if self.origin is not None:
            x, r = x - self.origin[0], r - self.origin[1]
        weighted = x * weight[:, None]
        self.weight += float(weight.sum())
        self.sum_x += weighted.sum(0)
        self.sum_r += weight @ r
        if self.xx is not None:
            self.xx.addmm_(weighted.T, x)
        if self.rx is not None:
            self.rx.addmm_(r.T, weighted)

    def mean_x(self) -> Tensor:
        """Mean of the inputs [K]."""
        mean = self.sum_x / self.weight
        return mean if self.origin is None else mean + self.origin[0]

    def mean_r(self) -> Tensor:
        """Mean of the residuals [out]."""
        mean = self.sum_r / self.weight
        return mean if self.origin is None else mean + self.origin[1]

    def precise(self, damping: float) -> bool:
        """Whether ``damping`` times the mean variance is well above what rounding did to the sums of squares.

        Noise in a matrix [K, K] is as strong as ``sqrt(K)`` times that of an element. Sums that overflowed are not
        precise either.
        """
        assert self.xx is not None, "second moments were not asked for"
        assert not self.centred, "the second moments were turned into a covariance"
        squares = self.xx.diagonal().mean() / self.weight
        variance = squares - (self.sum_x / self.weight).square().mean()
        noise = _NOISE_MARGIN * self.precision * math.sqrt(len(self.xx)) * squares
        return bool(torch.isfinite(squares)) and bool(damping * variance >= noise)

    def mean_square(self) -> float:
        """Mean over all inputs of the mean of their squares."""
        return float((self.covariance().diagonal() + self.mean_x().square()).mean())

    def covariance(self) -> Tensor:
        """Covariance of the inputs [K, K], in the memory of the second moments: nothing can be added any more."""
        assert self.xx is not None, "second moments were not asked for"
        if not self.centred:
            mean = self.sum_x / self.weight
            self.xx.div_(self.weight).addr_(mean, mean, alpha=-1)
            self.centred = True
        return self.xx

    def centred_rx(self) -> Tensor:
        """Covariance of residuals and inputs [out, K]."""
        assert self.rx is not None, "mixed moments were not asked for"
        return self.rx / self.weight - torch.outer(self.sum_r / self.weight, self.sum_x / self.weight)
