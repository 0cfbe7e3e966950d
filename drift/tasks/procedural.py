"""Tasks whose puzzles are made, not read: endless rows, and splits that cannot share a puzzle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from random import Random
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from drift.contract import ConfigError
from drift.tasks.base import Task

# Of ten parts of all puzzles; the other eight are for training.
_EVALUATION_TENTHS = {0: "validation", 1: "test"}
_MAX_DRAWS = 10_000
_MOST_REPEATS = 0.1  # of the draws


class ProceduralTask(Task):
    """A task that makes its rows from (seed, split, index), so that every process makes the same ones.

    Splits are disjoint by construction: a hash of a puzzle's canonical form says which split it belongs to,
    and what belongs to another split is thrown away while generating. The hash knows nothing of the seed, so
    a test puzzle under one seed is never a training puzzle under another.

    Args:
        seed: key of all draws.
    """

    splits = ("train", "validation", "test")

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._held_out: set[str] = set()

    @abstractmethod
    def generate(self, rng: Random) -> dict[str, Any]:
        """A row drawn from all puzzles of the task, whatever its split.

        Args:
            rng: source of every draw.
        """

    @abstractmethod
    def canonical(self, row: dict[str, Any]) -> str:
        """The puzzle in a form that is the same for rows which are the same puzzle to a solver."""

    def own_text(self, row: Mapping[str, Any]) -> str:
        """The puzzle's canonical form.

        Raises:
            ConfigError: the row holds no puzzle.
        """
        try:
            return self.canonical(dict(row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"no puzzle of {type(self).__name__} can be made of the row ({reason}); correct the data"
            ) from error

    def hold_out(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps puzzles that were not made here, such as those of a test file, out of the training split.

        Args:
            rows: the puzzles' rows.
        """
        self._held_out.update(map(self.own_text, rows))

    def row(self, split: str, index: int) -> dict[str, Any]:
        """The row at a place of an endless split; another place may hold the same puzzle.

        Args:
            split: "train", "validation" or "test".
            index: place in the split, >= 0.

        Raises:
            ConfigError: there is no such split, or the settings leave it hardly any puzzle.
        """
        if split not in self.splits:
            raise ConfigError(f"split={split!r} is not one of {self.splits}")
        # A string seeds Random through SHA-512: the same in every process and on every platform.
        rng = Random(f"{type(self).__name__}/{self.seed}/{split}/{index}")
        for _ in range(_MAX_DRAWS):
            row = self.generate(rng)
            if self._split_of(row) == split:
                return row
        raise self._too_few(f"no {split} puzzle was found in {_MAX_DRAWS} draws")

    def rows(self, split: str, num: int) -> list[dict[str, Any]]:
        """[num] rows of a finite split, no puzzle twice; a longer list begins with the shorter one.

        Warns where so many draws were repeats that kinds with few puzzles are rarer than they should be.

        Args:
            split: "train", "validation" or "test".
            num: how many rows, >= 1.

        Raises:
            ConfigError: there are not so many different puzzles.
        """
        if num < 1:
            raise ConfigError(f"the number of {split} rows is {num}: it must be at least 1")
        found: dict[str, dict[str, Any]] = {}
        index = last_hit = 0
        while len(found) < num:
            row = self.row(split, index)
            if found.setdefault(self.canonical(row), row) is row:
                last_hit = index
            elif index - last_hit >= _MAX_DRAWS:
                raise self._too_few(f"{num} different {split} puzzles are asked for, {len(found)} were found")
            index += 1
        if index - num > _MOST_REPEATS * index:
            rank_zero_warn(
                f"{type(self).__name__}: {num} different {split} puzzles took {index} draws: kinds of which "
                "there are few are rarer among them than in training; ask for fewer or widen data.task"
            )
        return list(found.values())

    def _split_of(self, row: dict[str, Any]) -> str:
        form = self.canonical(row)
        digest = blake2b(form.encode(), digest_size=8).digest()
        split = _EVALUATION_TENTHS.get(int.from_bytes(digest, "big") % 10, "train")
        return "none" if split == "train" and form in self._held_out else split

    def _too_few(self, what: str) -> ConfigError:
        fix = "ask for fewer rows or widen the settings of data.task"
        return ConfigError(f"{type(self).__name__}: {what}; {fix}")
