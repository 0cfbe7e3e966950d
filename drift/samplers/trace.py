"""Estimators that learn from the tokens that a timestep committed, and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from drift.contract import Rollout, TimestepPlan, require
from drift.samplers.base import (
    TimestepSampler,
    candidates,
    draws,
    require_positive,
    require_token_probs,
    sequential_plan,
)

Importance = Literal["surprise", "uniform"]

# Nats added to every timestep, as in AGRPO's code: one whose tokens were certain can still be drawn.
_LEAST_SURPRISE = 1e-8
# Of the row's mean surprise: what a timestep counts whose draws committed padding alone, which has none.
_OF_PADDING = 0.25


class StepSampler(TimestepSampler):
    """k low-discrepancy draws of a row's timesteps, weighed so that the estimate is unbiased.

    Follows AGRPO (arXiv 2510.04019), which draws timesteps in proportion to the summed entropy of their
    tokens. Rollouts record no entropies; -log p of a sampled token is the unbiased estimate of one. AGRPO
    spreads its draws over the batch; here each row's own k strata are, so that a row does not depend on its
    neighbours. Draws of the same timestep are one noisy state with their weights added up. Unbiased under the
    loss normalisations `sample` and `trajectory`; the latter is AGRPO's.

    Args:
        k: draws of a row, >= 1; noisy states at most.
        importance: `surprise` draws in proportion to the sum of -log p of the timestep's valid tokens (one
            whose draws committed padding alone counts a quarter of the row's mean), `uniform` all timesteps
            alike.
    """

    weighs = True

    def __init__(self, k: int = 4, importance: Importance = "surprise") -> None:
        require_positive("k", k)
        self.k = self.max_states = k
        self.importance = importance
        require(
            self,
            importance in get_args(Importance),
            "importance",
            f"choose one of {list(get_args(Importance))}",
        )

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """At most k noisy states a row; see `TimestepSampler.plan`."""
        chance = self._chances(rollout)
        num_timesteps = chance.shape[1]
        strata = torch.arange(self.k, device=chance.device)
        points = (strata + draws(rollout, self.k, generator)) / self.k
        drawn = _inverse(chance, points)
        count = torch.zeros_like(chance).scatter_add(1, drawn, torch.ones_like(points)) * (chance > 0)
        num_states = (count > 0).sum(dim=1, keepdim=True)
        num_real = (chance > 0).sum(dim=1, keepdim=True)
        # The mean over the states is then the sum over the draws of 1 / (k S chance).
        weight = torch.where(count > 0, count * num_states / (self.k * num_real * chance), 0.0)
        chosen = (
            (count > 0).long().argsort(dim=1, descending=True, stable=True)[:, : min(self.k, num_timesteps)]
        )
        plan = sequential_plan(rollout, chosen.T, weight.gather(1, chosen).T.float())
        return replace(plan, current_only=True)

    def _chances(self, rollout: Rollout) -> Tensor:
        """[N,S] float64, probability of each timestep in one draw; 0 where none was committed."""
        real = candidates(rollout)
        size = real.double()
        if self.importance == "surprise":
            surprise = -require_token_probs(rollout).double().clamp(min=1e-10).log()
            surprise = surprise * rollout.completion_mask
            total = torch.zeros_like(size).scatter_add(1, rollout.step_map, surprise)
            num_valid = torch.zeros_like(size).scatter_add(
                1, rollout.step_map, rollout.completion_mask.double()
            )
            mean = total.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
            surprise = torch.where(num_valid > 0, total, _OF_PADDING * mean)
            size = torch.where(real, surprise + _LEAST_SURPRISE, 0.0)
        return size / size.sum(dim=1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)


class TraceSampler(TimestepSampler):
    """Every timestep of a row, `shrink` neighbours merged into one noisy state (TraceRL, arXiv 2509.06949).

    The state is that before the first of the merged timesteps, and the tokens of all of them are learned from
    (section 4.1; equation 3 takes the mean over a state's tokens, as the loss normalisation `sample` does;
    with `token` long rows would weigh more).
    The policy saw the state of the first alone, so that merged timesteps are no replay.

    Args:
        shrink: timesteps that are merged, >= 1; 1 is the exact policy gradient.
    """

    ragged = True

    def __init__(self, shrink: int = 1) -> None:
        require_positive("shrink", shrink)
        self.shrink = shrink
        self.replays = shrink == 1

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """As many noisy states as the longest row has merged timesteps; nothing is drawn."""
        real = candidates(rollout)
        group = torch.where(real, (real.long().cumsum(dim=1) - 1) // self.shrink, -1)
        num_groups = group.max(dim=1).values + 1
        slots = torch.arange(max(int(num_groups.max()), 1), device=real.device)[:, None, None]
        first = (group == slots).long().argmax(dim=2)  # [K,N]
        weight = (slots[:, :, 0] < num_groups).float()
        current = group.gather(1, rollout.step_map) == slots
        return TimestepPlan(
            masked=(rollout.step_map >= first[:, :, None]) & (weight > 0)[:, :, None],
            current=current,
            weight=weight,
            replay=self.shrink == 1,
            current_only=True,
            num_timesteps=num_groups,
        )


def _inverse(chance: Tensor, points: Tensor) -> Tensor:
    """[N,k] int64, the timesteps at which the cumulative probabilities pass points in (0,1)."""
    until = chance.cumsum(dim=1)
    found = torch.searchsorted(until, points * until[:, -1:], right=True)
    return found.clamp(max=chance.shape[1] - 1)
