"""Which rows take part in the next pass: a queue of prompts whose rows go from block to block on their own.

All of this is on the host. What a pass left is read when it is needed; how many positions a static schedule
leaves is known without that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drift.rollout.cache import PrefixCache
from drift.rollout.config import DenoiseConfig

# Rows share passes as long as less than this share of their positions, or this many, are padding of theirs.
PADDING_SHARE = 1 / 8
PADDING_LEAST = 256


@dataclass(slots=True)
class Row:
    """A row that is being decoded."""

    index: int  # among the rows of the rollout
    part: int  # of the rows decoded at once
    start: int  # where its passes begin: what is before it is padding
    padded: bool  # whether there is padding behind it
    num_masked: int  # positions of its block
    block: int = 0
    num_passes: int = 0  # that this block has had


class Cohort:
    """Rows that can take part in one pass, and what the device needs to know of them.

    Args:
        rows: at least one, with the same start; with a cache they are at the same block, and have all opened
            it or none has.
        cache: of the block they have opened, in their order; None: they open it, or no cache is used.
        block_length: positions of a block.
        device: of the policy.
    """

    def __init__(
        self, rows: list[Row], cache: PrefixCache | None, block_length: int, device: torch.device
    ) -> None:
        self.rows = rows
        self.cache = cache
        self.start = rows[0].start
        self.padded = any(row.padded for row in rows)
        self.index = torch.tensor([row.index for row in rows], device=device)  # [n] int64
        blocks = torch.tensor([row.block for row in rows], device=device)
        self.columns = blocks[:, None] * block_length + torch.arange(block_length, device=device)  # [n,b]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_masked(self) -> int:
        """Masked positions of all rows' blocks."""
        return sum(row.num_masked for row in self.rows)


class Schedule:
    """Makes cohorts of the rows that are being decoded, and lets the next ones in as others end.

    While prompts wait, the largest cohort goes next: rows that are behind are joined by those that come. When
    none waits any more, those furthest behind go next, and those before them wait, so that they share passes.
    The order changes no result.

    Args:
        paddings: of N rows, positions before the prompt.
        total_length: P + C.
        num_blocks: of a completion.
        config: how to decode.
        batch_size: rows decoded at once.
        device: of the policy.
        quotas: static schedule: positions that each pass of each block commits; None: dynamic.
    """

    def __init__(
        self,
        paddings: Sequence[int],
        total_length: int,
        num_blocks: int,
        config: DenoiseConfig,
        batch_size: int,
        device: torch.device,
        quotas: list[list[int]] | None,
    ) -> None:
        self.num_blocks_done = 0  # of all rows; those that are never decoded count, too
        self._num_blocks = num_blocks
        self._config = config
        self._device = device
        self._quotas = quotas
        self._paddings = paddings
        self._starts = _starts(paddings, total_length)
        # Rows of about one length at a time.
        self._waiting = deque(sorted(range(len(paddings)), key=paddings.__getitem__))
        self._ready: dict[tuple[int, ...], Cohort] = {}
        self._unread: deque[tuple[Cohort, _Reading]] = deque()
        self._num_parts = config.interleave or (1 if device.type == "cpu" else 2)
        self._admit([place % self._num_parts for place in range(min(batch_size, len(paddings)))])

    def next(self) -> Cohort:
        """The cohort that takes part in the next pass."""
        if self._waiting:
            return self._ready.pop(min(self._ready, key=lambda key: (-len(self._ready[key]), key)))
        return self._ready.pop(min(self._ready))

    @property
    def done(self) -> bool:
        """Whether no row is left to decode."""
        return self.num_blocks_done == len(self._paddings) * self._num_blocks

    def quotas(self, cohort: Cohort) -> Tensor | int:
        """[n,1] positions that the next pass commits in each row; 0 where the schedule is dynamic."""
        if self._quotas is None:
            return 0
        quotas = [self._quotas[row.block][row.num_passes] for row in cohort.rows]
        return quotas[0] if len(set(quotas)) == 1 else torch.tensor(quotas, device=self._device)[:, None]

    def passed(self, cohort: Cohort, left: Tensor) -> None:
        """Takes a cohort back after its pass.

        Args:
            cohort: what `next` gave.
            left: [n] int64, see `Canvas.commit`.
        """
        if self._quotas is not None:
            known = [row.num_masked - self._quotas[row.block][row.num_passes] for row in cohort.rows]
            if min(known) > 0 or not self._config.stop_at_padding:
                self._settle(cohort, known)
                return
        self._unread.append((cohort, _Reading(left)))
        while self._unread and (len(self._unread) >= self._num_parts or not self._ready):
            cohort, reading = self._unread.popleft()
            self._settle(cohort, reading.values())

    def _settle(self, cohort: Cohort, left: list[int]) -> None:
        """Moves rows on: within their block, to the next one, or out, which lets others in."""
        stay = [num > 0 for num in left]
        for row, num in zip(cohort.rows, left, strict=True):
            row.num_masked, row.num_passes = num, row.num_passes + 1
            if num <= 0:
                self._finish_block(row, ended=num < 0 and self._config.stop_at_padding)
        if all(stay):
            self._add(cohort)
            return
        rows = [row for row, here in zip(cohort.rows, stay, strict=True) if here]
        moved = [row for row, here in zip(cohort.rows, stay, strict=True) if not here]
        onward = [row for row in moved if row.block < self._num_blocks]
        if cohort.cache is None:
            rows, onward = rows + onward, []
        elif rows:
            cohort.cache.keep(torch.tensor(stay, device=self._device))
        for some, cache in ((rows, cohort.cache), (onward, None)):
            if some:
                self._add(Cohort(some, cache, self._config.block_length, self._device))
        self._admit([row.part for row in moved if row.block == self._num_blocks])

    def _finish_block(self, row: Row, *, ended: bool) -> None:
        block = self._num_blocks if ended else row.block + 1
        self.num_blocks_done += block - row.block
        row.block, row.num_passes, row.num_masked = block, 0, self._config.block_length

    def _admit(self, parts: list[int]) -> None:
        """Lets a row that waits into each of the given parts, as long as there are any."""
        for part in parts[: len(self._waiting)]:
            index = self._waiting.popleft()
            padding, length = self._paddings[index], self._config.block_length
            start = self._starts[index]
            row = Row(index, part, start, padding > start, num_masked=length)
            self._add(Cohort([row], None, length, self._device))

    def _add(self, cohort: Cohort) -> None:
        """Makes a cohort ready, joined with the one that is at the same point."""
        row = cohort.rows[0]
        # Cohorts compare by this: the earliest block, and in it those that are to open it, come first.
        key = (row.block, row.num_passes > 0) if self._config.use_cache else ()
        key = (*key, row.part, row.start)
        there = self._ready.get(key)
        if there is not None:
            if there.cache is not None and cohort.cache is not None:
                there.cache.append(cohort.cache)
            cohort = Cohort(there.rows + cohort.rows, there.cache, self._config.block_length, self._device)
        self._ready[key] = cohort


def _starts(paddings: Sequence[int], total_length: int) -> dict[int, int]:
    """Where the passes of each row begin: at its own padding, or at that of a somewhat longer row."""
    starts, start, num_padding, num_positions = {}, 0, 0, 0
    for index in sorted(range(len(paddings)), key=paddings.__getitem__):
        padding = paddings[index]
        if not starts or num_padding + padding - start > max(PADDING_LEAST, PADDING_SHARE * num_positions):
            start, num_padding, num_positions = padding, 0, 0
        starts[index] = start
        num_padding += padding - start
        num_positions += total_length - padding
    return starts


class _Reading:
    """Values on their way to the host, which are waited for only when they are asked for."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event = None
        if values.device.type != "cpu":
            self._event = torch.Event(values.device)
            self._event.record()

    def values(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
