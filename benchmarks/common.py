"""What the benchmarks share: a policy of a given size, timing in turns, peak memory, and result files."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from drift.models import LLaDA, LLaDAConfig

T = TypeVar("T")
RESULTS = Path(__file__).resolve().parent / "results"


def make_policy(kind: type[LLaDA] = LLaDA, *, vocab: int = 32768, width: int = 256, layers: int = 6) -> LLaDA:
    """A random policy with 8 heads: mask token 1, padding 0, and logits about as wide as a trained one's."""
    torch.manual_seed(0)
    sizes = {"d_model": width, "n_heads": 8, "n_layers": layers, "mlp_hidden_size": 3 * width}
    tokens = {"vocab_size": vocab, "mask_token_id": 1, "pad_token_id": 0}
    return kind(LLaDAConfig(**sizes, **tokens, init_std=0.1)).eval()


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    Variants take turns and are compared round by round: what else the machine does hits all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(seconds(run))
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """Median over the rounds of seconds of one variant in those of another."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def peak_memory(run: Callable[[], T]) -> tuple[int, T]:
    """Bytes that the process needed beyond what it had before the call, and the call's result; on Linux."""
    # What was freed before goes back, and the peak starts from here.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    found = run()
    return _status("VmHWM") - before, found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Stopwatch:
    """Seconds spent in named parts of a program."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str):
        """A context whose time is counted under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted under a name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the configuration."""
    git = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    load = round(os.getloadavg()[0], 1)
    device = {"threads": torch.get_num_threads(), "cpu": platform.machine(), "cores": os.cpu_count()}
    return {"torch": torch.__version__, **device, "load_average": load, "commit": commit}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows that have the same keys."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chosen(groups: Mapping[str, T], only: str | None) -> dict[str, T]:
    """All groups of cases, or the one that is asked for."""
    return {name: cases for name, cases in groups.items() if only in (None, name)}


def report(subject: str, found: Mapping[str, Sequence[Mapping[str, Any]]], *, quick: bool) -> None:
    """Writes and prints the rows of the groups `targets`, `grid` and `growth`.

    Args:
        subject: what was measured, "rollout" or "update".
        found: rows by group; each has its `case`, `tokens/s`, `plain tokens/s` and `plain / drift`. Groups
            that were not measured this time stay as they are recorded.
        quick: see `write`.
    """
    path = RESULTS / f"bench_{subject}.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not quick else {}
    groups = ("targets", "grid", "growth")
    where = recorded.get("environment", {}) | dict.fromkeys(found, environment())
    found = {name: found.get(name) or recorded[name] for name in groups if name in found or name in recorded}
    result = {"benchmark": subject, "quick": quick, **found, "environment": where}
    markdown = f"# {subject.capitalize()}s\n\n`python benchmarks/bench_{subject}.py`\n"
    markdown += "".join(
        f"\n## {name.capitalize()}\n\n{where[name]}\n\n{table(rows)}\n" for name, rows in found.items()
    )
    write(f"bench_{subject}", result, markdown, partial(_ratios_and_growth, found), quick=quick)


def _ratios_and_growth(found: Mapping[str, Sequence[Mapping[str, Any]]], figure: Any) -> None:
    """Ratios of the target cases, and tokens per second as sizes grow."""
    left, right = figure.subplots(1, 2)
    left.barh([row["case"] for row in found["targets"]], [row["plain / drift"] for row in found["targets"]])
    left.set_xlabel("times as fast as the baseline")
    left.invert_yaxis()
    rows = [*found["grid"], *found["growth"]]
    right.plot([row["tokens/s"] for row in rows], "o", label="drift")
    right.plot([row["plain tokens/s"] for row in rows], "o", label="baseline")
    right.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=90, fontsize=7)
    right.set_ylabel("tokens/s")
    right.set_yscale("log")
    right.legend()


def write(
    name: str, result: Mapping[str, Any], markdown: str, draw: Callable[[Any], None], *, quick: bool
) -> None:
    """Writes `results/NAME.json`, `.md` and `.png`, and prints the JSON as one line.

    Args:
        name: of the benchmark.
        result: what was measured.
        markdown: the same for readers.
        draw: draws on a matplotlib figure.
        quick: write to `results/quick/`, which git ignores: the figures mean nothing.
    """
    folder = RESULTS / "quick" if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    save_figure(folder / f"{name}.png", draw)
    print(json.dumps(result))


def save_figure(path: Path, draw: Callable[[Any], None]) -> None:
    """Writes the figure that a function draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=120)
