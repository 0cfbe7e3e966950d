"""What a task is: how a dataset row becomes a problem, and which reward judges it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import Reward


class Task(ABC):
    """Turns rows into problems. A subclass sets `reward`, names its `fields` and writes `problem`.

    Attributes:
        fields: columns that every row needs.
        settings: for a column whose name is an argument of the task, that argument's name.
        reward: judges the completions of the task's problems.
    """

    fields: tuple[str, ...] = ()
    settings: Mapping[str, str] = {}
    reward: Reward

    @abstractmethod
    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem that a row holds."""

    def own_text(self, row: Mapping[str, Any]) -> str:
        """What a row asks, by which it is compared with other rows; a task leaves out what it adds itself.

        Args:
            row: one that `check` accepts.
        """
        return self.problem(row).prompt

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Returns nothing if `problem` can work with the row.

        Args:
            row: the row to check.
            where: the row in words, such as "data.train (file MATH.json, row 17)".

        Raises:
            ConfigError: a field is missing or empty; the message says where and what to change.
        """
        for name in self.fields:
            if row.get(name) is None:
                found = "it is null there" if name in row else f"it has {sorted(row)}"
                setting = self.settings.get(name)
                fix = f"set data.task.{setting} or correct the data" if setting else "correct the data"
                raise ConfigError(f"{where} has no field {name!r}; {found}: {fix}")
