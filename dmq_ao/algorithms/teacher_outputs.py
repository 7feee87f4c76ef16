"""What the float denoiser answers for each sample, in whatever order its rows lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from dmq_ao import graph
from dmq_ao.algorithms.row_layout import Layout
from dmq_ao.samples.graph_samples import GraphSamples


class TeacherOutputs:
    """The teacher's outputs, sample by sample.

    Attributes:
        targets: [N, rows of a sample, ...] float32, of all samples.
    """

    def __init__(self, prepared: GraphModule, samples: GraphSamples, layout: Layout, batch_size: int) -> None:
        """Of a prepared graph, which is the teacher as it stands; ``layout`` is that of its output."""
        self._samples, self._layout = samples, layout
        with torch.no_grad():
            batches = samples.batches(batch_size)
            self.targets = torch.cat([self.by_sample(graph.first_tensor(prepared(*b.arguments))) for b in batches])

    def by_sample(self, output: Tensor) -> Tensor:
        """An output as [samples, rows of a sample, ...] float32."""
        count = output.shape[self._layout.axis] // self._layout.per_sample
        return self._layout.by_sample(output.float(), count)

    def arguments(self, rows: Tensor) -> list[Tensor]:
        """The graph's arguments of the samples at ``rows`` [M]."""
        return self._samples.batch(rows).arguments
