"""Masks from which the likelihood of whole completions is estimated, by bounds of it.

With l of a completion's L tokens masked, uniformly drawn, the mean log-probability of a masked token is in
expectation the evidence lower bound (ELBO) divided by L: the bound of masked diffusion, the integral over t
of 1/t times the sum over tokens masked with probability t (MDLM, arXiv 2406.07524), with l in place of t L,
which makes the same expectation out of fewer values. A plan's weights are such that, of each row, the mean
over its states of weight times the sum of the masked tokens' log-probabilities estimates the bound per token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drift.contract import Rollout, SequenceLevel, TimestepPlan, require
from drift.samplers.base import TimestepSampler, draws, require_positive


class CoupledElboSampler(TimestepSampler):
    """k masks of every row and their complements: the likelihood of ESPO (arXiv 2512.03759).

    Each mask covers l of the L valid tokens, l uniform from 0 to L; its tokens count (L + 1) / l each, those
    of the complement (L + 1) / (L - l), the pair half of that: unbiased for the ELBO. The likelihood ratio of
    several updates is exp((ELBO - old ELBO) / L). The l of a row's k masks are spread over their range.

    Args:
        k: pairs of masks of a row, >= 1.
    """

    replays = False

    def __init__(self, k: int = 1) -> None:
        require_positive("k", k)
        self.k, self.max_states = k, 2 * k

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """2k noisy states a row at most; see `TimestepSampler.plan`."""
        valid = rollout.completion_mask
        length = valid.sum(dim=1)
        uniforms = draws(rollout, self.k + self.k * valid.shape[1], generator)
        count = (_spread(uniforms[:, : self.k]) * (length[:, None] + 1)).long().T  # [k,N]
        rank = _ranks(uniforms[:, self.k :], valid, self.k)
        masked = (rank < count[:, :, None]) & valid
        pairs = torch.cat((masked, valid & ~masked))
        size = torch.cat((count, length - count)).double()
        share = (length + 1) / (2 * self.k * size.clamp(min=1) * length.clamp(min=1))
        return _plan(pairs, share, SequenceLevel())


class QuadratureElboSampler(TimestepSampler):
    """Masks at the k points of a Gauss-Legendre rule: the likelihood of GDPO (arXiv 2510.08554).

    Most of the variance of an ELBO comes from the random share t of masked tokens; its integral over t is
    taken by quadrature, and only which tokens are masked is drawn. At a point t, the whole number nearest to
    t L of tokens is masked, at least one, and counts in place of t L. The likelihood ratio of several updates
    is that of whole completions, exp(ELBO - old ELBO).

    Args:
        k: points, >= 1.
    """

    replays = False

    def __init__(self, k: int = 2) -> None:
        require_positive("k", k)
        self.k = self.max_states = k
        nodes, weights = np.polynomial.legendre.leggauss(k)
        self._points = torch.tensor((nodes + 1) / 2)
        self._weights = torch.tensor(weights / 2)

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """k noisy states a row; see `TimestepSampler.plan`."""
        valid = rollout.completion_mask
        length = valid.sum(dim=1)
        points = self._points.to(valid.device)[:, None]
        count = torch.minimum((points * length).round().long().clamp(min=1), length)  # [k,N]
        uniforms = draws(rollout, self.k * valid.shape[1], generator)
        masked = (_ranks(uniforms, valid, self.k) < count[:, :, None]) & valid
        share = self._weights.to(valid.device)[:, None] / count.clamp(min=1)
        return _plan(masked, share, SequenceLevel(whole_ratio=True))


class SandwichedSampler(TimestepSampler):
    """k masks of every row for SPG's bounds from both sides (arXiv 2510.09541).

    Rows with an advantage of 0 or more learn from the ELBO (equation 2), others from a mixture of it and the
    upper bound (equations 7 and 8): pushing down a lower bound need not push down the likelihood. Masks are
    of random tokens, or block-wise as rollouts are (section 3.3): a random block, a random number of its
    tokens masked, everything before it clean and everything after it masked. The prompt is left clean.

    Args:
        k: masks of a row, >= 1.
        beta: of the upper bound, >= 1; nearer to 1 is tighter.
        omega: share of the upper bound in the mixture, in [0, 1].
        block_length: positions of a block; None: masks of random tokens.
    """

    replays = False

    def __init__(
        self, k: int = 2, beta: float = 1.5, omega: float = 0.5, block_length: int | None = None
    ) -> None:
        require_positive("k", k)
        self.k = self.max_states = k
        self.beta, self.omega, self.block_length = beta, omega, block_length
        require(self, 1 <= beta < np.inf, "beta", "set it to 1 or more, and finite")
        require(self, 0 <= omega <= 1, "omega", "set it in [0, 1], the share of the upper bound")
        good = block_length is None or block_length >= 1
        require(self, good, "block_length", "set it to 1 or more positions, or null for random tokens")

    def plan(self, rollout: Rollout, generator: torch.Generator | None = None) -> TimestepPlan:
        """k noisy states a row; see `TimestepSampler.plan`."""
        valid = rollout.completion_mask
        uniforms = draws(rollout, 2 * self.k + self.k * valid.shape[1], generator)
        block, share_of_block, noise = uniforms.tensor_split([self.k, 2 * self.k], dim=1)
        inside, after = self._blocks(valid, block)
        count = (share_of_block if self.block_length else _spread(share_of_block)).T * inside.sum(dim=2)
        noise = noise.unflatten(1, (self.k, -1)).transpose(0, 1)
        rank = noise.masked_fill(~inside, torch.inf).argsort(dim=2).argsort(dim=2)
        masked = (inside & (rank <= count.floor()[:, :, None])) | after  # 1 to all tokens of the block
        share = 1.0 / (self.k * masked.sum(dim=2).clamp(min=1))
        return _plan(masked, share, SequenceLevel(beta=self.beta, omega=self.omega))

    def _blocks(self, valid: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """[k,N,C] bool each, valid tokens of the blocks that masks are drawn in, and those after them."""
        place = torch.arange(valid.shape[1], device=valid.device) // (self.block_length or valid.shape[1])
        num_blocks = torch.where(valid, place + 1, 0).amax(dim=1, keepdim=True)
        chosen = (_spread(uniforms) * num_blocks).long().T[:, :, None]
        return valid & (place == chosen), valid & (place > chosen)


def _spread(uniforms: Tensor) -> Tensor:
    """[N,k] float64 in (0,1), one number in each k-th of it: each alone is uniform up to its stratum."""
    strata = torch.arange(uniforms.shape[1], device=uniforms.device)
    return (strata + uniforms) / uniforms.shape[1]


def _ranks(uniforms: Tensor, valid: Tensor, num: int) -> Tensor:
    """[num,N,C] int64, place of every valid position in `num` random orders; invalid ones come last."""
    noise = uniforms.unflatten(1, (num, valid.shape[1])).transpose(0, 1)
    return noise.masked_fill(~valid, torch.inf).argsort(dim=2).argsort(dim=2)


def _plan(masked: Tensor, share: Tensor, level: SequenceLevel) -> TimestepPlan:
    """The plan whose states count `share` [K,N] each for every masked token."""
    real = masked.any(dim=2)
    weight = torch.where(real, share * real.sum(dim=0), 0.0).float()
    return TimestepPlan(masked=masked, current=masked, weight=weight, sequence=level)
