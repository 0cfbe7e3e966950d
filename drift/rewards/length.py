"""Penalty on long completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem
from drift.rewards.base import Reward

LengthUnit = Literal["tokens", "characters"]


class LengthReward(Reward):
    """0 for completions with room to spare, then falling in a straight line to -1 at the longest allowed.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13): 0 up to max_length - margin, -1 from
    max_length on. A positive weight in `rollout.extra_rewards` makes it a penalty.

    Args:
        max_length: length from which on the reward is -1, >= 1.
        margin: how far before that it starts to fall, 1 to max_length.
        unit: `tokens`, of which neither padding nor masks count, or `characters`.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, max_length: int, margin: int, unit: LengthUnit = "tokens") -> None:
        if max_length < 1:
            raise ConfigError(f"max_length={max_length!r} of LengthReward must be at least 1")
        if not 1 <= margin <= max_length:
            raise ConfigError(
                f"margin={margin!r} of LengthReward must be within 1 to max_length={max_length}"
            )
        if unit not in get_args(LengthUnit):
            raise ConfigError(f"unit={unit!r} of LengthReward must be one of {list(get_args(LengthUnit))}")
        self.max_length = max_length
        self.margin = margin
        self.unit: LengthUnit = unit

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU, by characters.

        Raises:
            ConfigError: the unit is tokens, and texts don't say how many they are.
        """
        return self.judge(completions, problems, None)

    def judge(
        self, completions: Sequence[str], problems: Sequence[Problem], num_tokens: Tensor | None
    ) -> Tensor:
        """[N] float32 rewards on the CPU."""
        if self.unit == "characters":
            lengths = torch.tensor([len(completion) for completion in completions])
        elif num_tokens is None:
            raise ConfigError("unit='tokens' of LengthReward: nobody counted tokens; set it to 'characters'")
        else:
            lengths = num_tokens
        return ((self.max_length - self.margin - lengths.float()) / self.margin).clamp(-1.0, 0.0)
