"""Prompts beside the stream of the steps, for rounds that refill a step's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from drift.contract import ConfigError, PromptBatch
from drift.data.stream import BESIDE, Row, Rows
from drift.distributed import rank, world_size


class RefillPrompts:
    """Prompts by their place, from the rows of the stream in orders of their own.

    The stream goes on as if there were none of them. Their places, which key all draws, begin at 2**40.

    Args:
        rows: of the stream.
        collate: rows, their places and the update number to a batch.
    """

    def __init__(
        self, rows: Rows, collate: Callable[[Sequence[Row], Sequence[int], int], PromptBatch]
    ) -> None:
        self._rows = rows.beside()
        self._collate = collate
        self._next = 0
        self._coming: Iterator[Row] | None = None

    def share(self, place: int, num: int) -> PromptBatch:
        """This rank's prompts of those at `num` places; there may be fewer prompts than ranks.

        Args:
            place: the first of them, counted from 0.
            num: how many, over all ranks.

        Raises:
            ConfigError: where a row of any rank cannot be used.
        """
        if self._coming is None or place < self._next:
            self._coming, self._next = self._rows.starting_at(place), place
        # A streaming dataset would be read from its beginning, so what is passed over is read instead.
        rows = list(islice(self._coming, place - self._next, place - self._next + num))
        self._next = place + num
        # All of them are looked at by all ranks: one rank alone must not stop at a row.
        batch = self._collate(rows, range(BESIDE + place, BESIDE + place + num), 0)
        mine = slice(rank(), None, world_size())
        return replace(
            batch,
            prompt_ids=batch.prompt_ids[mine],
            prompt_mask=batch.prompt_mask[mine],
            problems=batch.problems[mine],
            positions=batch.positions[mine],
        )


def require_groups(train_groups: int | None, prompts_per_step: int) -> None:
    """Raises ConfigError where more groups are to be trained on than are rolled out."""
    if train_groups is not None and train_groups > prompts_per_step:
        raise ConfigError(
            f"model.train_groups is {train_groups}: data.prompts_per_step rolls out only "
            f"{prompts_per_step} groups; lower the one or raise the other"
        )
