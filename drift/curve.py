"""The curve of accuracy against timesteps over training: its points, as numbers and as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drift.storage import temporary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

NAME = "accuracy_timesteps"
_MARKERS = "os^Dv"  # of the sets, in turn


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One validation of one set."""

    dataset: str
    step: int  # optimizer steps before it
    accuracy: float
    low: float  # its 95 % interval
    high: float
    timesteps: float  # mean per answer


def joined(curve: Sequence[CurvePoint], new: Iterable[CurvePoint]) -> list[CurvePoint]:
    """A curve with further points, by set and step; a set has one point a step, the new one."""
    found = {(point.dataset, point.step): point for point in (*curve, *new)}
    order = list(dict.fromkeys(dataset for dataset, _ in found))
    return sorted(found.values(), key=lambda point: (order.index(point.dataset), point.step))


def write_curve(folder: Path, curve: Sequence[CurvePoint]) -> None:
    """Writes `accuracy_timesteps.json` and `.png` into a folder, each whole or not at all.

    Args:
        folder: the run's.
        curve: points by set and step, at least one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(asdict(point))}" for point in curve)
    _write(folder / f"{NAME}.json", lambda path: path.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))
    figure = draw(curve)
    _write(folder / f"{NAME}.png", lambda path: figure.savefig(path, format="png", dpi=120))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    new = temporary(path)
    write(new)
    new.replace(path)


def draw(curve: Sequence[CurvePoint]) -> Figure:
    """The plot: a line for each set, a dot for each validation, coloured by its step.

    Args:
        curve: points by set and step, at least one.
    """
    # For those alone who draw. No pyplot: it keeps every figure, and looks for a screen.
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = [point.step for point in curve]
    colours = ScalarMappable(Normalize(min(steps), max(*steps, min(steps) + 1)), "viridis_r")
    sets = [(name, list(points)) for name, points in groupby(curve, key=lambda point: point.dataset)]
    for number, (name, points) in enumerate(sets):
        _draw_set(axes, name, points, colours, _MARKERS[number % len(_MARKERS)])
    figure.colorbar(colours, ax=axes, label="step", ticks=MaxNLocator(integer=True))
    axes.set(xlabel="timesteps per answer", ylabel="validation accuracy, 95 % interval")
    axes.grid(alpha=0.3)
    if len(sets) > 1:
        axes.legend()
    return figure


def _draw_set(axes: Axes, name: str, points: list[CurvePoint], colours: ScalarMappable, marker: str) -> None:
    xs, ys = [point.timesteps for point in points], [point.accuracy for point in points]
    of_steps: Any = colours.to_rgba(np.array([point.step for point in points]))
    axes.plot(xs, ys, color="0.6", linewidth=1, marker=marker, markersize=5, label=name, zorder=2)
    axes.vlines(xs, [point.low for point in points], [point.high for point in points], of_steps, zorder=1)
    axes.scatter(xs, ys, c=of_steps, marker=marker, edgecolors="0.2", zorder=3)
    # The last one on the other side of its dot than the first: they may lie near each other.
    for point, (x, side) in {points[-1]: (8, "left"), points[0]: (-8, "right")}.items():
        axes.annotate(
            f"step {point.step}",
            (point.timesteps, point.accuracy),
            xytext=(x, 6),
            textcoords="offset points",
            ha=side,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            zorder=4,
        )
