"""Programming problems with tests, such as MBPP and HumanEval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import CodeReward
from drift.rewards.code_tests import split_tests
from drift.tasks.base import Task

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
        reward: CodeReward | None = None,
    ) -> None:
        self.instructions = {"function": function_instruction, "stdio": stdio_instruction}
        self.use_prefix = use_prefix
        self.reward = CodeReward() if reward is None else reward

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of a row; its answer is the text of its tests.

        Raises:
            ConfigError: the row has no usable question or tests.
        """
        self.check(row, "a row")
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
        return row["question"]

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Returns nothing if the row has a question and tests that an answer could pass or fail.

        Args:
            row: the row to check.
            where: the row in words.

        Raises:
            ConfigError: a field is missing or cannot be used.
        """
        super().check(row, where)
        limit = row["test_time_limit"]
        _require(_is_text(row["question"]), row, where, "question", "a text")
        _require(
            row["test_method"] in [*self.instructions], row, where, "test_method", "'function' or 'stdio'"
        )
        good = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < math.inf
        _require(good, row, where, "test_time_limit", "a number of seconds greater than 0")
        (_check_function if row["test_method"] == "function" else _check_stdio)(row, where)


def _check_function(row: Mapping[str, Any], where: str) -> None:
    tests = row.get("test_list")
    good = isinstance(tests, list | tuple) and all(_is_text(test) for test in tests) and bool(tests)
    _require(good, row, where, "test_list", "a list of test sources, at least one")
    _require(isinstance(row.get("prefix") or "", str), row, where, "prefix", "a text, or absent")
    try:
        split_tests(row["test_list"], row.get("prefix") or "")
    except ValueError as error:
        raise ConfigError(f"{where}: field 'test_list' cannot be used: {error}; correct the data") from error


def _check_stdio(row: Mapping[str, Any], where: str) -> None:
    for name in ("test_input", "test_output"):
        texts = row.get(name)
        good = (
            isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts) and bool(texts)
        )
        _require(good, row, where, name, "a list of texts, at least one")
    same = len(row["test_input"]) == len(row["test_output"])
    _require(
        same, row, where, "test_output", f"as long as test_input, which has {len(row['test_input'])} texts"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require(good: bool, row: Mapping[str, Any], where: str, name: str, kind: str) -> None:
    if not good:
        found = repr(row.get(name))
        shown = found if len(found) <= 100 else found[:100] + "..."
        raise ConfigError(f"{where}: field {name!r} is {shown}; it must be {kind}: correct the data")
