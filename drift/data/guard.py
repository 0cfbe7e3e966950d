"""What is done about evaluation prompts among the training rows: stop, leave them out, or go on knowingly."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import IterableDataset as StreamingDataset
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from drift.contract import ConfigError
from drift.data.contamination import Fingerprint, Kind, PromptIndex, fingerprint
from drift.distributed import gather_over_ranks, rank
from drift.tasks import ProceduralTask, Task

Row = Mapping[str, Any]
EvaluationRows = tuple[str, Sequence[Row], Task]  # where they come from, in words; the rows; their task

_FILE = "contamination.jsonl"
_KINDS: tuple[Kind, ...] = ("exact", "normalised", "overlap")  # the strongest first
_NUM_SHOWN = 5
_SHOWN_CHARACTERS = 70


@dataclass(frozen=True, slots=True)
class Hit:
    """A training row with an evaluation prompt in it: a line of contamination.jsonl."""

    evaluation: str  # the evaluation set
    row: int  # its row, counted without those that `skip_unusable` leaves out
    train_row: int  # counted in the same way
    kind: Kind
    overlap: float  # share of the evaluation prompt's 8-grams that the training prompt holds; 1 where equal
    prompt: str  # without what the task adds to every prompt
    train_prompt: str


class ContaminationGuard:
    """Compares training rows with all that a run is judged by.

    Compared are the rows' own texts, which `Task.own_text` gives: nothing that a task, a system prompt or a
    chat template puts around them. Puzzles of procedural tasks are compared by their canonical form.

    How many evaluation prompts overlap with a training prompt, besides the equal ones (248 of MATH500 in
    MATH_rldf, none elsewhere), by threshold:

    | training   | evaluation     | 0.9 | 0.85 | 0.8 | 0.7 | 0.5 |
    |------------|----------------|-----|------|-----|-----|-----|
    | MATH_rldf  | MATH500 (500)  | 0   | 1    | 3   | 4   | 11  |
    | MATH_train | MATH500 (500)  | 0   | 0    | 5   | 16  | 35  |
    | MBPP_train | MBPP (498)     | 0   | 1    | 2   | 6   | 25  |

    and none of GSM8K's test in MATH_train or of HumanEval in MBPP_train at any of them. Read one by one, what
    is found at 0.7, where PaLM draws the line, is mostly the sibling of a problem, with other numbers or
    another question; in MBPP, at 0.85, one problem in other words. So the default of 0.95 doesn't stop a run
    for siblings: it finds prompts that a longer one holds, or that differ at their first or last words. Lower
    it, with `drop`, where siblings matter, too.

    Args:
        threshold: least share of an evaluation prompt's 8-grams in one training prompt, within (0, 1].
        allow: train on contaminated rows, with a warning.
        drop: leave contaminated rows out of training.

    Raises:
        ConfigError: where the threshold is out of range, or both `allow` and `drop` are set.
    """

    def __init__(self, threshold: float, allow: bool, drop: bool) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ConfigError(
                f"data.contamination_threshold is {threshold}: set it to more than 0 and at most 1"
            )
        if allow and drop:
            raise ConfigError(
                "data.allow_contamination and data.drop_contaminated are both true: they exclude each other, "
                "set one to false"
            )
        self.threshold = threshold
        self.allow = allow
        self.drop = drop
        self._sets: list[EvaluationRows] = []
        self._indices: list[PromptIndex] = []
        self._watched = ""
        self._stream_hits: set[int] = set()

    def compare_with(self, sets: Sequence[EvaluationRows]) -> None:
        """Takes the evaluation sets that training rows are to be compared with, instead of earlier ones.

        Warns where validation has prompts of a test.
        """
        self._sets = [found for found in sets if len(found[1])]
        prompts = [
            [_fingerprint(row, task, f"{where} row {number}") for number, row in enumerate(rows)]
            for where, rows, task in self._sets
        ]
        self._indices = [PromptIndex(found, self.threshold) for found in prompts]
        names = [where for where, _, _ in self._sets]
        validation = [
            pair for pair in zip(names, prompts, strict=True) if pair[0].startswith("data.validation")
        ]
        test = [pair for pair in zip(names, self._indices, strict=True) if pair[0].startswith("data.test")]
        for (where, found), (other, index) in product(validation, test):
            num = sum(bool(index.matches(prompt)) for prompt in found)
            if num:
                rank_zero_warn(
                    f"{num} of {len(found)} prompts of {where} are in {other}: a checkpoint that validation "
                    "chooses is chosen by them; validate on rows of the training data"
                )

    def hold_out(self, task: ProceduralTask) -> None:
        """Keeps the puzzles of the sets from being made for training, where they are of the same task.

        Args:
            task: makes the training rows. They are without end, so that nothing is lost, and their texts are
                not compared with sets of other tasks.
        """
        for where, rows, other in self._sets:
            if type(other) is type(task):
                task.hold_out(rows)
                rank_zero_info(f"{where}: its {len(rows)} puzzles are held out of training")

    def check(self, rows: Dataset, task: Task, where: str, run_folder: Callable[[], Path | None]) -> Set[int]:
        """The numbers of the rows that are not to be trained on; what was found is printed and written.

        Args:
            rows: the training rows.
            task: theirs.
            where: they come from, in words that begin with the setting.
            run_folder: where contamination.jsonl goes, None for nowhere; asked on all ranks, and only where
                there is something to write.

        Raises:
            ConfigError: where rows are contaminated and neither `allow` nor `drop` is set, where nothing is
                left, or where ranks read different rows.
        """
        if not self._sets:
            return set()
        hits = [hit for number, row in enumerate(rows) for hit in self._hits(row, number, task, where)]
        digest = blake2b(repr(hits).encode()).hexdigest()
        if len(set(gather_over_ranks(digest))) > 1:
            raise ConfigError(f"{where}: the ranks read different rows; give all of them the same files")
        listed = _write(hits, run_folder()) if hits else ""
        gather_over_ranks(None)  # the first rank's file is written before any rank stops the others
        if rank() == 0:
            self._show(hits, where)
        if not hits:
            return set()
        contaminated = {hit.train_row for hit in hits}
        share = f"{len(contaminated)} of {len(rows)} training rows"
        what = f"{where} holds evaluation prompts: {'; '.join(self._counts(hits))}{listed}"
        if self.allow:
            rank_zero_warn(f"{what}. data.allow_contamination is true: all {share} are trained on")
            return set()
        if not self.drop:
            raise ConfigError(f"{what}. {_fix(share)}")
        if len(contaminated) == len(rows):
            raise ConfigError(f"{what}. data.drop_contaminated leaves no training row: use other data")
        rank_zero_info(f"{what}. data.drop_contaminated is true: {share} are left out")
        return contaminated

    def watch(
        self, rows: StreamingDataset, task: Task, where: str, run_folder: Callable[[], Path | None]
    ) -> StreamingDataset:
        """The stream, whose rows are compared as they are read; what was found is written.

        Args:
            rows: the training rows.
            task: theirs.
            where: they come from, in words that begin with the setting.
            run_folder: where contamination.jsonl goes, None for nowhere; asked now, on all ranks.
        """
        if not self._sets:
            return rows
        folder = run_folder()
        self._watched = where
        self._stream_hits = set()

        def passes(row: Row, number: int) -> bool:
            """Whether a row is to be trained on."""
            hits = self._hits(row, number, task, where)
            if not hits:
                return True
            if number not in self._stream_hits:  # rows come again in every epoch
                self._stream_hits.add(number)
                listed = _write(hits, folder, more=len(self._stream_hits) > 1)
                what = f"{where} row {number} holds evaluation prompts: {_line(hits[0])}{listed}"
                if not (self.allow or self.drop):
                    raise ConfigError(f"{what}. {_fix('such rows')}")
                if self.allow and len(self._stream_hits) == 1:
                    rank_zero_warn(f"{what}. data.allow_contamination is true: it is trained on, as are more")
            return self.allow

        return rows.filter(passes, with_indices=True)

    def close(self) -> None:
        """Says how many rows of a stream were found, once training is over."""
        num = len(self._stream_hits)
        if self._watched and (self.allow or self.drop or num == 0):
            done = f"; they were {'trained on' if self.allow else 'left out'}" if num else ""
            rank_zero_info(f"{self._watched}: {num} of the rows that were read hold evaluation prompts{done}")
        self._watched = ""

    def _hits(self, row: Any, number: int, task: Task, where: str) -> list[Hit]:
        prompt = _fingerprint(row, task, f"{where} row {number}")
        return [
            Hit(
                where,
                match.row,
                number,
                match.kind,
                round(match.overlap, 3),
                index.texts[match.row],
                prompt.text,
            )
            for (where, _, _), index in zip(self._sets, self._indices, strict=True)
            for match in index.matches(prompt)
        ]

    def _counts(self, hits: Sequence[Hit], *, all_sets: bool = False) -> list[str]:
        """For each set, how many of its prompts were found, and how."""
        lines = []
        for where, rows, _ in self._sets:
            kinds: dict[int, Kind] = {}
            for hit in sorted(hits, key=lambda hit: _KINDS.index(hit.kind), reverse=True):
                if hit.evaluation == where:
                    kinds[hit.row] = hit.kind
            count = Counter(kinds.values())
            if kinds or all_sets:
                parts = ", ".join(f"{count[kind]} {kind}" for kind in _KINDS)
                lines.append(f"{len(kinds)} of {len(rows)} prompts of {where} ({parts})")
        return lines

    def _show(self, hits: Sequence[Hit], where: str) -> None:
        lines = [f"{line} are in {where}" for line in self._counts(hits, all_sets=True)]
        lines += [f"  {_line(hit)}" for hit in hits[:_NUM_SHOWN]]
        if len(hits) > _NUM_SHOWN:
            lines.append(f"  and {len(hits) - _NUM_SHOWN} more")
        sys.stdout.write("\n".join(["--- contamination ---", *lines, "---", ""]))
        sys.stdout.flush()


def _fingerprint(row: Any, task: Task, where: str) -> Fingerprint:
    try:
        text = task.own_text(row)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    # Two puzzles that differ in one cell share most n-grams, and are two puzzles.
    return fingerprint(text, exact_only=isinstance(task, ProceduralTask))


def _line(hit: Hit) -> str:
    share = f" {hit.overlap:.2f}" if hit.kind == "overlap" else ""
    text = " ".join(hit.prompt.split())
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return f"{hit.kind}{share}: training row {hit.train_row}, {hit.evaluation} row {hit.row}: {shown}"


def _fix(rows: str) -> str:
    return (
        f"Use other data, or leave {rows} out with data.drop_contaminated: true, "
        "or train on all of them with data.allow_contamination: true"
    )


def _write(hits: Sequence[Hit], folder: Path | None, *, more: bool = False) -> str:
    """Writes the hits, on the first rank, and says where they are."""
    if folder is None:
        return ""
    path = folder / _FILE
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(asdict(hit))}\n" for hit in hits)
        if more:
            with path.open("a", encoding="utf-8") as file:
                file.write(lines)
        else:
            new = path.with_name(f".{_FILE}.new")
            new.write_text(lines, encoding="utf-8")
            new.replace(path)
    return f", listed in {path}"
