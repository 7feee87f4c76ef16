"""The relation term of a distillation: features smoothed over windows of a trajectory, compared with the teacher's.

Of a window the sample's own step is live, the steps before it are not: the student is run on them without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dmq_ao.config import Relation
from dmq_ao.objectives import relation_error, smoothed
from dmq_ao.samples.graph_samples import GraphSamples

# Features of the teacher that are kept; where those of all samples are more, they are computed anew in every step.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Watched:
    """What a relation term looks at.

    Attributes:
        config: of the term.
        node: whose value are the features, [B, C, ...] or [B, ..., C].
        ch_axis: their channel axis.
        earlier: [N, window - 1] the samples before each sample, -1 where there are none.
    """

    config: Relation
    node: Node
    ch_axis: int
    earlier: Tensor


class Relations:
    """The relation term of samples, by their numbers.

    Attributes:
        node: whose value are the features.
    """

    def __init__(
        self,
        prepared: GraphModule,
        watched: Watched,
        samples: GraphSamples,
        holdout: Tensor,
        batch_size: int,
    ) -> None:
        """Of a prepared graph, which is the teacher as it stands.

        Args:
            prepared: the graph.
            watched: windows and features.
            samples: all of them.
            holdout: [N] bool, samples that nothing is fitted to, as parts of a window neither.
            batch_size: samples per forward pass.

        Raises:
            ValueError: where no window is left.
        """
        self._config, self._earlier = watched.config, watched.earlier
        self.node, self._ch_axis = watched.node, watched.ch_axis
        self._whole = ~holdout & (self._earlier >= 0).all(1) & ~holdout[self._earlier].any(1)
        if not bool(self._whole.any()):
            raise ValueError(f"each window of {len(holdout)} samples holds a sample that is held out; record more")
        self._teacher, self._samples = _Teacher(prepared, self.node), samples
        self._features = self._of_all(batch_size)

    def _of_all(self, batch_size: int) -> Tensor | None:
        """The teacher's features of all samples [N, ...]; None where they would be too much."""
        batches = self._samples.batches(batch_size)
        first = self._teacher.features(next(batches).arguments)
        if first[0].nbytes * len(self._samples) > KEPT_BYTES:
            return None
        return torch.cat([first, *(self._teacher.features(batch.arguments) for batch in batches)])

    def _teacher_features(self, batch: Tensor) -> Tensor:
        if self._features is not None:
            return self._features[batch]
        return self._teacher.features(self._samples.batch(batch).arguments)

    def error(self, batch: Tensor, features: Tensor, student: Callable[[Tensor], Tensor]) -> Tensor:
        """The term of samples [B], weighted; 0 where a sample has no window.

        Args:
            batch: [B], numbers of samples.
            features: the student's [B, ...], gradients flow.
            student: gives the student's features of other samples [M].
        """
        whole = self._whole[batch]
        if not bool(whole.any()):
            return features.new_zeros(len(batch))
        own, before = batch[whole], self._earlier[batch[whole]].unbind(1)
        with torch.no_grad():
            earlier = [student(rows) for rows in before]
            teacher = smoothed(self._teacher_features(own), [self._teacher_features(rows) for rows in before])
        config = self._config
        error = relation_error(
            smoothed(features[whole], earlier),
            teacher,
            ch_axis=self._ch_axis,
            temperature=config.temperature,
            reduce=config.reduce,
        )
        return error.new_zeros(len(batch)).masked_scatter(whole.to(error.device), config.weight * error)


class _Teacher(Interpreter):
    """The float denoiser, looked at on the way."""

    def __init__(self, prepared: GraphModule, node: Node) -> None:
        super().__init__(prepared)
        self._node = node

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n is self._node:
            self._value: Tensor = value
        return value

    def features(self, arguments: list[Tensor]) -> Tensor:
        """Value of the node [B, ...], float32, without gradient."""
        with torch.no_grad():
            self.run(*arguments)
        return self._value.float()
