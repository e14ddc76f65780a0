"""Losses of the held-out samples, computed on the training ranks without changing the training.

Nothing here draws random numbers, touches a gradient or a parameter, or changes the order of the batches. A run with
validation therefore trains bit for bit like one that holds out the same samples and never validates, unless --compile
chooses another program for it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from dataloaders.samples.prefetch import prefetch
from engine.batches import StepSource
from engine.distributed.world import World
from engine.loop import compute_losses
from engine.recipes import Recipe
from pite.model import PiTe


class Validation:
    """Validates every `every` steps, and at step `last`.

    source  of the held-out samples, with a plan `InOrder`
    """

    def __init__(
        self, model: PiTe, source: StepSource, recipe: Recipe, world: World, *, every: int, last: int, workers: int
    ) -> None:
        self._model, self._source, self._recipe, self._world = model, source, recipe, world
        self._every, self._last, self._workers = every, last, workers

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Loss, cross-entropy and L1 over all held-out samples, with the recipe's smoothing and lambda."""
        device = self._world.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        counts = np.zeros(2)
        plan = self._source.plan
        for number, batch in enumerate(prefetch(self._source.step, range(plan.steps_per_epoch), self._workers)):
            self._world.set_status(f"validating, batch {number + 1} of {plan.steps_per_epoch}")
            # Each batch is divided by its own counts, and weighted with them in the mean over all samples.
            weights = np.array(self._source.normalizers(plan.samples(number)), dtype=np.float64)
            counts += weights
            on_device = torch.from_numpy(weights).to(device)
            for micro_batch in batch.micro_batches:
                losses = compute_losses(self._model, micro_batch.to(device), self._recipe)
                sums += torch.stack([losses.ce, losses.l1]) * on_device
        if self._world.size > 1:
            dist.all_reduce(sums)
        ce, l1 = (float(total) / max(count, 1.0) for total, count in zip(sums.tolist(), counts))
        weight = self._recipe.trajectory_weight if self._recipe.head is not None else 0.0
        return {"validation_loss": ce + weight * l1, "validation_ce": ce, "validation_l1": l1}
