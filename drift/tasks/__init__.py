"""Tasks: from dataset rows to problems, each with the reward that judges it."""

from drift.tasks.base import Task
from drift.tasks.code import CodeTask
from drift.tasks.code_benchmarks import HumanEvalTask, MbppTask
from drift.tasks.countdown import CountdownTask
from drift.tasks.limit import require_limit, reward_limit
from drift.tasks.math import BoxedMathTask, Gsm8kTask, MathTask
from drift.tasks.procedural import ProceduralTask
from drift.tasks.reasoning_gym import ReasoningGymTask
from drift.tasks.scoring import ExtraReward, judge, part_names, score
from drift.tasks.sudoku import SudokuTask

__all__ = [
    "BoxedMathTask",
    "CodeTask",
    "CountdownTask",
    "ExtraReward",
    "Gsm8kTask",
    "HumanEvalTask",
    "MathTask",
    "MbppTask",
    "ProceduralTask",
    "ReasoningGymTask",
    "SudokuTask",
    "Task",
    "judge",
    "part_names",
    "require_limit",
    "reward_limit",
    "score",
]
