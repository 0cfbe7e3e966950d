"""Masking estimators of earlier work, which don't look at the order in which tokens were committed.

They mask valid tokens only and learn from all that they mask. RandomMask follows the one-step estimate with
random masks of diffu-GRPO (d1, arXiv 2504.12216) and UniGRPO (MMaDA, arXiv 2505.15809), CoupledMask the
complementary pairs of coupled-GRPO (DiffuCoder, arXiv 2506.20639), AllMask d1's fully masked completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.samplers.base import TimestepSampler, draws, require_positive


class RandomMaskSampler(TimestepSampler):
    """k masks a row, each of a random share of its valid tokens.

    Args:
        k: masks of a row, >= 1.
        ratio: share of the valid tokens that a mask covers, in (0, 1]; at least one token.
    """

    replays = False

    def __init__(self, k: int = 4, ratio: float = 0.3) -> None:
        require_positive("k", k)
        if not 0 < ratio <= 1:
            raise ConfigError(f"ratio is {ratio!r}: set it in (0, 1], the share of tokens that a mask covers")
        self.k = self.max_states = k
        self.ratio = ratio

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """k noisy states a row; see `TimestepSampler.plan`."""
        num_valid = rollout.completion_mask.sum(dim=1)
        num_masked = (num_valid.double() * self.ratio).long().clamp(min=1).minimum(num_valid)
        length = rollout.completion_mask.shape[1]
        noise = draws(rollout, self.k * length, generator).unflatten(1, (self.k, length)).transpose(0, 1)
        return _plan(torch.stack([_rank(n, rollout.completion_mask) < num_masked[:, None] for n in noise]))


class CoupledMaskSampler(TimestepSampler):
    """Two noisy states a row: a random half of its valid tokens masked, and its complement."""

    replays = False
    max_states = 2

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """Two noisy states a row; a row with a single valid token has one."""
        valid = rollout.completion_mask
        num_valid = valid.sum(dim=1)
        half = torch.minimum(num_valid // 2, num_valid - 1).clamp(min=1)[:, None]
        rank = _rank(draws(rollout, valid.shape[1], generator), valid)
        return _plan(torch.stack([valid & (rank >= half), valid & (rank < half)]))


class AllMaskSampler(TimestepSampler):
    """One noisy state a row, in which every valid token is masked."""

    replays = False
    max_states = 1

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """One noisy state a row; nothing is drawn."""
        return _plan(rollout.completion_mask[None])


def _rank(noise: Tensor, valid: Tensor) -> Tensor:
    """[N,C] int64, place of every valid position in a random order; invalid ones come after all of them."""
    return noise.masked_fill(~valid, torch.inf).argsort(dim=1).argsort(dim=1)


def _plan(masked: Tensor) -> TimestepPlan:
    return TimestepPlan(masked=masked, current=masked, weight=masked.any(dim=2).float())
