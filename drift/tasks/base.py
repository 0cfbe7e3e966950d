"""What a task is: how a dataset row becomes a problem, and which reward judges it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import Reward

_MAX_SHOWN = 100  # characters of a value in an error message


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
        """The problem that a row holds.

        Raises:
            ConfigError: a field cannot be used (see `require`); `check` adds whose row it is.
        """

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
            ConfigError: a field is missing or cannot be used; the message says where and what to change.
        """
        self.require_fields(row, where)
        try:
            self.problem(row)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except Exception as error:  # a task of the user's own may stumble in any way
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{where}: {type(self).__name__} cannot use it ({reason}); correct the data or the task"
            ) from error

    def require_fields(self, row: Mapping[str, Any], where: str = "a row") -> None:
        """Returns nothing if the row has every one of `fields`.

        Raises:
            ConfigError: one is missing, or null.
        """
        for name in self.fields:
            if row.get(name) is None:
                found = "it is null there" if name in row else f"it has {sorted(row)}"
                setting = self.settings.get(name)
                fix = f"set data.task.{setting} or correct the data" if setting else "correct the data"
                raise ConfigError(f"{where} has no field {name!r}; {found}: {fix}")

    def require(self, good: bool, row: Mapping[str, Any], name: str, kind: str) -> None:
        """Returns nothing if a field is good.

        Args:
            good: whether it is.
            row: the row.
            name: the field.
            kind: what it must be, in words.

        Raises:
            ConfigError: it is not; the message names the field, its value and `kind`.
        """
        if not good:
            found = repr(row.get(name))
            shown = found if len(found) <= _MAX_SHOWN else found[:_MAX_SHOWN] + "..."
            setting = self.settings.get(name)
            fix = f"correct the data or set data.task.{setting}" if setting else "correct the data"
            raise ConfigError(f"field {name!r} is {shown}; it must be {kind}: {fix}")


def is_text(value: object) -> bool:
    """Whether a value is a text with more than spaces in it."""
    return isinstance(value, str) and bool(value.strip())
