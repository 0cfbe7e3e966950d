"""Results of an evaluation: as a table for the screen, and as a JSON file that `drift compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from drift.contract import ConfigError
from drift.evaluation import Cell, CellResult
from drift.fingerprint import fingerprint

Record = dict[str, Any]
# What every record has.
_KEYS = (
    "dataset",
    "length",
    "decode",
    "samples",
    "num",
    "accuracy",
    "num_correct",
    "fingerprint",
    "settings",
)


def record(dataset: str, cell: Cell, result: CellResult, settings: Mapping[str, Any]) -> Record:
    """What the results file says of a cell.

    Args:
        dataset: name of its evaluation set.
        cell: the cell.
        result: its answers.
        settings: all that its answers depend on but the weights, in plain values.
    """
    return {
        "dataset": dataset,
        "length": cell.length,
        "decode": cell.name,
        "samples": cell.samples,
        **result.figures(),
        "num_correct": result.num_correct,
        "fingerprint": fingerprint(settings),
        "settings": dict(settings),
    }


def write_results(path: Path, policy: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Writes results as JSON, one line a record; the file is there whole or not at all.

    Args:
        path: the file.
        policy: which policy they are of: any plain values.
        records: of the cells.
    """
    lines = ",\n".join(f"  {json.dumps(found)}" for found in records)
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in policy.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(f'{{\n{head}"results": [\n{lines}\n]\n}}\n', encoding="utf-8")
    new.replace(path)


@dataclass(frozen=True)
class Earlier:
    """A file that an earlier command left.

    Args:
        path: where it is.
        kept: where it is to be kept.
        time: when it was written, nanoseconds.
    """

    path: Path
    kept: Path
    time: int


def find_earlier(folder: Path, name: str) -> list[Earlier]:
    """Where to keep what an earlier command left: `test.1.json` for `test.json`, and `test.1.jsonl`.

    Args:
        folder: of the run.
        name: of the files, without their endings; all get one number, the next that is free.
    """
    found = [path for path in (folder / f"{name}.json", folder / f"{name}.jsonl") if path.exists()]
    numbers = [path.suffixes[0][1:] for path in folder.glob(f"{name}.*.json*")]
    number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    return [
        Earlier(path, path.with_name(f"{name}.{number}{path.suffix}"), path.stat().st_mtime_ns)
        for path in found
    ]


def keep_earlier(found: Sequence[Earlier]) -> None:
    """Renames what `find_earlier` found, unless that has been done, or it has been replaced."""
    for file in found:
        if file.path.exists() and file.path.stat().st_mtime_ns == file.time:
            file.path.rename(file.kept)
            rank_zero_info(f"what an earlier command wrote to {file.path.name} is {file.kept} now")


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises:
        ConfigError: there is no such file, or it is none that `write_results` wrote.
    """
    fix = "give the val.json or test.json of a run"
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} is no file; {fix}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); {fix}") from error
    records = found.get("results") if isinstance(found, dict) else None
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{str(path)!r} holds no results; {fix}")
    for number, each in enumerate(records):
        missing = [key for key in _KEYS if not isinstance(each, dict) or key not in each]
        if missing:
            raise ConfigError(f"{str(path)!r}: result {number} has no {missing}; {fix}")
    return found


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of a table whose columns are as wide as they need.

    Args:
        rows: cells, the same number in each row.
        left: this many columns are flush left, the others flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{text:<{width}}" if number < left else f"{text:>{width}}"
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def results_table(records: Sequence[Record]) -> list[str]:
    """The results for the screen, a line a cell."""
    ks = sorted({int(key.partition("@")[2]) for each in records for key in each if key.startswith("pass@")})
    head = ["data", "length", "decode", "prompts", "accuracy", "95 % interval"]
    # pass@1 is the accuracy.
    head += [*(f"pass@{k}" for k in ks[1:]), "reward", "timesteps", "tokens/forward", "unfinished", "seconds"]
    rows = [head]
    for each in records:
        prompts = f"{each['num']}" if each["samples"] == 1 else f"{each['num']} x {each['samples']}"
        rows.append(
            [
                each["dataset"],
                str(each["length"]),
                each["decode"],
                prompts,
                f"{each['accuracy']:.3f}",
                f"{each['accuracy_low']:.3f} to {each['accuracy_high']:.3f}",
                *(f"{each[f'pass@{k}']:.3f}" for k in ks[1:]),
                f"{each['reward']:.3f}",
                f"{each['timesteps']:.2f}",
                f"{each['tokens_per_forward']:.2f}",
                f"{each['unfinished']:.1%}",
                f"{each['seconds']:.1f}",
            ]
        )
    return aligned(rows, left=3)
