"""What is measured of rollouts, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from drift.contract import Rollout

_Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(num_correct: float, num: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): unlike the normal one it stays in [0, 1] and works at its ends.

    Args:
        num_correct: successes.
        num: trials, > 0.
    """
    share, spread = num_correct / num, _Z95**2 / num
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def clustered_interval(num_correct: Sequence[int], samples: int) -> tuple[float, float]:
    """95 % interval of accuracy, from several answers to each prompt, which are alike.

    Wilson's interval with the effective number of answers, that is their number over the design effect: among
    intervals of clustered shares one of those that Franco et al. recommend (J. Surv. Stat. Methodol. 7, 2019,
    p. 334). The design effect is the variance of the prompts' accuracies over what independent answers would
    have, so that for one answer a prompt this is `wilson_interval`. Where all answers are right or all are
    wrong they say nothing of how alike they are, and each prompt counts once.

    Args:
        num_correct: correct answers of each prompt, at least one prompt.
        samples: answers of each prompt.
    """
    num = len(num_correct)
    accuracy = sum(num_correct) / (num * samples)
    independent = accuracy * (1 - accuracy) / samples
    if independent == 0:
        effective = float(num)
    else:
        spread = sum((count / samples - accuracy) ** 2 for count in num_correct) / num
        # Never more than there are answers, however even the prompts happen to be.
        effective = num * samples / max(spread / independent, 1.0)
    return wilson_interval(accuracy * effective, effective)


def pass_at_k(num: int, num_correct: int, k: int) -> float:
    """The chance that one of `k` of a prompt's answers is correct (Chen et al., arXiv 2107.03374, eq. 1).

    Args:
        num: answers, >= k.
        num_correct: correct ones of them.
        k: answers that are looked at, >= 1.
    """
    return 1 - math.comb(num - num_correct, k) / math.comb(num, k)


def difference_interval(
    first: tuple[float, float, float], second: tuple[float, float, float], correlation: float = 0.0
) -> tuple[float, float]:
    """95 % interval of `second - first`, from the two estimates' own intervals.

    Newcombe's square-and-add interval (Stat. Med. 17, 1998, p. 873, for independent shares, and p. 2635, for
    paired ones).

    Args:
        first: share, and its interval's ends.
        second: the same of the other.
        correlation: between the two estimates, in [-1, 1]; 0 for independent ones.
    """

    def root(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * correlation * below * above + above**2, 0.0))

    (p, p_low, p_high), (q, q_low, q_high) = first, second
    return q - p - root(q - q_low, p_high - p), q - p + root(q_high - q, p - p_low)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of two series; 0 where one of them is constant."""
    p, q = (sum(values) / len(values) for values in (first, second))
    product = sum((a - p) * (b - q) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - p) ** 2 for a in first) * sum((b - q) ** 2 for b in second))
    return product / spread if spread > 0 else 0.0


def sign_test(num_better: int, num_worse: int) -> float:
    """The exact two-sided p-value that better and worse are equally likely; McNemar's for one answer each.

    Args:
        num_better: prompts on which the one is better.
        num_worse: prompts on which it is worse; those without a difference don't count.
    """
    num = num_better + num_worse
    tail = sum(math.comb(num, i) for i in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**num)


class RolloutMetrics(Metric):
    """Accuracy with its 95 % interval, mean reward and its parts, timesteps and tokens per forward pass.

    They are sums and counts over everything seen, on any number of ranks.
    `tokens_per_forward` is what a row gets out of a pass that it takes part in: valid tokens / timesteps.

    Args:
        reward_names: [R] parts of the reward, the same on every rank.
    """

    full_state_update = False
    num: Tensor
    num_correct: Tensor
    reward: Tensor
    timesteps: Tensor
    tokens: Tensor
    scores: Tensor

    def __init__(self, reward_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.reward_names = tuple(reward_names)
        zeros = torch.zeros(len(self.reward_names), dtype=torch.float64)
        self.add_state("scores", default=zeros, dist_reduce_fx="sum")
        for name in ("num", "num_correct", "reward", "timesteps", "tokens"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rollout: Rollout) -> None:
        """Adds the rows of a rollout that has been scored."""
        assert rollout.rewards is not None
        assert rollout.correct is not None
        assert rollout.num_timesteps is not None
        self.num += rollout.correct.numel()
        self.num_correct += rollout.correct.sum()
        self.reward += rollout.rewards.sum()
        if self.reward_names:
            assert rollout.scores is not None
            self.scores += rollout.scores.sum(dim=0)
        self.timesteps += rollout.num_timesteps.sum()
        self.tokens += rollout.completion_mask.sum()

    def compute(self) -> dict[str, Tensor]:
        """The figures of all rows seen, by name.

        Returns:
            `accuracy`, `accuracy_low`, `accuracy_high`, `reward`, `timesteps`, `tokens_per_forward`, `num`,
            and `reward/NAME` for every part of the reward.
        """
        num = self.num.clamp(min=1)
        low, high = wilson_interval(self.num_correct.item(), num.item())
        return {
            "accuracy": (self.num_correct / num).float(),
            "accuracy_low": torch.tensor(low),
            "accuracy_high": torch.tensor(high),
            "reward": (self.reward / num).float(),
            "timesteps": (self.timesteps / num).float(),
            "tokens_per_forward": (self.tokens / self.timesteps.clamp(min=1)).float(),
            "num": self.num.float(),
            **{f"reward/{name}": (self.scores[i] / num).float() for i, name in enumerate(self.reward_names)},
        }
