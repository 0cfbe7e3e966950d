"""Timesteps drawn in proportion to how much they are likely to contribute to the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.samplers.base import (
    TimestepSampler,
    candidates,
    draws,
    require_positive,
    require_token_probs,
    sequential_plan,
)
from drift.samplers.inclusion import inverse_weights, proportional_inclusion, systematic_draws


class ProportionalSampler(TimestepSampler):
    """Up to k different timesteps of every row, with chances proportional to the size of their gradients.

    With inclusion probabilities proportional to what is summed, an estimate from few draws has the least
    error, and weights by their inverses make it unbiased whatever they are (Horvitz and Thompson, 1952). The
    gradient of a token's log p with respect to its logits is about 1 - p long, and those of several tokens
    are nearly at right angles: a timestep's size is the root of the sum of (1 - p)^2 over the valid tokens
    that it committed. One with more than a k-th of its row's size is certain to be drawn, and what it has
    beyond that is not spent on others: a row in which a few timesteps decide costs few passes. Draws are
    systematic (Madow, 1949), spread over the trajectory. Unbiased under the loss normalisations `sample` and
    `trajectory`.

    Args:
        k: timesteps of a row at most, >= 1.
        floor: share of the row's mean size that is added to every size, > 0, so that none is hardly ever
            drawn: 0.03 where the loss learns from the tokens alone that a timestep committed, 0.3 where from
            other masked tokens too, which the size leaves out.
    """

    weighs = True

    def __init__(self, k: int = 4, floor: float = 0.2) -> None:
        require_positive("k", k)
        if not 0 < floor < math.inf:
            raise ConfigError(f"floor is {floor!r}: set it to a positive share of the mean size, such as 0.1")
        self.k = self.max_states = k
        self.floor = floor

    def sizes(self, rollout: Rollout) -> Tensor:
        """[N,S] float64, sizes of the timesteps' gradients up to a factor; 0 where nothing was committed."""
        probs = require_token_probs(rollout).double()
        valid = rollout.completion_mask
        shape = (valid.shape[0], int(rollout.step_map.max()) + 1)
        zeros = torch.zeros(shape, dtype=torch.float64, device=probs.device)
        real = candidates(rollout)
        total = zeros.scatter_add(1, rollout.step_map, (1 - probs).square() * valid).sqrt()
        num_real = real.sum(dim=1, keepdim=True).clamp(min=1)
        mean = total.sum(dim=1, keepdim=True) / num_real
        return torch.where(real, total + (self.floor * mean).clamp(min=1e-9), 0.0)

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """At most k noisy states a row; see `TimestepSampler.plan`."""
        inclusion = proportional_inclusion(self.sizes(rollout), self.k)
        drawn = systematic_draws(inclusion, draws(rollout, 1, generator))
        timesteps = drawn.long().argsort(dim=1, descending=True, stable=True)[:, : self.k]
        timesteps = torch.nn.functional.pad(timesteps, (0, self.k - timesteps.shape[1]))
        slot = torch.arange(self.k, device=drawn.device)
        weight = inverse_weights(inclusion, slot < drawn.sum(dim=1, keepdim=True), timesteps)
        return sequential_plan(rollout, timesteps.T, weight.T)
