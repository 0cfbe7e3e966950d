"""Rollout and update give the same tokens different probabilities: how different, and the weights against it.

A prefix cache holds keys and values of an earlier noisy state, and low precision rounds other shapes
differently, so that tokens are drawn from one distribution and learned from under another. Both
probabilities are those of the untempered, unfiltered softmax: what temperature, top-p and top-k do to the
draw is not part of the comparison.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drift.contract import ConfigError, MaskedBatch, Mismatch

# A factor beyond a million counts as a million: figures stay finite whatever one token does.
MAX_RATIO = 1e6


def importance_weights(proximal: Tensor, batch: MaskedBatch, cap: float) -> Tensor:
    """min(update's probability / rollout's probability, cap) of the tokens that a noisy state committed.

    Truncated importance sampling (Ionides, J. Comp. Graph. Stat. 17(2), 2008), put between rollout and
    trainer by Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
    Like there, a token's weight is its own: exact for one token given its noisy state, and blind to what the
    mismatch does to other tokens and to which states are reached.

    Args:
        proximal: [M,C] log-probabilities of the weights that made the rollout, nats.
        batch: the M noisy states they belong to.
        cap: largest weight, >= 1.

    Returns:
        [M,C] float32 in [0, cap], without a graph; 1 at all tokens but the current ones, whose probability at
        the rollout belongs to another noisy state.

    Raises:
        ConfigError: where the rollout's probabilities are unknown.
    """
    if batch.commit_logp is None or bool(torch.isneginf(batch.commit_logp).any()):
        raise ConfigError(
            f"importance_cap is {cap}: the noisy states come without the probabilities that their tokens had "
            "at the rollout (commit_probs); use a sampler of the rollout's own timesteps (Weighted, Full, "
            "Proportional, ...) and rollouts that record them, or set it to null"
        )
    difference = torch.where(batch.current, proximal.detach() - batch.commit_logp, 0.0)
    # Cut before exp, which could overflow.
    return difference.clamp(max=math.log(cap)).exp()


def measure_mismatch(proximal: Tensor, batch: MaskedBatch, cap: float | None = None) -> Mismatch | None:
    """Mismatch at the tokens that the noisy states committed; None where the rollout's side is unknown.

    KL(rollout || update) is estimated by k3 (Schulman, "Approximating KL divergence", 2020): exp(d) - 1 - d
    with d = update - rollout is never negative, and unbiased for tokens drawn from the rollout's softmax.

    Args:
        proximal: [M,C] log-probabilities of the weights that made the rollout, nats.
        batch: the M noisy states they belong to.
        cap: of the importance weights; None: all are 1.
    """
    if batch.commit_logp is None:
        return None
    exact = torch.where(batch.current, proximal.detach() - batch.commit_logp, 0.0)
    difference = exact.clamp(-math.log(MAX_RATIO), math.log(MAX_RATIO))
    num_tokens = batch.current.sum()
    if cap is None:
        weight, num_capped = num_tokens.float(), torch.zeros_like(num_tokens)
    else:
        weight = (importance_weights(proximal, batch, cap) * batch.current).sum()
        num_capped = (exact > math.log(cap)).sum()
    return Mismatch(
        num_tokens=num_tokens,
        # exp(d) - 1 would lose a small d in rounding.
        kl=(difference.expm1() - difference).sum(),
        weight=weight,
        num_capped=num_capped,
        # A rank may be without any state: the 0 is its log-ratio.
        max_ratio=torch.cat((difference.new_zeros(1), difference.abs().flatten())).max().exp(),
    )
