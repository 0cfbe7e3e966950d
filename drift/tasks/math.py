"""Mathematical questions with a short final answer, such as MATH, GSM8K and AMC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import MathReward, Reward, extract_boxed
from drift.tasks.base import Task, is_text

_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_GSM8K_MARK = "####"


class MathTask(Task):
    r"""Questions whose final answer the policy puts into \boxed{}.

    A number that is whole is written as one: 142.0 becomes 142 (the hub's AMC rows hold floats).

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
        reward: MathReward | Reward | None = None,
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
        self.require_fields(row)
        question = row[self.question_field]
        self.require(is_text(question), row, self.question_field, "a text")
        prompt = "\n".join(part for part in (question, self.instruction) if part)
        return Problem(prompt=prompt, answer=self.answer(row), row=dict(row))

    def own_text(self, row: Mapping[str, Any]) -> str:
        """The question without the instruction."""
        return row[self.question_field]

    def answer(self, row: Mapping[str, Any]) -> str:
        """The ground truth of a row.

        Raises:
            ConfigError: its field holds no text or number that says something.
        """
        value = row[self.answer_field]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        self.require(is_text(value) or number, row, self.answer_field, "a text or a number")
        return str(value).strip()


class Gsm8kTask(MathTask):
    r"""GSM8K as the hub has it (openai/gsm8k): the final answer stands behind the last "####" of a solution.

    Args:
        question_field: column of the question.
        answer_field: column of the solution.
        instruction: line added below the question; empty for none.
        reward: judge of the answers; None for `MathReward` with its defaults.

    Raises:
        ConfigError: both fields are the same.
    """

    def __init__(
        self,
        question_field: str = "question",
        answer_field: str = "answer",
        instruction: str = _INSTRUCTION,
        reward: MathReward | Reward | None = None,
    ) -> None:
        super().__init__(question_field, answer_field, instruction, reward)

    def answer(self, row: Mapping[str, Any]) -> str:
        """The number behind the mark, without thousands separators.

        Raises:
            ConfigError: there is no mark, or no number behind it.
        """
        _, mark, text = str(row[self.answer_field]).rpartition(_GSM8K_MARK)
        answer = text.strip().replace(",", "")
        good = bool(mark) and _is_number(answer)
        self.require(good, row, self.answer_field, f"a solution that ends in '{_GSM8K_MARK}' and a number")
        return answer


class BoxedMathTask(MathTask):
    r"""MATH as the hub has it: the final answer stands in the last \boxed{} of a worked solution.

    Args:
        question_field: column of the question.
        answer_field: column of the solution.
        instruction: line added below the question; empty for none.
        reward: judge of the answers; None for `MathReward` with its defaults.

    Raises:
        ConfigError: both fields are the same.
    """

    def __init__(
        self,
        question_field: str = "problem",
        answer_field: str = "solution",
        instruction: str = _INSTRUCTION,
        reward: MathReward | Reward | None = None,
    ) -> None:
        super().__init__(question_field, answer_field, instruction, reward)

    def answer(self, row: Mapping[str, Any]) -> str:
        r"""What stands in the box.

        Raises:
            ConfigError: there is no \boxed{}, or nothing in it.
        """
        answer = (extract_boxed(str(row[self.answer_field])) or "").strip()
        self.require(bool(answer), row, self.answer_field, r"a solution with its answer in \boxed{}")
        return answer


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
