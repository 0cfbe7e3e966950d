"""Where rows come from: local JSON, JSONL or Parquet files, and datasets of the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetsError

from drift.contract import ConfigError
from drift.tasks import Task

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(kw_only=True)
class Source:
    """Names a set of rows.

    Args:
        path: a local .json, .jsonl or .parquet file, or the id of a dataset on the hub.
        split: the hub dataset's split; a local file has only one, which may be cut: "train[:10%]".
        name: the hub dataset's configuration; None for its default. Not for local files.
        streaming: read rows when they are needed instead of all at the start.
        limit: keep the first so many rows, >= 1; None for all.
        skip_unusable: leave out rows that the task or its reward refuses, such as one without an answer, and
            don't raise.
    """

    path: str
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    limit: int | None = None
    skip_unusable: bool = False


def load_rows(source: Source, task: Task, key: str) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a source: an IterableDataset where it streams, a Dataset where it does not.

    Every row of a Dataset is known to suit the task; of a stream only the first has been looked at.

    Args:
        source: what to load.
        task: the task that will read the rows.
        key: the setting that holds the source, such as "data.train"; error messages begin with it.

    Raises:
        ConfigError: there is no such file or dataset, it is empty or cannot be read, or a row does not suit
            the task.
    """
    if source.streaming and "[" in source.split:
        raise ConfigError(
            f"{key}.split is {source.split!r} and {key}.streaming is true: a stream cannot be cut; give the "
            "split without [...], and other rows to validation"
        )
    if source.limit is not None and source.limit < 1:
        raise ConfigError(f"{key}.limit={source.limit} must be at least 1, or null for all rows")
    file = _local_file(source, key)
    rows = _load_hub(source, key) if file is None else _load_file(file, source, key)
    name = f"dataset {source.path}" if file is None else f"file {file.name}"
    first = _first_row(rows, source, key)
    if isinstance(rows, datasets.Dataset):
        return rows.select(_usable_rows(rows, source, task, key, name))
    if source.skip_unusable:
        rows = rows.filter(partial(_is_usable, task=task))
        # Where nothing is left, the first row of all says why.
        first = next(iter(rows), first)
    task.check(first, f"{key} ({name}, row 0)")
    return rows if source.limit is None else rows.take(source.limit)


def load_all_rows(source: Source, task: Task, key: str) -> datasets.Dataset:
    """The rows of a source, read to the end where it streams; arguments and errors as of `load_rows`."""
    rows = load_rows(source, task, key)
    return datasets.Dataset.from_list(list(rows)) if isinstance(rows, datasets.IterableDataset) else rows


def _usable_rows(rows: datasets.Dataset, source: Source, task: Task, key: str, name: str) -> list[int]:
    """The rows to keep, by number."""
    usable: list[int] = []
    refused: ConfigError | None = None
    for number, row in enumerate(cast("Iterable[Mapping[str, Any]]", rows)):
        try:
            task.check(row, f"{key} ({name}, row {number})")
        except ConfigError as error:
            refused = refused or error
            if source.skip_unusable:
                continue
            # A first row that fails is rather a wrong setting than a bad row.
            hint = f"; {key}.skip_unusable=true leaves out such rows" if number else ""
            raise ConfigError(f"{error}{hint}") from None
        usable.append(number)
        if len(usable) == source.limit:
            break
    if refused and not usable:
        raise refused
    return _judgeable_rows(rows, usable, source, task, f"{key} ({name}, row {{}})")


def _judgeable_rows(
    rows: datasets.Dataset, usable: list[int], source: Source, task: Task, where: str
) -> list[int]:
    """Those of the usable rows whose answers the task's reward can judge."""
    problems = (task.problem(cast("Mapping[str, Any]", rows[number])) for number in usable)
    refused: dict[int, str] = {}
    for i, reason in task.reward.vet(problems):
        refused[usable[i]] = f"{where.format(usable[i])}: {reason}"
        if not source.skip_unusable:
            break
    if refused and (not source.skip_unusable or len(refused) == len(usable)):
        raise ConfigError(
            f"{next(iter(refused.values()))}; correct the data, or leave out such rows by skip_unusable"
        )
    return [number for number in usable if number not in refused]


def _is_usable(row: Mapping[str, Any], task: Task) -> bool:
    try:
        task.check(row, "a row")
    except ConfigError:
        return False
    return True


def _local_file(source: Source, key: str) -> Path | None:
    """The local file that the path names, None where it is the id of a hub dataset."""
    path = Path(source.path).expanduser()
    given = f"{key}.path={source.path!r}"
    kinds = ", ".join(_BUILDERS)
    if path.is_dir():
        raise ConfigError(f"{given} is a folder: name one file in it ({kinds})")
    if not path.exists():
        if _can_only_be_a_file(path):
            raise ConfigError(f"{given} does not exist: correct it (looked for {path.absolute()})")
        return None
    if path.suffix not in _BUILDERS:
        raise ConfigError(f"{given} has no known file type: convert it to one of {kinds}")
    if source.name is not None:
        raise ConfigError(f"{key}.name={source.name!r} is for hub datasets, {given} is a file: remove it")
    if _BUILDERS[path.suffix] == "json" and _first_character(path) not in ("[", "{", ""):
        # Not left to the parser: a file that holds a bare null ends the whole process.
        raise ConfigError(
            f"{given} holds no objects: a JSON file holds a list of them, a JSONL file one a line"
        )
    return path


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "")


def _can_only_be_a_file(path: Path) -> bool:
    # A hub id is "name" or "owner/name".
    return path.suffix in _BUILDERS or path.is_absolute() or len(path.parts) > 2 or ".." in path.parts


def _load_file(file: Path, source: Source, key: str) -> datasets.Dataset | datasets.IterableDataset:
    # A file has no splits of its own: it takes the name that was asked for, without a cut such as "[:10%]".
    data_files = {source.split.partition("[")[0]: glob.escape(str(file.absolute()))}
    try:
        return datasets.load_dataset(
            _BUILDERS[file.suffix], data_files=data_files, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # whatever the parsers raise, such as StopIteration for an empty file
        raise _unreadable(source, key, error) from error


def _load_hub(source: Source, key: str) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{key}: path={source.path!r}, name={source.name!r}, split={source.split!r} is no file here and "
            f"could not be loaded from the hub: {_reason(error)}. Correct it, or go online once (without "
            "HF_HUB_OFFLINE) so that it is cached"
        ) from error


def _first_row(
    rows: datasets.Dataset | datasets.IterableDataset, source: Source, key: str
) -> Mapping[str, Any]:
    try:
        first = next(iter(rows), None)
    except Exception as error:  # a stream meets a broken file only here
        raise _unreadable(source, key, error) from error
    if first is None:
        raise ConfigError(f"{key}.path={source.path!r} holds no rows in split {source.split!r}: correct it")
    return first


def _unreadable(source: Source, key: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{key}.path={source.path!r} (split {source.split!r}) is empty or cannot be read: {_reason(error)}. "
        "Correct the data or the path; a JSON file holds a list of objects, a JSONL file one object a line"
    )


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
