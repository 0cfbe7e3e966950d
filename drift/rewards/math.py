"""Reward of a mathematical answer: the last box of the completion against the ground truth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem
from drift.rewards.base import Reward
from drift.rewards.math_form import Question, questions
from drift.rewards.math_workers import JudgePool

_BOX = "\\boxed{"
# An escaped brace is part of the answer, not of the nesting.
_ESCAPE_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MAX_CHARACTERS = 1000  # several times the longest ground truth of the usual benchmarks


class MathReward(Reward):
    r"""1.0 where the last \boxed{...} of the completion equals `problem.answer`, else 0.0.

    The form of an answer is taken strictly: a list is no tuple, an open interval no closed one, every side of
    `2 + 3 = 5` must be right (see drift.rewards.math_form). Values are compared by math-verify in processes
    of their own, so that an answer which makes the symbolic algebra hang or crash counts 0 and harms nothing
    else. Equal answers of a batch are judged once.

    Args:
        timeout_seconds: time for the judgement of one answer, > 0 and finite.
        num_workers: judge processes, >= 1, started when first needed.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, timeout_seconds: float = 5.0, num_workers: int = 2) -> None:
        if not 0 < timeout_seconds < math.inf:
            raise ConfigError(
                f"timeout_seconds={timeout_seconds!r} of MathReward must be greater than 0 and finite"
            )
        if num_workers < 1:
            raise ConfigError(f"num_workers={num_workers!r} of MathReward must be at least 1")
        self.timeout_seconds = timeout_seconds
        self.num_workers = num_workers
        self._pool = JudgePool(num_workers, timeout_seconds)

    def __reduce__(self) -> tuple[type, tuple[float, int]]:
        """The settings alone: a copy starts judges of its own."""
        return type(self), (self.timeout_seconds, self.num_workers)

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU.

        Raises:
            ConfigError: the judges cannot start, for example because math-verify is not installed.
        """
        pairs = [
            (problem.answer.strip(), (extract_boxed(completion) or "").strip())
            for completion, problem in zip(completions, problems, strict=True)
        ]
        asked = {pair: _questions(*pair) for pair in pairs}
        equal = {pair: found == [] for pair, found in asked.items()}
        unsure = {pair: found for pair, found in asked.items() if found}
        equal |= zip(unsure, self._pool.judge(list(unsure.values())), strict=True)
        return torch.tensor([equal[pair] for pair in pairs], dtype=torch.float32)

    def close(self) -> None:
        """Ends the judge processes; the next call starts new ones."""
        self._pool.close()


def extract_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, None where there is no box or the last one is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for token in _ESCAPE_OR_BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start : token.start()]
    return None


def _questions(gold: str, answer: str) -> list[Question] | None:
    if gold == answer != "":
        return []
    found = questions(gold, answer) if len(answer) <= _MAX_CHARACTERS else None
    return None if found is None else [(ours, theirs) for ours, theirs in found if ours != theirs]
