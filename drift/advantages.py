"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2), and the groups to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from drift.contract import require

Baseline = Literal["group_std", "group_mean", "leave_one_out", "none"]

MIN_STD = 1e-2


@dataclass(frozen=True)
class AdvantageConfig:
    """How much better than its group a completion did.

    Args:
        baseline: `group_std`: (reward - group mean) / max(group's sample standard deviation, 0.01), whose
            floor keeps groups of nearly equal rewards from being blown up. `group_mean`: reward - group mean
            (Dr. GRPO, arXiv 2503.20783), which keeps the size of rewards. `leave_one_out`: reward - mean of
            the others (RLOO, arXiv 2402.14740), unbiased, since a completion has no part in its own baseline.
            `none`: the reward itself: of rewards 0 and 1, every correct answer is learned from, those of
            groups without spread too (reward-ranked fine-tuning, RAFT, arXiv 2304.06767), of which
            model.train_groups and rollout.refill_rounds still take the last.

    Raises:
        ConfigError: where a value is outside its range.
    """

    baseline: Baseline = "group_std"

    def __post_init__(self) -> None:
        good = self.baseline in get_args(Baseline)
        require(self, good, "baseline", f"choose one of {list(get_args(Baseline))}")


def group_advantages(
    rewards: Tensor,
    group_size: int,
    config: AdvantageConfig = AdvantageConfig(),
) -> Tensor:
    """The advantages of completions; a group without spread gets 0, unless there is no baseline.

    Args:
        rewards: [N] float, groups one after the other.
        group_size: completions of a prompt, >= 2.
        config: settings.

    Returns:
        [N] float32.
    """
    groups = rewards.float().unflatten(0, (-1, group_size))
    if config.baseline == "none":
        return rewards.float()
    scaled = groups - groups.mean(dim=1, keepdim=True)
    if config.baseline == "group_std":
        scaled = scaled / groups.std(dim=1, keepdim=True).clamp(min=MIN_STD)
    elif config.baseline == "leave_one_out":
        scaled = scaled * (group_size / (group_size - 1))
    # The mean of equal numbers is rounded; AdamW would make whole steps of what is left over.
    return scaled.masked_fill(~_differs(groups)[:, None], 0.0).flatten()


def select_groups(rewards: Tensor, num_timesteps: Tensor, group_size: int, num_groups: int) -> Tensor:
    """Rows of the groups to train on, in their order.

    Groups whose rewards differ come first; the gap is filled with all-correct groups (equal rewards above 0,
    highest first), then with all-wrong ones that took most timesteps.

    Args:
        rewards: [N] float, groups one after the other.
        num_timesteps: [N] int64, denoising timesteps of every row.
        group_size: completions of a prompt.
        num_groups: groups to keep.

    Returns:
        [min(num_groups * group_size, N)] int64.
    """
    groups = rewards.float().unflatten(0, (-1, group_size))
    effort = num_timesteps.float().unflatten(0, (-1, group_size)).mean(dim=1)
    differs = _differs(groups)
    level = groups.mean(dim=1)
    # Sort keys, most important last: each stable sort keeps the order of the ones before it among equals.
    order = torch.arange(len(level), device=rewards.device)
    for key in (
        torch.where(differs, 0, effort),
        torch.where(differs, 0, level.clamp(min=0)),
        differs.float(),
    ):
        order = order[key[order].argsort(descending=True, stable=True)]
    chosen = order[:num_groups].sort().values
    return (chosen[:, None] * group_size + torch.arange(group_size, device=rewards.device)).flatten()


def groups_with_spread(rewards: Tensor, group_size: int) -> Tensor:
    """[G] bool, groups whose rewards differ.

    Args:
        rewards: [N] float, groups one after the other.
        group_size: completions of a prompt.
    """
    return _differs(rewards.float().unflatten(0, (-1, group_size)))


def refill_size(num_groups: int, num_useful: int, num_seen: int, most: int) -> int:
    """Prompts of the next round of a step: what is missing, at the share of useful groups so far; 0: nothing.

    Rolling out until enough groups have differing rewards is DAPO's dynamic sampling (arXiv 2503.14476,
    section 3.2); rounds of this size are ours.

    Args:
        num_groups: groups to train on.
        num_useful: groups so far whose rewards differ.
        num_seen: all groups so far.
        most: prompts of a round; so many where no group was useful.
    """
    missing = num_groups - num_useful
    if missing <= 0:
        return 0
    return most if num_useful == 0 else min(-(-missing * num_seen // num_useful), most)


def _differs(groups: Tensor) -> Tensor:
    """[G] bool, groups whose rewards are not all equal, of [G,group_size]."""
    return groups.amax(dim=1) > groups.amin(dim=1)
