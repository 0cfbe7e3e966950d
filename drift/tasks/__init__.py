"""Tasks: from dataset rows to problems, each with the reward that judges it."""

from drift.tasks.base import Task
from drift.tasks.code import CodeTask
from drift.tasks.countdown import CountdownTask
from drift.tasks.math import MathTask
from drift.tasks.procedural import ProceduralTask
from drift.tasks.scoring import ExtraReward, judge, part_names, score
from drift.tasks.sudoku import SudokuTask

__all__ = [
    "CodeTask",
    "CountdownTask",
    "ExtraReward",
    "MathTask",
    "ProceduralTask",
    "SudokuTask",
    "Task",
    "judge",
    "part_names",
    "score",
]
