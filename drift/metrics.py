"""What is measured of rollouts: sums and counts over everything seen, on any number of ranks."""

from __future__ import annotations

import math

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


class RolloutMetrics(Metric):
    """Accuracy with its 95 % interval, mean reward, timesteps per answer and tokens per forward pass.

    `tokens_per_forward` is what a row gets out of a pass that it takes part in: valid tokens / timesteps.
    """

    full_state_update = False
    num: Tensor
    num_correct: Tensor
    reward: Tensor
    timesteps: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
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
        self.timesteps += rollout.num_timesteps.sum()
        self.tokens += rollout.completion_mask.sum()

    def compute(self) -> dict[str, Tensor]:
        """The figures of all rows seen, by name.

        Returns:
            `accuracy`, `accuracy_low`, `accuracy_high`, `reward`, `timesteps`, `tokens_per_forward`, `num`.
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
        }
