"""Metrics of a run that goes on: in the same files, each step once."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from drift.storage import replacing, sync

_EVENTS = "events.out.tfevents.*"
_AGAIN = "prompt/text_summary"  # written at every start
_RECORD_OVERHEAD = 16  # bytes: length, its checksum, the content's checksum


class PastLogs:
    """What earlier starts of a run have logged, found before this one logs anything.

    Of TensorBoard and CSV loggers; others are left alone.

    Args:
        loggers: of the trainer, on the first rank.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._events: list[Path] = []
        self._tables: list[_Table] = []
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                self._events += sorted(Path(logger.log_dir).glob(_EVENTS))
            elif isinstance(logger, CSVLogger):
                # Lightning's own writer deletes the file that it finds, and rewrites it in place.
                logger._experiment = table = _Table(logger.log_dir)
                self._tables.append(table)

    def cut(self, step: int) -> None:
        """Drops what was logged at a step or after it: it will be logged again.

        Raises:
            StorageError: where the files cannot be written.
        """
        for file in self._events:
            _cut_events(file, step)
        for table in self._tables:
            table.cut(step)


def flush(loggers: Sequence[Logger]) -> None:
    """Has everything that was logged on the disk: a checkpoint must not be ahead of its metrics."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.save()
            for file in Path(logger.log_dir).glob(_EVENTS):
                sync(file)
        elif isinstance(logger, CSVLogger):
            logger.save()
            file = Path(logger.experiment.metrics_file_path)
            if file.exists():
                sync(file)


class _Table(ExperimentWriter):
    """The writer of a CSV logger that goes on with the file there is."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def cut(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last may have been cut short
        rows = [row for row in csv.DictReader(whole) if int(row["step"]) < step]
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with self._path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self._path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def _check_log_dir_exists(self) -> None:
        """Leaves the files that are there."""


def _cut_events(path: Path, step: int) -> None:
    size, records = 0, list(RawEventFileLoader(str(path)).Load())
    kept = []
    for record in records:
        size += len(record) + _RECORD_OVERHEAD
        event = Event.FromString(record)
        again = any(value.tag == _AGAIN for value in event.summary.value)
        if event.HasField("file_version") or (event.step < step and not again):
            kept.append(record)
    if len(kept) == len(records) and size == path.stat().st_size:
        return
    with replacing(path) as new, new.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)
