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
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from common import RESULTS, save_figure, table, write
from curves import draw_all, draw_one
from learning import Run, base_policy, learn
from recipes import BEST, EMA_DECAY, RECIPES
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
                f"less than {BEST} by": _interval(_behind(runs, _chosen(subject, BEST, budget))),
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


def overview() -> list[dict[str, Any]]:
    """One row for every recipe: accuracy in % and gain in points, where all have the same budget."""
    rows = []
    for recipe in RECIPES:
        row = {"recipe": recipe}
        for subject, budget in BUDGETS.items():
            runs = _chosen(subject, recipe, budget)
            accuracy = (
                f"{100 * statistics.mean(run['final']['accuracy'] for run in runs):.1f}" if runs else "-"
            )
            row |= {subject: accuracy, f"gain on {subject}": _interval([_gain(run) for run in runs])}
        rows.append(row)
    return rows


def _chosen(subject: str, recipe: str, budget: float) -> list[dict[str, Any]]:
    """Runs of a recipe, with the learning rate of which there are most."""
    runs = made(subject, recipe, budget, SEEDS)
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
        f"are measured by an average of their weights (EMA, {EMA_DECAY}), and by their last weights. Plots "
        "show what is beyond the budget that all have on a logarithmic scale.\n"
    )
    all_tasks = overview()
    shared = ", ".join(f"{subject} {budget / 1e6:g}" for subject, budget in BUDGETS.items())
    markdown += f"\n## All tasks (million passes: {shared})\n\n{table(all_tasks)}\n"
    markdown += "".join(f"\n## {name}\n\n{table(rows)}\n" for name, rows in tables.items())
    # A run's longest curve holds those that it had at smaller budgets.
    by_length = sorted((run for run in done() if run["seed"] in SEEDS), key=lambda run: run["budget"])
    runs = list({key({**run, "budget": None}): run for run in by_length}.values())
    result = {"benchmark": "learning", "all tasks": all_tasks, **tables}
    write("bench_learning", result, markdown, partial(draw_all, runs=runs, budgets=BUDGETS), quick=False)
    sudoku = [run for run in runs if run["subject"] == "sudoku"]
    if sudoku:
        draw = partial(draw_one, runs=sudoku, budget=BUDGETS["sudoku"])
        save_figure(RESULTS / "bench_learning_sudoku.png", draw)


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
