"""Draws the curves of `bench_learning`: a line a recipe, its mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.ticker import NullLocator
from recipes import BEST, PAPER, RECIPES

_FIGURES = {
    "accuracy": "accuracy, threshold",
    "one by one": "accuracy, one by one",
    "timesteps": "timesteps per answer",
    "reward": "reward of rollouts",
}
_ACROSS = {"passes": ("thousand passes of rows", 1e-3), "seconds": ("seconds", 1.0)}


def draw_all(figure: Any, runs: Sequence[Mapping[str, Any]], budgets: Mapping[str, float]) -> None:
    """A row for each figure, two columns for each task: against passes and seconds.

    Args:
        figure: to draw on.
        runs: the longest of each recipe and seed.
        budgets: passes that all recipes have, by task; what is beyond is drawn on a logarithmic scale.
    """
    subjects = [name for name in budgets if any(run["subject"] == name for run in runs)]
    figure.set_size_inches(6 * max(len(subjects), 1) + 2, 12)
    panels = figure.subplots(len(_FIGURES), 2 * max(len(subjects), 1), squeeze=False)
    for left, right in zip(panels[:, 0::2].flat, panels[:, 1::2].flat, strict=True):
        right.sharey(left)
    for row, (name, label) in enumerate(_FIGURES.items()):
        panels[row, 0].set_ylabel(label)
        for column, subject in enumerate(subjects):
            of_subject = [run for run in runs if run["subject"] == subject]
            for panel, against in zip(panels[row, 2 * column :], _ACROSS, strict=False):
                _panel(panel, of_subject, name, against, budgets[subject])
    for column, subject in enumerate(subjects):
        panels[0, 2 * column].set_title(subject)
        for panel, (label, _) in zip(panels[-1, 2 * column :], _ACROSS.values(), strict=False):
            panel.set_xlabel(label)
    _legend(figure, panels[0, 0], runs)


def draw_one(figure: Any, runs: Sequence[Mapping[str, Any]], budget: float) -> None:
    """Accuracy, timesteps and reward of one task's runs against passes; arguments as in `draw_all`."""
    figure.set_size_inches(13, 5.5)
    panels = figure.subplots(1, 3, squeeze=False)[0]
    for panel, name in zip(panels, ("accuracy", "timesteps", "reward"), strict=True):
        _panel(panel, runs, name, "passes", budget)
        panel.set_title(_FIGURES[name])
        panel.set_xlabel(_ACROSS["passes"][0])
    _legend(figure, panels[0], runs)


def _panel(panel: Any, runs: Sequence[Mapping[str, Any]], name: str, against: str, budget: float) -> None:
    unit = _ACROSS[against][1]
    for recipe in RECIPES:
        points = _points([run["curve"] for run in runs if run["recipe"] == recipe])
        across = [unit * statistics.mean(point[against]) for point in points]
        panel.plot(across, [statistics.mean(point[name]) for point in points], **_line(recipe))
        if recipe in (BEST, PAPER):
            low, high = ([edge(point[name]) for point in points] for edge in (min, max))
            panel.fill_between(across, low, high, color=_line(recipe)["color"], alpha=0.15, lw=0)
    last = unit * max(point[against] for run in runs for point in run["curve"])
    there = [
        point[against] for run in runs for point in run["curve"] if abs(point["passes"] / budget - 1) < 0.1
    ]
    shared = float(f"{unit * statistics.median(there or [budget]):.1g}")
    if last > 2 * shared:
        panel.set_xscale("symlog", linthresh=shared, linscale=1.5)
        ticks = [0, shared / 2, *(times * shared for times in (1, 3, 9, 27) if times * shared < 1.1 * last)]
        panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())


def _points(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, list[float]]]:
    """Points of the same number in all seeds, to the last ones."""
    least = min(map(len, curves), default=0)
    curves = [[*curve[: least - 1], curve[-1]] for curve in curves]
    # Before the first step there was no rollout.
    return [
        {name: [math.nan if point[name] is None else point[name] for point in same] for name in same[0]}
        for same in zip(*curves, strict=True)
    ]


def _legend(figure: Any, panel: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    recipes = [name for name in RECIPES if any(run["recipe"] == name for run in runs)]
    lines = [panel.plot([], [], **_line(name))[0] for name in recipes]
    figure.legend(lines, recipes, loc="outside lower center", ncols=4, fontsize=9)


def _line(recipe: str) -> dict[str, Any]:
    """The same colour for a sampler's two likelihoods; thick where the text compares."""
    token = recipe.removesuffix(", commits")
    color = "black" if recipe == BEST else colormaps["tab20"](list(RECIPES).index(token))
    width, order = (3.0, 3) if recipe in (BEST, PAPER) else (1.2, 2)
    return {"color": color, "lw": width, "zorder": order, "ls": "-" if token == recipe else "--"}
