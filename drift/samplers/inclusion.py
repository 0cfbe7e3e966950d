"""How likely each timestep is to be drawn, and the weights that undo it (Horvitz and Thompson, 1952)."""

from __future__ import annotations

import torch
from torch import Tensor

# Logarithms of the times at which the integral is taken: e^-28 of a probability is left of the first, and
# nothing is right of the last where log-probabilities are -SPAN or more. The integrand is analytic and falls
# to 0 on either side, so that the trapezium rule is exact to many digits.
SPAN = 30.0
_FIRST, _LAST, _STEP = -28.0, SPAN + 6.0, 0.25
_ROWS = 32  # at once: each takes 8 k bytes for every timestep and time


def successive_inclusion(logits: Tensor, k: int) -> Tensor:
    """[N,S] float64, probability that a timestep is among k successive draws without replacement.

    Successive draws are a race: with arrivals E_i exponential of rate p_i, the first k to arrive have the
    distribution of k successive draws (Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", 2006). So the probability is the integral over t of p_i exp(-p_i t) P(fewer than k others came
    before t); how many came is a sum of independent indicators, whose distribution is built up timestep by
    timestep.

    Args:
        logits: [N,S] float64 log-probabilities up to a constant, -inf where there is nothing to draw,
            otherwise within SPAN of the row's largest.
        k: draws, >= 1; a row with no more timesteps gives all of them.
    """
    return torch.cat([_successive(part, k) for part in logits.split(_ROWS)])


def _successive(logits: Tensor, k: int) -> Tensor:
    real = logits > -torch.inf
    probs = logits.masked_fill(~real.any(dim=1, keepdim=True), 0.0).softmax(dim=1)
    log_time = torch.arange(_FIRST, _LAST, _STEP, dtype=torch.float64, device=logits.device)
    exponent = probs[:, None] * log_time.exp()[:, None]  # [N,T,S]
    came = -torch.expm1(-exponent)
    before = _counts(came, k)
    after = _counts(came.flip(2), k).flip(2)
    # P(fewer than k others): j came of those before the timestep, and fewer than k - j of those after it.
    fewer = (before * after.cumsum(dim=3).flip(3)).sum(dim=3)
    found = (exponent * (-exponent).exp() * fewer).sum(dim=1) * _STEP
    everything = real.sum(dim=1, keepdim=True) <= k
    return torch.where(everything, 1.0, found).masked_fill(~real, 0.0)


def _counts(came: Tensor, k: int) -> Tensor:
    """[N,T,S,k], probability that j = 0 ... k-1 of the timesteps before each one have come."""
    state = torch.zeros((*came.shape[:2], k), dtype=came.dtype, device=came.device)
    state[..., 0] = 1.0
    states = [state]
    for chance in came[..., :-1].unbind(dim=2):
        one_more = torch.nn.functional.pad(state, (1, 0))[..., :k]
        state = state + chance[..., None] * (one_more - state)
        states.append(state)
    return torch.stack(states, dim=2)


def proportional_inclusion(size: Tensor, k: int) -> Tensor:
    """[N,S] float64, probabilities min(1, k times a timestep's share of its row's size).

    They add up to k, or to less, but at least 1, where one timestep has more than a k-th of it all.

    Args:
        size: [N,S] float64 >= 0; 0 where there is nothing to draw.
        k: draws at most, >= 1.
    """
    total = size.sum(dim=1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
    return (k * size / total).clamp(max=1.0)


def systematic_draws(inclusion: Tensor, uniforms: Tensor) -> Tensor:
    """[N,S] bool, timesteps drawn with given probabilities at equal distances, one random start a row.

    Systematic sampling (Madow, "On the theory of systematic sampling, II", 1949): with the probabilities laid
    end to end, those are drawn in whose stretch one of u, u + 1, u + 2 ... falls. As many are drawn as the
    probabilities add up to, rounded up or down, and neighbours seldom together.

    Args:
        inclusion: [N,S] float64 in [0,1].
        uniforms: [N,1] float64 in (0,1).
    """
    until = inclusion.cumsum(dim=1)
    # Where a stretch ends at a whole number, rounding must not miss it.
    until = torch.where((until - until.round()).abs() < 1e-9, until.round(), until)
    num_passed = until.floor() + (until.frac() > uniforms)
    return num_passed.diff(dim=1, prepend=torch.zeros_like(uniforms)) > 0


def inverse_weights(inclusion: Tensor, drawn: Tensor, timesteps: Tensor) -> Tensor:
    """[N,K] float32, weights with which the mean over a row's draws estimates that over all its timesteps.

    The estimator of Horvitz and Thompson ("A generalization of sampling without replacement from a finite
    universe", 1952), whose sum over draws of 1 / (S * inclusion) becomes a mean by the number of draws.

    Args:
        inclusion: [N,S] float64, each timestep's probability to be drawn; 0 at what is no candidate.
        drawn: [N,K] bool, draws that took place, of different timesteps.
        timesteps: [N,K] int64, which timestep each took.
    """
    num_candidates = (inclusion > 0).sum(dim=1, keepdim=True)
    num_drawn = drawn.sum(dim=1, keepdim=True)
    weight = num_drawn / (num_candidates * inclusion.gather(1, timesteps))
    return torch.where(drawn, weight, 0.0).float()
