"""Which rows a policy has room for: all are looked at before anything expensive starts."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, cast

from datasets import Dataset

from drift.contract import ConfigError
from drift.data.template import PromptTemplate
from drift.tasks import Task

Row = Mapping[str, Any]


def fitting_rows(
    rows: Dataset | list[Row],
    task: Task,
    template: PromptTemplate,
    where: str,
    *,
    drop_long: bool = False,
    demonstration_length: int | None = None,
    skip: Container[int] = (),
) -> Dataset | list[Row]:
    """The rows whose prompts fit, all looked at now: one that doesn't must not stop a run after hours.

    Args:
        rows: of a dataset, or that a task has made, which suit the task.
        task: makes problems of them.
        template: renders and tokenises these.
        where: they come from, in words, for error messages.
        drop_long: leave out prompts longer than the template's `max_length`, and don't raise.
        demonstration_length: also look at the demonstrations, which must fit into this length.
        skip: numbers of rows to leave out.

    Raises:
        ConfigError: where a prompt or demonstration cannot be used, or none is left.
    """
    usable = []
    for number, row in enumerate(rows):
        if number in skip:
            continue
        problem, name = task.problem(cast("Row", row)), f"{where} row {number}"
        if drop_long and template.num_tokens(problem) > template.max_length:
            continue
        template.encode(problem, name)
        if demonstration_length is not None:
            template.encode_demonstration(problem, demonstration_length, name)
        usable.append(number)
    if not usable:
        raise ConfigError(
            f"{where}: none of the rows has a prompt of at most data.max_prompt_length "
            f"({template.max_length}) tokens; raise it"
        )
    return rows.select(usable) if isinstance(rows, Dataset) else [rows[number] for number in usable]
