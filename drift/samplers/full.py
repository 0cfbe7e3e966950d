"""Every timestep of every rollout: the exact estimator, the yardstick of the others."""

from __future__ import annotations

import torch

from drift.contract import Rollout, TimestepPlan
from drift.samplers.base import TimestepSampler, candidates, sequential_plan


class FullSampler(TimestepSampler):
    """All timesteps that committed a valid token, in order; a shorter row's slots left over weigh 0.

    Exact under the loss normalisations `sample` and `trajectory`.
    """

    ragged = True

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """As many noisy states as the longest row has timesteps; nothing is drawn."""
        real = candidates(rollout)
        num_real = real.sum(dim=1)
        num_slots = max(int(num_real.max()), 1)
        timesteps = real.long().argsort(dim=1, descending=True, stable=True)[:, :num_slots].T
        slots = torch.arange(num_slots, device=real.device)
        return sequential_plan(rollout, timesteps, (slots[:, None] < num_real).float())
