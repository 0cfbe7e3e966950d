"""Two results side by side: what differs, how sure that is, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift.contract import ConfigError
from drift.fingerprint import flattened
from drift.metrics import clustered_interval, correlation, difference_interval, sign_test
from drift.results import Record, aligned, read_results

# What makes results those of the same rows, so that prompt by prompt can be compared.
_SAME_ROWS = ("num_rows", "rows")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much a second accuracy differs from a first one."""

    value: float
    low: float  # 95 % interval
    high: float
    better: int | None = None  # prompts on which the second is better; None: not of the same rows
    worse: int | None = None
    p_value: float | None = None  # of the exact sign test over prompts


def compare_accuracy(first: Record, second: Record) -> Difference:
    """The difference between two accuracies, prompt by prompt where they are of the same rows."""
    means = [[count / each["samples"] for count in each["num_correct"]] for each in (first, second)]
    paired = all(first["settings"].get(key) == second["settings"].get(key) for key in _SAME_ROWS)
    low, high = difference_interval(
        _with_interval(first), _with_interval(second), correlation(*means) if paired else 0.0
    )
    value = second["accuracy"] - first["accuracy"]
    if not paired:
        return Difference(value=value, low=low, high=high)
    better = sum(b > a for a, b in zip(*means, strict=True))
    worse = sum(b < a for a, b in zip(*means, strict=True))
    p_value = sign_test(better, worse)
    return Difference(value=value, low=low, high=high, better=better, worse=worse, p_value=p_value)


def differing_settings(first: Record, second: Record) -> dict[str, tuple[Any, Any]]:
    """The settings that two results do not share, by name; a setting that one lacks is None there."""
    one, two = flattened(first["settings"]), flattened(second["settings"])
    names = [*one, *(name for name in two if name not in one)]
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def comparison(first: Path, second: Path) -> str:
    """The comparison of two results files, as text.

    Args:
        first: what is compared with.
        second: what is compared.

    Raises:
        ConfigError: a file cannot be read, or they have no results in common.
    """
    files = [read_results(path) for path in (first, second)]
    lines = []
    for name, path, found in zip("AB", (first, second), files, strict=True):
        lines.append(
            f"{name}  {path}  policy {found.get('policy')}, weights {found.get('weights')}"
            f"{_checkpoint(found)}"
        )
    pairs = list(_pairs(files[0]["results"], files[1]["results"]))
    if not pairs:
        names = [", ".join(dict.fromkeys(map(_name, found["results"]))) for found in files]
        raise ConfigError(
            f"{str(first)!r} has {names[0]}, {str(second)!r} has {names[1]}: no data, length and decode are "
            "in both; give results that share them, or files of one result each"
        )
    lines += ["", *aligned([_HEAD, *(_row(a, b) for a, b in pairs)], left=1), ""]
    for a, b in pairs:
        lines += _verdict(a, b)
    left_out = sum(len(found["results"]) for found in files) - 2 * len(pairs)
    if left_out:
        lines.append(f"{left_out} results are in one of the files only")
    return "\n".join(lines) + "\n"


_HEAD = [
    "",
    "accuracy A",
    "accuracy B",
    "B - A",
    "95 % interval",
    "timesteps A",
    "B",
    "tokens/forward A",
    "B",
]


def _row(first: Record, second: Record) -> list[str]:
    found = compare_accuracy(first, second)
    speeds = [f"{each[key]:.2f}" for key in ("timesteps", "tokens_per_forward") for each in (first, second)]
    return [
        _name(first) if _name(first) == _name(second) else f"{_name(first)} and {_name(second)}",
        *(f"{each['accuracy']:.3f}" for each in (first, second)),
        f"{found.value:+.3f}",
        f"{found.low:+.3f} to {found.high:+.3f}",
        *speeds,
    ]


def _verdict(first: Record, second: Record) -> Iterator[str]:
    found, name = compare_accuracy(first, second), _name(second)
    if found.p_value is None:
        yield f"{name}: not the same rows, so that prompts are not paired"
    else:
        yield (
            f"{name}: B is better on {found.better} prompts and worse on {found.worse} "
            f"(p = {found.p_value:.2g}, exact sign test)"
        )
    if first["fingerprint"] != second["fingerprint"]:
        yield f"WARNING {name}: not measured in the same way, so that B - A is not the policy's alone:"
        for setting, values in differing_settings(first, second).items():
            yield f"  {setting}: {_short(values[0])} in A, {_short(values[1])} in B"


def _pairs(first: Sequence[Record], second: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    if len(first) == len(second) == 1:
        yield first[0], second[0]
        return
    others = {_name(each): each for each in second}
    for each in first:
        if _name(each) in others:
            yield each, others[_name(each)]


def _with_interval(each: Record) -> tuple[float, float, float]:
    return each["accuracy"], *clustered_interval(each["num_correct"], each["samples"])


def _name(each: Record) -> str:
    return f"{each['dataset']}, length {each['length']}, {each['decode']}"


def _checkpoint(found: dict[str, Any]) -> str:
    return f", checkpoint {found['checkpoint']}" if found.get("checkpoint") else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
