"""What a layer multiplies, as rows: patches of its input, their means and second moments, weighted by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmq_ao.graph.geometry import Geometry


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
        chosen = view if keep is None else view[:, keep]
        return chosen.reshape(-1, 1, chosen.shape[-1])
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
    """Weighted means of inputs ``x`` [n, K] and of residuals ``r`` [n, out], and their second moments on request."""

    def __init__(
        self,
        inputs: int,
        out: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        second: bool = True,
        mixed: bool = True,
    ) -> None:
        """All zero.

        Args:
            inputs: K.
            out: outputs of the layer, or of one of its groups.
            dtype: to sum in.
            device: of the sums.
            second: keep the inputs' second moments [K, K], most of the work.
            mixed: keep those of residuals and inputs [out, K].
        """
        self.weight, self.centred = 0.0, False
        self.sum_x, self.sum_r = (torch.zeros(n, dtype=dtype, device=device) for n in (inputs, out))
        self.xx = torch.zeros(inputs, inputs, dtype=dtype, device=device) if second else None
        self.rx = torch.zeros(out, inputs, dtype=dtype, device=device) if mixed else None

    def update(self, x: Tensor, r: Tensor, weight: Tensor) -> None:
        """Add rows with one ``weight`` [n] each."""
        assert not self.centred, "the second moments were turned into a covariance"
        weight, x, r = weight.to(self.sum_x), x.to(self.sum_x), r.to(self.sum_x)
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
        return self.sum_x / self.weight

    def mean_r(self) -> Tensor:
        """Mean of the residuals [out]."""
        return self.sum_r / self.weight

    def covariance(self) -> Tensor:
        """Covariance of the inputs [K, K], in the memory of the second moments: nothing can be added any more."""
        assert self.xx is not None, "second moments were not asked for"
        if not self.centred:
            mean = self.mean_x()
            self.xx.div_(self.weight).addr_(mean, mean, alpha=-1)
            self.centred = True
        return self.xx

    def centred_rx(self) -> Tensor:
        """Covariance of residuals and inputs [out, K]."""
        assert self.rx is not None, "mixed moments were not asked for"
        return self.rx / self.weight - torch.outer(self.mean_r(), self.mean_x())
