"""What policies are evaluated on: one set of rows, or several benchmarks by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from drift.contract import ConfigError
from drift.data.fitting import fitting_rows
from drift.data.sources import Source, load_all_rows
from drift.data.template import PromptTemplate
from drift.fingerprint import describe, digest
from drift.tasks import ProceduralTask, Task

_NAME = re.compile(r"[\w.+-]+")


@dataclass(kw_only=True)
class Benchmark(Source):
    """Names a set of test rows, and the task that reads and judges them.

    Args:
        path: a local .json, .jsonl or .parquet file, or the id of a dataset on the hub; empty: the task makes
            the rows, `limit` of them or data.num_test.
        task: what a problem is here; None: data.task.
    """

    path: str = ""
    task: Task | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Rows to evaluate on, with the task that reads and judges them."""

    name: str  # what results call it
    rows: Sequence[Mapping[str, Any]]
    task: Task
    where: str  # in words, for messages: "data.test.math500 (MATH500.json)"

    def longest_prompt(self, template: PromptTemplate) -> int:
        """Length of the longest prompt, tokens."""
        return max(template.num_tokens(self.task.problem(row)) for row in self.rows)

    def settings(self, template: PromptTemplate, positions: Sequence[int]) -> dict[str, Any]:
        """What the policy was asked here and how its answers were judged, in plain values.

        Args:
            template: renders and tokenises the prompts.
            positions: places of the rows that were used.

        Returns:
            hashes of the rows (the same wherever they came from) and of the prompts' token ids (so that they
            cover tokenizer and templates), and what can be named of their making.
        """
        rows = [dict(self.rows[position]) for position in positions]
        prompts = [template.encode(self.task.problem(row), self.where) for row in rows]
        task, chat = describe(self.task), template.chat
        task.pop("reward", None)
        return {
            "num_rows": len(rows),
            "rows": digest(json.dumps(row, sort_keys=True, default=str) for row in rows),
            "prompts": digest(str(ids) for ids in prompts),
            "system_prompt": template.system_prompt,
            "chat_template": None if chat is None else digest([chat.text]),
            "task": task,
            "reward": describe(self.task.reward),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationSource:
    """An evaluation set that has not been loaded.

    Args:
        key: the setting that names it, such as "data.test.math500".
        name: what results call it.
        source: where its rows come from; None: the task makes them.
        task: reads and judges them.
        num: rows that a procedural task makes.
    """

    key: str
    name: str
    source: Source | None
    task: Task
    num: int

    @property
    def where(self) -> str:
        """The set in words, for messages."""
        return f"{self.key} ({self.source.path if self.source else type(self.task).__name__})"

    def load(self, split: str) -> Dataset | list[dict[str, Any]]:
        """All its rows; those of a file or hub dataset are known to suit the task.

        Args:
            split: of the puzzles, where the task makes them.

        Raises:
            ConfigError: where they cannot be read or made.
        """
        if self.source is None:
            return procedural(self.task, self.key).rows(split, self.num)
        return load_all_rows(self.source, self.task, self.key)

    def fitting(self, rows: Any, template: PromptTemplate, *, drop_long: bool) -> EvaluationSet:
        """The set, with every row looked at: none may stop a run after hours.

        Args:
            rows: what `load` gave.
            template: renders and tokenises its prompts.
            drop_long: leave out prompts longer than the template's `max_length`, and don't raise.

        Raises:
            ConfigError: where a row cannot be used.
        """
        num, rows = len(rows), fitting_rows(rows, self.task, template, self.where, drop_long=drop_long)
        if len(rows) < num:
            rank_zero_info(f"{self.where}: {num - len(rows)} of {num} rows are left out: too long")
        return EvaluationSet(name=self.name, rows=rows, task=self.task, where=self.where)


def load_sources(
    split: str, sources: Sequence[EvaluationSource], *, needed: bool, made: bool = True
) -> list[tuple[EvaluationSource, Any]]:
    """The sources of a split that there are rows of, each with all its rows.

    Args:
        split: "validation" or "test".
        sources: of its sets.
        needed: True: raise where nothing is set and the task makes no rows; False: leave that set out.
        made: False: leave out sets whose rows a task makes.

    Raises:
        ConfigError: where rows cannot be read.
    """
    return [
        (source, source.load(split))
        for source in sources
        if source.source is not None or (made if isinstance(source.task, ProceduralTask) else needed)
    ]


def procedural(task: Task, key: str) -> ProceduralTask:
    """The task, which makes its own rows; raises ConfigError where it does not.

    Args:
        task: of the rows.
        key: the setting that could say where they come from, for the error message.
    """
    if not isinstance(task, ProceduralTask):
        raise ConfigError(
            f"{key} is None: {type(task).__name__} doesn't make its own rows; "
            f"set {key}.path to a file or a hub dataset"
        )
    return task


def evaluation_sources(
    split: str, given: Source | Mapping[str, Benchmark] | None, task: Task, num: int
) -> list[EvaluationSource]:
    """The evaluation sets of a split, in the order in which they are given.

    Args:
        split: "validation" or "test".
        given: the setting: one source, several by name, or None: the task makes the rows.
        task: reads what has no task of its own.
        num: rows that a procedural task makes where no limit is set.

    Raises:
        ConfigError: where there are no names, one that cannot stand in results, or a benchmark without rows.
    """
    key = f"data.{split}"
    if given is None or isinstance(given, Source):
        own = type(task).__name__.removesuffix("Task").lower()
        name = own if given is None else Path(given.path).stem
        return [EvaluationSource(key=key, name=name, source=given, task=task, num=num)]
    if not given:
        raise ConfigError(f"{key} is {{}}: name at least one benchmark, or set {key}.path")
    found = []
    for name, benchmark in given.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{key} has a benchmark {name!r}: use letters, digits, '_', '-', '+' and '.'")
        own_task = task if benchmark.task is None else benchmark.task
        source = benchmark if benchmark.path else None
        if source is None:
            procedural(own_task, f"{key}.{name}")
            if benchmark.limit is not None and benchmark.limit < 1:
                raise ConfigError(f"{key}.{name}.limit is {benchmark.limit}: set it to 1 or more, or null")
        found.append(
            EvaluationSource(
                key=f"{key}.{name}", name=name, source=source, task=own_task, num=benchmark.limit or num
            )
        )
    return found


def chosen(sources: Sequence[EvaluationSource], names: Sequence[str] | None) -> list[EvaluationSource]:
    """Some of the evaluation sets, in the order of the names; None: all.

    Raises:
        ConfigError: where a name is none of theirs, or stands there twice.
    """
    if names is None:
        return list(sources)
    known = {source.name: source for source in sources}
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"data.benchmarks is {list(names)}: name each benchmark once, or set it to null")
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"data.benchmarks names {name!r}: data.test has only {', '.join(known)}{hint}")
    return [known[name] for name in names]
