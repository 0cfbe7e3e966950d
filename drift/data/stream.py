"""Prompts as batches: an endless stream for training that can start anywhere, a finite one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import torch
from datasets import IterableDataset as StreamingDataset
from torch.utils.data import IterableDataset

from drift.contract import ConfigError, PromptBatch
from drift.data.template import PromptTemplate
from drift.randomness import fold
from drift.tasks import ProceduralTask, Task

Row = Mapping[str, Any]
# Places from here on are of prompts beside the stream, which never comes so far.
BESIDE = 2**40
_MADE_ANEW = 2**44  # further on are rows in the place of those that are too long
_MAX_MADE = 1000
_SHUFFLE_BUFFER = 10_000  # rows of a streaming dataset


class Rows(Protocol):
    """Rows without end, by their place in the stream."""

    def starting_at(self, position: int) -> Iterator[Row]:
        """The rows from this place on."""
        ...

    def beside(self) -> Rows:
        """Other rows that a task makes, or the same ones in orders of their own, always shuffled."""
        ...


class ProceduralRows:
    """Rows that a task makes up.

    Args:
        task: makes them, each from its place.
        first: index of the first one.
        fits: which rows to take; others are made in the place of those that do not fit. None: all.
    """

    def __init__(
        self, task: ProceduralTask, first: int = 0, fits: Callable[[Row], bool] | None = None
    ) -> None:
        self.task = task
        self.first = first
        self.fits = fits

    def starting_at(self, position: int) -> Iterator[Row]:
        """The rows from this place on."""
        for index in count(self.first + position):
            yield self._row(index)

    def beside(self) -> ProceduralRows:
        """Rows that are made of other indices."""
        return ProceduralRows(self.task, BESIDE, self.fits)

    def _row(self, index: int) -> Row:
        """The row of a place, the same whenever it is asked for."""
        for again in range(_MAX_MADE):
            row = self.task.row("train", index + again * _MADE_ANEW)
            if self.fits is None or self.fits(row):
                return row
        raise ConfigError(
            f"data.max_prompt_length: {_MAX_MADE} prompts of {type(self.task).__name__} in a row are longer; "
            "raise it, or widen the settings of data.task"
        )


class ShuffledRows:
    """The rows of a dataset, epoch after epoch, each in an order of its own.

    Args:
        rows: the dataset.
        seed: of the orders.
        shuffle: False keeps the dataset's order.
    """

    def __init__(self, rows: Sequence[Row], seed: int, shuffle: bool = True) -> None:
        self.rows = rows
        self.seed = seed
        self.shuffle = shuffle

    def starting_at(self, position: int) -> Iterator[Row]:
        """The rows from this place on."""
        start, offset = divmod(position, len(self.rows))
        for epoch in count(start):
            for index in self._order(epoch)[offset:]:
                yield self.rows[index]
            offset = 0

    def beside(self) -> ShuffledRows:
        """The same rows in other orders."""
        return ShuffledRows(self.rows, _other_seed(self.seed))

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.rows)))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()


class StreamedRows:
    """The rows of a streaming dataset, epoch after epoch; it starts late by reading past what comes before.

    Args:
        rows: the dataset.
        seed: of the shuffle buffer; None: the rows stay in their order.
    """

    def __init__(self, rows: StreamingDataset, seed: int | None = None) -> None:
        self.unshuffled = rows
        self.seed = seed
        self.rows = rows if seed is None else rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)

    def starting_at(self, position: int) -> Iterator[Row]:
        """The rows from this place on."""
        passed = 0
        for epoch in count():
            self.rows.set_epoch(epoch)
            found = 0
            for row in self.rows:
                found += 1
                passed += 1
                if passed > position:
                    yield row
            if found == 0:
                raise ConfigError(
                    "data.train is a streaming dataset without rows: give it some, or another path"
                )

    def beside(self) -> StreamedRows:
        """The same rows in other orders."""
        return StreamedRows(self.unshuffled, _other_seed(self.seed or 0))


def _other_seed(seed: int) -> int:
    # Torch's generators look at 32 bits alone, and each epoch counts up.
    return int(fold(seed, BESIDE)) % 2**31


class PromptStream(IterableDataset[PromptBatch]):
    """Batches of prompts without end: this rank's share of every step's prompts.

    Args:
        rows: where they come from.
        collate: rows, their places and the update number to a batch.
        prompts_per_step: prompts of a step over all ranks.
        share: which of them are this rank's.
        start_step: batches that were taken before; the optimizer step, where none are accumulated.
        num_updates: how often each batch is given, with its `update` counting up.
    """

    def __init__(
        self,
        rows: Rows,
        collate: Callable[[Sequence[Row], Sequence[int], int], PromptBatch],
        prompts_per_step: int,
        share: range,
        start_step: int,
        num_updates: int,
    ) -> None:
        self.rows = rows
        self.collate = collate
        self.prompts_per_step = prompts_per_step
        self.share = share
        self.start_step = start_step
        self.num_updates = num_updates

    def __iter__(self) -> Iterator[PromptBatch]:
        """The batches from `start_step` on."""
        rollout, update = divmod(self.start_step, self.num_updates)
        position = rollout * self.prompts_per_step
        rows = self.rows.starting_at(position)
        while True:
            step = [next(rows) for _ in range(self.prompts_per_step)]
            for number in range(update, self.num_updates):
                yield self.collate([step[i] for i in self.share], [position + i for i in self.share], number)
            position += self.prompts_per_step
            update = 0


class EvaluationPrompts(IterableDataset[PromptBatch]):
    """All rows once, in batches: this rank's share of them.

    It has no length: Lightning skips the end of validation on a rank whose share is empty, and the others
    would wait there for its sums.

    Args:
        rows: the rows.
        collate: rows, their places and the update number to a batch.
        batch_size: prompts of a batch.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row], Sequence[int], int], PromptBatch],
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.rows = rows
        self.collate = collate
        self.batch_size = batch_size
        self.places = range(rank, len(rows), world_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        """The batches in order."""
        for start in range(0, len(self.places), self.batch_size):
            places = self.places[start : start + self.batch_size]
            yield self.collate([self.rows[i] for i in places], list(places), 0)


def collate_prompts(
    task: Task,
    template: PromptTemplate,
    rows: Sequence[Row],
    positions: Sequence[int],
    update: int,
    *,
    demonstration_length: int | None = None,
    where: str = "a row",
) -> PromptBatch:
    """A batch of prompts, left-padded.

    Args:
        task: makes problems of the rows.
        template: renders and tokenises them.
        rows: [B] rows.
        positions: [B] their places.
        update: number of the update that the batch is for.
        demonstration_length: also tokenise the demonstrations, to this length.
        where: the dataset in words, for error messages.
    """
    names = [f"{where} {position}" for position in positions]
    for row, name in zip(rows, names, strict=True):
        task.check(row, name)
    problems = [task.problem(row) for row in rows]
    prompts = [template.encode(problem, name) for problem, name in zip(problems, names, strict=True)]
    width = max(len(ids) for ids in prompts)
    pad = template.tokenizer.pad_token_id
    completion_ids = None
    if demonstration_length is not None:
        completion_ids = torch.tensor(
            [
                template.encode_demonstration(problem, demonstration_length, name)
                for problem, name in zip(problems, names, strict=True)
            ]
        )
    return PromptBatch(
        prompt_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
        prompt_mask=torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts]),
        problems=problems,
        positions=torch.tensor(positions),
        update=update,
        completion_ids=completion_ids,
    )
