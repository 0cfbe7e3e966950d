"""Mathematical questions with a short final answer, such as MATH and GSM8K."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import MathReward
from drift.tasks.base import Task

_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class MathTask(Task):
    r"""Questions whose final answer the policy puts into \boxed{}.

    Args:
        question_field: column of the question.
        answer_field: column of the final answer, LaTeX or a number.
        instruction: line added below the question; empty for none.
        reward: judge of the answers; None for `MathReward` with its defaults.

    Raises:
        ConfigError: both fields are the same.
    """

    def __init__(
        self,
        question_field: str = "question",
        answer_field: str = "ground_truth_answer",
        instruction: str = _INSTRUCTION,
        reward: MathReward | None = None,
    ) -> None:
        if question_field == answer_field:
            raise ConfigError(f"question_field and answer_field are both {question_field!r}: change one")
        self.question_field = question_field
        self.answer_field = answer_field
        self.instruction = instruction
        self.fields = (question_field, answer_field)
        self.settings = {question_field: "question_field", answer_field: "answer_field"}
        self.reward = MathReward() if reward is None else reward

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row, whose answer is text even if the row holds a number.

        Raises:
            ConfigError: the row has no usable question or answer.
        """
        self.check(row, "a row")
        prompt = "\n".join(part for part in (row[self.question_field], self.instruction) if part)
        return Problem(prompt=prompt, answer=str(row[self.answer_field]).strip(), row=dict(row))

    def own_text(self, row: Mapping[str, Any]) -> str:
        """The question without the instruction."""
        return row[self.question_field]

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Returns nothing if the row has a question and an answer that can be judged.

        Args:
            row: the row to check.
            where: the row in words.

        Raises:
            ConfigError: a field is missing, or is no text or number that says something.
        """
        super().check(row, where)
        question, answer = row[self.question_field], row[self.answer_field]
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(f"{where}: field {self.question_field!r} is {question!r}; {_fix('a text')}")
        if not _is_answer(answer):
            fix = _fix("a text or a number")
            raise ConfigError(f"{where}: field {self.answer_field!r} is {answer!r}; {fix}")


def _fix(kind: str) -> str:
    return f"it must be {kind}: correct the data or name another field in data.task"


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
