"""Does it learn: every estimator and both likelihoods, on three tasks, under one budget of passes.

`python benchmarks/bench_learning.py` makes the base policies, tries a small grid of learning rates on seeds
of their own for half of the budget, runs the best of each recipe on three seeds, and writes what came out. On
sudoku, the best recipe and the paper's go on beyond that budget. Runs that
`results/learning_runs.jsonl` holds already are not made again, so that it may be stopped at any time, and
`--subject`, `--recipe` choose some.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from common import RESULTS, table, write
from learning import Run, base_policy, learn
from matplotlib import colormaps
from recipes import BEST, EMA_DECAY, PAPER, RECIPES
from subjects import SUBJECTS

SEEDS, LR_SEED = (0, 1, 2), 100
# Of 0.975, for as many seeds (two degrees of freedom).
T_QUANTILE = 4.303
# Share of the budget in which a learning rate is tried.
TRIAL = 0.5
LRS = (5e-5, 1e-4, 2e-4)
BUDGETS = {"quickstart": 3e4, "sudoku": 4e5, "countdown": 1e5}
# Further ones: about six minutes of two cores, and three times that.
LONG = {("sudoku", "rldf_commit"): (1.2e6, 3.6e6), ("sudoku", "weighted (RLDF)"): (1.2e6,)}
RUNS = RESULTS / "learning_runs.jsonl"
BASES = Path("runs/bench_learning")


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same one."""
    return tuple(run[name] for name in ("subject", "recipe", "lr", "seed", "budget"))


def keys(run: Run) -> list[tuple[Any, ...]]:
    """The keys of a run's results, one for each budget."""
    return [key({**vars(run), "budget": budget}) for budget in run.budgets]


def done() -> list[dict[str, Any]]:
    """All runs that have been made, of recipes and tasks that are still set as they were."""
    if not RUNS.exists():
        return []
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    settings = {name: json.loads(json.dumps(asdict(recipe))) for name, recipe in RECIPES.items()}
    tasks = {name: subject.description() for name, subject in SUBJECTS.items()}

    def as_now(run: dict[str, Any]) -> bool:
        return run["settings"] == settings.get(run["recipe"]) and run["task"] == tasks[run["subject"]]

    return [run for run in runs if as_now(run)]


def made(subject: str, recipe: str, budget: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of a recipe that have been made."""
    wanted = (subject, recipe, budget)
    runs = [run for run in done() if (run["subject"], run["recipe"], run["budget"]) == wanted]
    return sorted((run for run in runs if run["seed"] in seeds), key=lambda run: run["seed"])


def make(runs: Iterable[Run], workers: int, device: str) -> None:
    """Makes the runs that have not been made, several at a time, each in a process of its own."""
    known = {key(run) for run in done()}
    missing = [run for run in runs if not known.issuperset(keys(run))]
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    lock = Lock()

    def start(run: Run) -> None:
        command = [sys.executable, __file__, "--device", device, "--one", json.dumps(vars(run))]
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results = json.loads(found.stdout.splitlines()[-1])
        with lock, RUNS.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(result) + "\n" for result in results if key(result) not in known))
        for result in results:
            came_out = result.get("final", result["curve"][-1])["accuracy"]
            print(f"{key(result)}: {came_out:.3f}, {result['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(start, missing))


def best_lr(subject: str, recipe: str, budget: float) -> float:
    """The learning rate whose trial ended best in validation."""
    runs = made(subject, recipe, budget * TRIAL, [LR_SEED])
    return max(runs, key=lambda run: run["curve"][-1]["accuracy"])["lr"]


def rows_of(subject: str, budget: float) -> list[dict[str, Any]]:
    """One row of the table for every recipe and learning rate, with as many seeds as there are."""
    found = [(recipe, made(subject, recipe, budget, SEEDS)) for recipe in RECIPES]
    rows = []
    for recipe, lr in [(recipe, lr) for recipe, runs in found for lr in sorted({run["lr"] for run in runs})]:
        runs = [run for run in made(subject, recipe, budget, SEEDS) if run["lr"] == lr]
        rows.append(
            {
                "recipe": recipe,
                "lr": lr,
                "of the grid": {min(LRS): "lowest", max(LRS): "highest"}.get(lr, "inside"),
                "seeds": len(runs),
                "base": _spread(runs, "base", "accuracy"),
                "accuracy": _spread(runs, "final", "accuracy"),
                "of the last weights": _spread(runs, "last", "accuracy"),
                "gain, points": _interval([_gain(run) for run in runs]),
                f"less than {BEST} by": _interval(_behind(runs, _best(subject, budget))),
                "one by one, base": _spread(runs, "base", "one by one"),
                "one by one": _spread(runs, "final", "one by one"),
                "timesteps, base": _spread(runs, "base", "timesteps", digits=2),
                "timesteps": _spread(runs, "final", "timesteps", digits=2),
                "largest fall from the best": f"{max(_fall(run) for run in runs):.3f}",
                "steps": round(statistics.mean(run["steps"] for run in runs)),
                "seconds": ", ".join(f"{run['seconds']:.0f}" for run in runs),
            }
        )
    return rows


def _best(subject: str, budget: float) -> list[dict[str, Any]]:
    """Runs of the best recipe, with the learning rate of which there are most."""
    runs = made(subject, BEST, budget, SEEDS)
    return max(([run for run in runs if run["lr"] == lr] for lr in LRS), key=len)


def _spread(runs: Sequence[dict[str, Any]], where: str, name: str, digits: int = 3) -> str:
    values = [run[where][name] for run in runs if where in run]
    if not values:
        return "-"
    mean, seeds = statistics.mean(values), ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean:.{digits}f} ({seeds})"


def _gain(run: dict[str, Any]) -> float:
    """Points of accuracy above the run's base."""
    return 100 * (run["final"]["accuracy"] - run["base"]["accuracy"])


def _behind(runs: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]) -> list[float]:
    """Points by which runs are below the best recipe's on the same seeds."""
    gains = {run["seed"]: _gain(run) for run in best}
    return [gains[run["seed"]] - _gain(run) for run in runs if run["seed"] in gains]


def _interval(values: Sequence[float]) -> str:
    """Mean, with its 95 % interval by Student's t where there are all seeds."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):+.1f}"
    if len(values) < len(SEEDS):
        return mean
    return f"{mean} ± {T_QUANTILE * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def _fall(run: dict[str, Any]) -> float:
    """How far the run's last point is below its best, in accuracy."""
    accuracies = [point["accuracy"] for point in run["curve"]]
    return max(accuracies) - accuracies[-1]


def report() -> None:
    """Writes tables and curves of all runs that have been made."""
    tables = {
        f"{subject}, {budget / 1e6:g} million passes": rows_of(subject, budget)
        for subject in SUBJECTS
        for budget in sorted({run["budget"] for run in done() if run["subject"] == subject})
    }
    tables = {name: rows for name, rows in tables.items() if rows}
    markdown = (
        "# Learning\n\n`python benchmarks/bench_learning.py`; means over seeds, each seed in brackets. Runs "
        f"are measured by an average of their weights (EMA, {EMA_DECAY}), and by their last weights.\n"
    )
    markdown += "".join(f"\n## {name}\n\n{table(rows)}\n" for name, rows in tables.items())
    # A run's longest curve holds those that it had at smaller budgets.
    by_length = sorted((run for run in done() if run["seed"] in SEEDS), key=lambda run: run["budget"])
    runs = list({key({**run, "budget": None}): run for run in by_length}.values())
    write(
        "bench_learning", {"benchmark": "learning", **tables}, markdown, lambda f: _draw(f, runs), quick=False
    )


def _draw(figure: Any, runs: Sequence[dict[str, Any]]) -> None:
    """A row for each figure, two columns for each task: against passes and seconds; a line a recipe."""
    subjects = [name for name in SUBJECTS if any(run["subject"] == name for run in runs)]
    figures = {"accuracy": "accuracy, threshold", "one by one": "accuracy, one by one"}
    figures |= {"timesteps": "timesteps per answer", "reward": "reward of rollouts"}
    figure.set_size_inches(6 * max(len(subjects), 1) + 2, 12)
    panels = figure.subplots(len(figures), 2 * max(len(subjects), 1), squeeze=False)
    for left, right in zip(panels[:, 0::2].flat, panels[:, 1::2].flat, strict=True):
        right.sharey(left)
    recipes = [name for name in RECIPES if any(run["recipe"] == name for run in runs)]
    for subject, recipe in itertools.product(subjects, recipes):
        curves = [run["curve"] for run in runs if (run["subject"], run["recipe"]) == (subject, recipe)]
        # Points of the same number in all seeds, to the last ones.
        least = min(map(len, curves), default=0)
        curves = [[*curve[: least - 1], curve[-1]] for curve in curves]
        # Before the first step there was no rollout.
        points = [
            {name: [math.nan if point[name] is None else point[name] for point in same] for name in same[0]}
            for same in zip(*curves, strict=True)
        ]
        for row, name in enumerate(figures):
            spread = [(min(point[name]), max(point[name])) for point in points]
            for offset, (against, unit) in enumerate((("passes", 1e-3), ("seconds", 1.0))):
                panel = panels[row, 2 * subjects.index(subject) + offset]
                across = [unit * statistics.mean(point[against]) for point in points]
                panel.plot(across, [statistics.mean(point[name]) for point in points], **_line(recipe))
                if recipe in (BEST, PAPER) and points:
                    color = _line(recipe)["color"]
                    panel.fill_between(across, *zip(*spread, strict=True), color=color, alpha=0.15, lw=0)
    for row, label in enumerate(figures.values()):
        panels[row, 0].set_ylabel(label)
    for column, subject in enumerate(subjects):
        panels[0, 2 * column].set_title(subject)
        panels[-1, 2 * column].set_xlabel("thousand passes of rows")
        panels[-1, 2 * column + 1].set_xlabel("seconds")
    lines = [panels[0, 0].plot([], [], **_line(name))[0] for name in recipes]
    figure.legend(lines, recipes, loc="outside lower center", ncols=4, fontsize=9)


def _line(recipe: str) -> dict[str, Any]:
    """The same colour for a sampler's two likelihoods; thick where the text compares."""
    token = recipe.removesuffix(", commits")
    color = "black" if recipe == BEST else colormaps["tab20"](list(RECIPES).index(token))
    width, order = (3.0, 3) if recipe in (BEST, PAPER) else (1.2, 2)
    return {"color": color, "lw": width, "zorder": order, "ls": "-" if token == recipe else "--"}


def main() -> None:
    """Makes the runs and the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", choices=SUBJECTS, action="append", help="some of the tasks")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="some of the recipes")
    parser.add_argument("--lr", type=float, help="instead of trying the grid")
    parser.add_argument("--budget", type=float, help="passes of a run, in place of the task's own")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cpu", help="Lightning's accelerator")
    parser.add_argument(
        "--report", action="store_true", help="only write the report of the runs that are there"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        run = Run(**json.loads(options.one))
        print(json.dumps(learn(run, RECIPES[run.recipe], BASES, options.device)))
        return
    recipes = options.recipe or list(RECIPES)
    for subject in () if options.report else options.subject or SUBJECTS:
        base_policy(subject, BASES, options.device)
        budget = options.budget or BUDGETS[subject]
        trials = [
            Run(subject=subject, recipe=recipe, lr=lr, seed=LR_SEED, budgets=(budget * TRIAL,), fresh=False)
            for recipe in recipes
            for lr in LRS
        ]
        make(() if options.lr else trials, options.workers, options.device)
        chosen = {recipe: options.lr or best_lr(subject, recipe, budget) for recipe in recipes}
        final = []
        for seed, (recipe, lr) in itertools.product(SEEDS, chosen.items()):
            budgets = (budget,) if options.budget else (budget, *LONG.get((subject, recipe), ()))
            final.append(Run(subject=subject, recipe=recipe, lr=lr, seed=seed, budgets=budgets))
        make(final, options.workers, options.device)
    report()


if __name__ == "__main__":
    main()
