"""MBPP and HumanEval, row by row as the hub has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drift.tasks.base import is_text
from drift.tasks.code import CodeTask, require_tests

_SECONDS = 1.0  # for each test; the reward's own limits hold besides


class MbppTask(CodeTask):
    """MBPP (google-research-datasets/mbpp, "full" or "sanitized"): the first test is part of the question."""

    fields = ("test_list",)

    def with_tests(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as `CodeTask` has them; all assertions are one source, behind what they need.

        Raises:
            ConfigError: a field cannot be used.
        """
        question = "text" if "text" in row else "prompt"
        self.require(is_text(row.get(question)), row, question, "a text")
        for name in ("test_list", "challenge_test_list", "test_imports"):
            lines = row.get(name) or []
            good = isinstance(lines, list | tuple) and all(isinstance(line, str) for line in lines)
            self.require(good, row, name, "a list of texts")
        self.require(bool(row["test_list"]), row, "test_list", "a list of assertions, at least one")
        setup = row.get("test_setup_code") or ""
        self.require(isinstance(setup, str), row, "test_setup_code", "a text, or absent")
        more = row.get("challenge_test_list") or []
        source = "\n".join([*(row.get("test_imports") or []), setup, *row["test_list"], *more])
        require_tests([source], "", "test_list")
        first = row["test_list"][0].strip()
        return {
            **row,
            "question": f"{row[question].strip()}\nYour code should pass the test:\n{first}",
            "test_method": "function",
            "test_time_limit": _SECONDS,
            "test_list": [source],
        }


class HumanEvalTask(CodeTask):
    """HumanEval (openai/openai_humaneval): the answer starts with the code that is to be completed."""

    fields = ("prompt", "test", "entry_point")

    def with_tests(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as `CodeTask` has them.

        Raises:
            ConfigError: a field cannot be used.
        """
        for name in ("prompt", "test"):
            self.require(is_text(row[name]), row, name, "a text")
        function = row["entry_point"]
        named = isinstance(function, str) and function.isidentifier()
        self.require(named, row, "entry_point", "the name of a function")
        prefix = f"Here is the completed code:\n```python\n{row['prompt']}\n"
        source = f"{row['test']}\n\ncheck({function})"
        require_tests([source], prefix, "test")
        return {
            **row,
            "question": f"You need to complete this code:\n{row['prompt']}",
            "test_method": "function",
            "test_time_limit": _SECONDS,
            "test_list": [source],
            "prefix": prefix,
        }
