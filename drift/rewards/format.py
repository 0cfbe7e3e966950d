"""Reward of a form: does a regular expression occur in the completion."""

from __future__ import annotations

import regex

from drift.contract import ConfigError, Problem
from drift.rewards.base import PerSampleReward


class FormatReward(PerSampleReward):
    """1.0 where the pattern is found anywhere in the completion, else 0.0.

    A search that takes too long finds nothing: some patterns, such as `(a|a)*b`, need time that doubles with
    every letter.

    Args:
        pattern: regular expression; "." matches line ends too.
        timeout_seconds: time for one completion, > 0.

    Raises:
        ConfigError: the pattern is no regular expression, or the time is out of its range.
    """

    def __init__(self, pattern: str, timeout_seconds: float = 0.1) -> None:
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds={timeout_seconds!r} of FormatReward must be greater than 0")
        try:
            # Like `re`, which knows no time limit.
            self._regex = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}; correct it") from error
        self.pattern = pattern
        self.timeout_seconds = timeout_seconds

    def score(self, completion: str, problem: Problem) -> float:
        """1.0 or 0.0."""
        try:
            return float(self._regex.search(completion, timeout=self.timeout_seconds) is not None)
        except TimeoutError:
            return 0.0
