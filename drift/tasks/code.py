"""Programming problems with tests, such as MBPP and HumanEval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import CodeReward, Reward
from drift.rewards.code_tests import split_tests
from drift.tasks.base import Task, is_text

_FUNCTION_INSTRUCTION = (
    "Place your code within a single Python code block ```python ```. Write nothing after it."
)
_STDIO_INSTRUCTION = (
    "Write a Python program that reads its input from standard input and prints its output. "
    "Place it within a single Python code block ```python ```. Write nothing after it."
)


class CodeTask(Task):
    """Programming problems: functions that must satisfy assertions, or programs that map input to output.

    A row has `question`, `test_method` ("function" or "stdio") and `test_time_limit` (seconds for each test);
    then, for functions, `test_list` (test code, see `CodeReward`) and perhaps `prefix`, with which the answer
    starts; for programs, `test_input` and `test_output`, lists of texts.

    Args:
        function_instruction: line added below the question of a function; empty for none.
        stdio_instruction: line added below the question of a program; empty for none.
        use_prefix: whether answers start with the row's prefix; without it the policy writes them whole.
        reward: judge of the answers; None for `CodeReward` with its defaults.

    Raises:
        ConfigError: the sandbox of the default reward does not work on this machine.
    """

    fields = ("question", "test_method", "test_time_limit")

    def __init__(
        self,
        function_instruction: str = _FUNCTION_INSTRUCTION,
        stdio_instruction: str = _STDIO_INSTRUCTION,
        use_prefix: bool = True,
        reward: CodeReward | Reward | None = None,
    ) -> None:
        self.instructions = {"function": function_instruction, "stdio": stdio_instruction}
        self.use_prefix = use_prefix
        self.reward = CodeReward() if reward is None else reward

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row; its answer is the text of its tests.

        Raises:
            ConfigError: the row has no question, or no tests that an answer could pass or fail.
        """
        self.require_fields(row)
        row = self.with_tests(row)
        function = row["test_method"] == "function"
        parts = (row["question"].rstrip("\n"), self.instructions[row["test_method"]])
        return Problem(
            prompt="\n".join(part for part in parts if part),
            answer="\n".join(row["test_list"] if function else row["test_output"]),
            answer_prefix=(row.get("prefix") or "") if function and self.use_prefix else "",
            row=dict(row),
        )

    def own_text(self, row: Mapping[str, Any]) -> str:
        """The question without the instruction."""
        return self.with_tests(row)["question"]

    def with_tests(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row in the form described above, known to be good.

        Raises:
            ConfigError: a field cannot be used.
        """
        limit = row["test_time_limit"]
        self.require(is_text(row["question"]), row, "question", "a text")
        self.require(row["test_method"] in [*self.instructions], row, "test_method", "'function' or 'stdio'")
        good = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < math.inf
        self.require(good, row, "test_time_limit", "a number of seconds greater than 0")
        if row["test_method"] == "function":
            tests = row.get("test_list")
            good = isinstance(tests, list | tuple) and all(map(is_text, tests)) and bool(tests)
            self.require(good, row, "test_list", "a list of test sources, at least one")
            self.require(isinstance(row.get("prefix") or "", str), row, "prefix", "a text, or absent")
            require_tests(row["test_list"], row.get("prefix") or "", "test_list")
        else:
            self._require_outputs(row)
        return row

    def _require_outputs(self, row: Mapping[str, Any]) -> None:
        for name in ("test_input", "test_output"):
            texts = row.get(name)
            good = isinstance(texts, list | tuple) and all(map(_is_writable, texts))
            self.require(good and bool(texts), row, name, "a list of texts, at least one")
        num = len(row["test_input"])
        same = len(row["test_output"]) == num
        self.require(same, row, "test_output", f"as long as test_input, which has {num} texts")


def _is_writable(value: object) -> bool:
    """Whether a value is a text that a program could read or print: half a surrogate pair is none."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def require_tests(sources: Sequence[str], prefix: str, name: str) -> None:
    """Returns nothing if an answer can pass or fail the tests.

    Args:
        sources: test code, see `CodeReward`.
        prefix: what the answer starts with.
        name: the field they are from.

    Raises:
        ConfigError: a source is no Python code, or asserts nothing.
    """
    try:
        split_tests(sources, prefix)
    except ValueError as error:
        raise ConfigError(f"field {name!r} cannot be used: {error}; correct the data") from error
