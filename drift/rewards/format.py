"""Reward of a form: does a regular expression occur in the completion."""

from __future__ import annotations

import re

from drift.contract import ConfigError, Problem
from drift.rewards.base import PerSampleReward


class FormatReward(PerSampleReward):
    """1.0 where the pattern is found anywhere in the completion, else 0.0.

    Args:
        pattern: regular expression; "." matches line ends too.

    Raises:
        ConfigError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._regex = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}; correct it") from error
        self.pattern = pattern

    def score(self, completion: str, problem: Problem) -> float:
        """1.0 or 0.0."""
        return float(self._regex.search(completion) is not None)
