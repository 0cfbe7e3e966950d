"""Reward of a filled Sudoku grid, judged by the rules of the game."""

from __future__ import annotations

from functools import cache
from math import isqrt

from drift.contract import ConfigError, Problem
from drift.rewards.base import PerSampleReward

BLANK = "."
DIGITS = "123456789"


class SudokuReward(PerSampleReward):
    """1.0 for a grid that obeys every rule and keeps every given of `problem.row["puzzle"]`, else 0.0.

    The completion is the whole grid, row by row; whitespace is ignored and nothing else may stand beside the
    digits. Any valid grid counts: it is not compared with a stored solution.

    Args:
        size: digits of a row, a square number: 4 or 9.

    Raises:
        ConfigError: the size is no such number.
    """

    def __init__(self, size: int = 4) -> None:
        if size not in (4, 9):
            raise ConfigError(f"size={size!r} of SudokuReward is not possible: use 4 or 9")
        self.size = size

    def score(self, completion: str, problem: Problem) -> float:
        """1.0 or 0.0.

        Raises:
            ConfigError: the puzzle itself does not have size * size cells.
        """
        puzzle = problem.row["puzzle"]
        if len(puzzle) != self.size**2:
            raise ConfigError(
                f"puzzle {puzzle!r} has {len(puzzle)} cells, size={self.size} of SudokuReward needs "
                f"{self.size**2}: correct the data or the size"
            )
        return float(solves("".join(completion.split()), puzzle, self.size))


def solves(grid: str, puzzle: str, size: int) -> bool:
    """Whether a grid obeys every rule and keeps every given of a puzzle.

    Args:
        grid: what may be a solution, row by row.
        puzzle: size * size cells, row by row: digits, and BLANK.
        size: digits of a row, 4 or 9.
    """
    if len(grid) != len(puzzle):
        return False
    keeps_givens = all(given in (BLANK, digit) for given, digit in zip(puzzle, grid, strict=True))
    digits = set(DIGITS[:size])
    # A unit has as many cells as there are digits, so "holds every digit" is "holds every digit once".
    return keeps_givens and all({grid[cell] for cell in unit} == digits for unit in units(size))


@cache
def units(size: int) -> list[list[int]]:
    """The cells of each row, column and box, by number.

    Args:
        size: digits of a row, a square number.
    """
    box = isqrt(size)
    rows = [[row * size + column for column in range(size)] for row in range(size)]
    columns = [[row * size + column for row in range(size)] for column in range(size)]
    corners = [(row, column) for row in range(0, size, box) for column in range(0, size, box)]
    boxes = [[(r + i) * size + c + j for i in range(box) for j in range(box)] for r, c in corners]
    return rows + columns + boxes
