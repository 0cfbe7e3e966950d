"""Over-confidence of rollouts in figures: how sure wrong answers were, and what committing at once earns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric

from drift.contract import Rollout

# Where there is no threshold, or one that is no probability: that of the paper's rollouts.
CONFIDENT = 0.9
_LAST = (1, 2, 4, 8, 16)  # tokens at once: the last number of each bucket, but for that of all above
BUCKETS = ("1", "2", "3_4", "5_8", "9_16", "17_up")


def tokens_at_once(rollout: Rollout) -> Tensor:
    """How many valid tokens a timestep of each answer committed, in the mean over its timesteps.

    Those that committed padding alone don't count. The mean, not the largest: one timestep that copies what
    is certain puts nearly all answers into one bucket (in the quickstart 99 % and more, while the mean still
    tells good answers from bad), and of a longer answer, which has more timesteps, the largest is larger
    though it was decoded no less carefully.

    Args:
        rollout: N rollouts.

    Returns:
        [N] float32: 0 where no valid token was committed, else >= 1.
    """
    valid = rollout.completion_mask
    counts = valid.new_zeros((valid.shape[0], valid.shape[1] + 1), dtype=torch.float32)
    counts.scatter_add_(1, rollout.step_map, valid.float())
    return counts.sum(dim=1) / (counts > 0).sum(dim=1).clamp(min=1)


class CollapseMetrics(Metric):
    """How many confident tokens stand in wrong answers; reward and share of answers by tokens at once.

    They are sums and counts over everything seen, on any number of ranks.

    Args:
        confident: probability from which on a committed token counts as confident, in (0, 1].
    """

    full_state_update = False
    tokens: Tensor  # confident ones, and those of them that are in wrong answers
    answers: Tensor  # in each bucket
    rewards: Tensor  # their sum in each bucket

    def __init__(self, confident: float = CONFIDENT) -> None:
        super().__init__()
        self.confident = confident
        for name, num in (("tokens", 2), ("answers", len(BUCKETS)), ("rewards", len(BUCKETS))):
            self.add_state(name, default=torch.zeros(num, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, rollout: Rollout) -> None:
        """Adds the rows of a rollout that has been scored."""
        assert rollout.rewards is not None
        assert rollout.correct is not None
        device = self.answers.device
        if rollout.commit_probs is not None:
            confident = (rollout.commit_probs >= self.confident) & rollout.completion_mask
            wrong = confident & ~rollout.correct.to(confident.device)[:, None]
            self.tokens += torch.stack((confident.sum(), wrong.sum())).to(device)
        at_once = tokens_at_once(rollout).to(device)
        bucket = torch.bucketize(at_once, torch.tensor(_LAST, dtype=at_once.dtype, device=device))
        inside = (one_hot(bucket, len(BUCKETS)) * (at_once > 0)[:, None]).double()
        self.answers += inside.sum(dim=0)
        self.rewards += rollout.rewards.sum(dim=1).to(device).double() @ inside

    def compute(self) -> dict[str, Tensor]:
        """The figures of all rows seen, by name.

        Returns:
            `confident_wrong`: of the valid tokens that were committed with a probability of at least
            `confident`, the share that stands in answers that are not correct. Rewards judge whole answers,
            so that a token counts as its answer does, be it right by itself or not. Absent where no token was
            confident.
            `share_N`: for every bucket, the share of answers whose timesteps committed N tokens at once, see
            `tokens_at_once`, rounded up: 2.1 are in `3_4`. Answers without valid tokens are in none.
            `reward_N`: their mean reward, for buckets that have answers. To be compared with itself, over
            training: beside each other, buckets of many tokens at once hold the easy answers.
        """
        num_confident, num_wrong = self.tokens
        figures = {"confident_wrong": num_wrong / num_confident} if num_confident else {}
        shares = self.answers / self.answers.sum().clamp(min=1)
        means = self.rewards / self.answers.clamp(min=1)
        figures |= {f"share_{name}": share for name, share in zip(BUCKETS, shares, strict=True)}
        there = (self.answers > 0).tolist()
        figures |= {f"reward_{name}": means[i] for i, name in enumerate(BUCKETS) if there[i]}
        return {name: value.float() for name, value in figures.items()}
