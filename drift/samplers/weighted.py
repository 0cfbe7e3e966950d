"""A few timesteps a rollout, drawn uniformly or where the policy was least sure (RLDF, arXiv 2605.25638)."""

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
from drift.samplers.inclusion import SPAN, inverse_weights, successive_inclusion

# Weights this close are equal: what is left is rounding, and T = 0 would take it for an order.
_EQUAL = 1e-8
_MIN_PROB = 1e-10


class WeightedSampler(TimestepSampler):
    """k timesteps of every row, without replacement, with probability softmax(weight / temperature).

    A row with fewer than k timesteps gives all of them, and the rest is drawn with replacement from the same
    distribution. Rows whose weights are all equal are drawn uniformly.

    Args:
        k: timesteps of a row, >= 1.
        temperature: >= 0. 0 takes the k largest weights (repeated from the largest where there are fewer);
            inf is uniform.
        importance_correction: weigh every draw by the inverse of its probability, and repeat none, so that
            the mean over a row's draws is an unbiased estimate of the mean over all of its timesteps. So the
            gradient is unbiased under the loss normalisations `sample` and `trajectory`; with `token` it is
            refused.

    Raises:
        ConfigError: where a value is outside its range, or the correction has no probabilities to go by.
    """

    def __init__(self, k: int = 4, temperature: float = 1.0, importance_correction: bool = False) -> None:
        require_positive("k", k)
        if math.isnan(temperature) or temperature < 0:
            raise ConfigError(
                f"temperature is {temperature!r}: set it to 0 (largest weights), a positive number, or inf"
            )
        if importance_correction and temperature == 0:
            raise ConfigError(
                "importance_correction is True with a temperature of 0: what is never drawn has no inverse "
                "probability; set temperature to a positive number, or importance_correction to false"
            )
        self.k = self.max_states = k
        self.temperature = float(temperature)
        self.importance_correction = importance_correction
        self.weighs = importance_correction

    def weights(self, rollout: Rollout) -> Tensor:
        """How unsure the policy was: [N,S] float32, -mean log token_prob of valid tokens, -inf where none.

        Raises:
            ConfigError: where the rollout, or one of its rows, recorded no token probabilities.
        """
        valid = rollout.completion_mask
        surprise = -require_token_probs(rollout).clamp(min=_MIN_PROB).log() * valid
        shape = (valid.shape[0], int(rollout.step_map.max()) + 1)
        total = torch.zeros(shape, dtype=torch.float32, device=surprise.device)
        count = total.scatter_add(1, rollout.step_map, valid.float())
        mean = total.scatter_add(1, rollout.step_map, surprise) / count.clamp(min=1)
        return mean.masked_fill(~candidates(rollout), -torch.inf)

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """k noisy states a row; see `TimestepSampler.plan`."""
        logits = self._logits(self.weights(rollout))
        num_timesteps = logits.shape[1]
        uniforms = draws(rollout, num_timesteps + self.k, generator)
        # Gumbel top-k draws without replacement, as successive draws would (Kool et al., arXiv 1903.06059).
        perturbed = logits + gumbel(uniforms[:, self.k :])
        first = perturbed.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        first = torch.nn.functional.pad(first, (0, self.k - first.shape[1]))
        num_real = (logits > -torch.inf).sum(dim=1, keepdim=True)
        draw = torch.arange(self.k, device=logits.device)
        if self.importance_correction:
            weight = inverse_weights(successive_inclusion(logits, self.k), draw < num_real, first)
            return sequential_plan(rollout, first.T, weight.T)
        again = self._again(logits, uniforms[:, : self.k])
        timesteps = torch.where(draw < num_real, first, again)
        weight = (num_real > 0).float().expand_as(timesteps)
        return sequential_plan(rollout, timesteps.T, weight.T)

    def _logits(self, weights: Tensor) -> Tensor:
        """[N,S] float64 log-probabilities up to a constant, -inf where there is nothing to draw."""
        weights = weights.double()
        real = weights > -torch.inf
        low = weights.masked_fill(~real, torch.inf).min(dim=1, keepdim=True).values
        high = weights.max(dim=1, keepdim=True).values
        equal = (high - low) < _EQUAL
        if self.temperature == 0:
            # Beyond any Gumbel draw (float64 uniforms end at 36): only the order of the weights counts.
            scaled = (weights.masked_fill(~real, 0).argsort(dim=1).argsort(dim=1) * 1e3).double()
        else:
            scaled = weights.masked_fill(~real, 0) / self.temperature
        if self.importance_correction:  # a chance below e^-SPAN would have a weight beyond all use
            scaled = scaled.clamp(min=scaled.masked_fill(~real, -torch.inf).amax(dim=1, keepdim=True) - SPAN)
        return torch.where(equal, 0.0, scaled).masked_fill(~real, -torch.inf)

    def _again(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """[N,k] int64 timesteps drawn with replacement."""
        empty = ~(logits > -torch.inf).any(dim=1, keepdim=True)
        cumulative = logits.masked_fill(empty, 0).softmax(dim=1).cumsum(dim=1)
        drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        return drawn.clamp(max=logits.shape[1] - 1)


class UniformSampler(WeightedSampler):
    """k timesteps of every row with equal probabilities: the weighted sampler at infinite temperature.

    Args:
        k: timesteps of a row, >= 1.
        importance_correction: see `WeightedSampler`; every weight is 1, and a row with fewer than k timesteps
            gives each of them once.
    """

    def __init__(self, k: int = 4, importance_correction: bool = False) -> None:
        super().__init__(k=k, temperature=math.inf, importance_correction=importance_correction)

    def weights(self, rollout: Rollout) -> Tensor:
        """[N,S] float32: 0 at the timesteps that committed a valid token, -inf elsewhere."""
        real = candidates(rollout)
        return torch.zeros_like(real, dtype=torch.float32).masked_fill(~real, -torch.inf)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel draws from uniform ones in (0,1)."""
    return -(-uniforms.log()).log()
