"""How much each sample's loss counts, by its place on the sampler's list of steps.

Focal weighting (DMQ, arXiv 2507.12933, adaptive timestep weighting): ``(1 - share) ** gamma``, where ``share`` is the
step's part of the running loss. A step that holds much of the loss counts less. A single step would hold all of it and
count nothing, and of two the weights are decided by the exponent alone: there all steps count alike. The paper's
Table 6 compares it with uniform and linear weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmq_ao.config import Reduce, StepWeights, Weighting

# Of fewer, focal weights were worse than none. The published rule keeps them, unless all are 0.
FEWEST_STEPS = 3


class StepWeighting:
    """The running state of step weights for one learning problem."""

    def __init__(self, config: StepWeights, steps: int) -> None:
        """Weights for a sampler of ``steps`` steps.

        Raises:
            ValueError: when a table has another number of steps.
        """
        if config.kind is Weighting.TABLE and len(config.table) != steps:
            raise ValueError(f"the table has {len(config.table)} weights and the samples {steps} steps")
        self.config, self.steps = config, steps
        self.running = torch.zeros(steps, dtype=torch.float64)
        self.updates = torch.zeros(steps, dtype=torch.float64)

    def __call__(self, loss: Tensor, step: Tensor) -> Tensor:
        """Weights [B] of samples with losses ``loss`` [B] at ``step`` [B], places on the list; without gradient.

        Focal weights see these losses too.
        """
        loss = loss.detach()
        if self.config.kind is Weighting.FOCAL:
            self._observe(loss.double().cpu(), step.cpu())
        return self.current()[step.cpu()].to(loss)

    def _observe(self, loss: Tensor, step: Tensor) -> None:
        sums = torch.zeros(self.steps, dtype=torch.float64).index_add(0, step, loss)
        counts = torch.bincount(step, minlength=self.steps)
        momentum = self.config.momentum
        if self.config.reduce is Reduce.SUM:
            self.running = momentum * self.running + (1 - momentum) * sums
            return
        # Absent steps keep their mean: letting it decay would read "sampled rarely" as "easy".
        present = counts > 0
        means = sums / counts.clamp_min(1)
        self.running = torch.where(present, momentum * self.running + (1 - momentum) * means, self.running)
        self.updates += present

    def current(self) -> Tensor:
        """Weights [steps] float64 as they stand, finite whatever was seen."""
        config = self.config
        if config.kind is Weighting.TABLE:
            return torch.tensor(config.table, dtype=torch.float64)
        if config.kind is Weighting.LINEAR:
            return 1 + config.gamma * (1 - torch.arange(self.steps, dtype=torch.float64) / self.steps)
        if config.kind is Weighting.UNIFORM:
            return torch.ones(self.steps, dtype=torch.float64)
        running = self.running
        if config.reduce is Reduce.MEAN:
            running = running / (1 - config.momentum ** self.updates.clamp_min(1))
        total = running.sum()
        too_few = config.reduce is Reduce.MEAN and self.steps < FEWEST_STEPS
        if total <= 0 or too_few:
            return torch.ones(self.steps, dtype=torch.float64)
        weights = (1 - running / total).clamp_min(0) ** config.gamma
        return weights if bool(weights.any()) else torch.ones_like(weights)
