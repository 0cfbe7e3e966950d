"""Rewards: small classes that judge completions."""

from drift.rewards.base import PerSampleReward, Reward
from drift.rewards.code import CodeReward, extract_code
from drift.rewards.countdown import CountdownReward
from drift.rewards.format import FormatReward
from drift.rewards.length import LengthReward
from drift.rewards.math import MathReward, extract_boxed
from drift.rewards.reasoning_gym import ReasoningGymReward
from drift.rewards.sudoku import SudokuReward

__all__ = [
    "CodeReward",
    "CountdownReward",
    "FormatReward",
    "LengthReward",
    "MathReward",
    "PerSampleReward",
    "ReasoningGymReward",
    "Reward",
    "SudokuReward",
    "extract_boxed",
    "extract_code",
]
