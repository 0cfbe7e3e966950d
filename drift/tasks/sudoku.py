"""4 x 4 Sudoku: small enough for a quickstart, exact to judge."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import permutations, product
from random import Random
from typing import Any

from drift.contract import ConfigError, Problem
from drift.rewards import SudokuReward
from drift.tasks.procedural import ProceduralTask

_CELLS = 16
_MAX_BLANKS = 12  # no 4 x 4 puzzle with fewer than 4 givens has a unique solution
_NEXT_DIGIT = str.maketrans("1234", "2341")


class SudokuTask(ProceduralTask):
    """4 x 4 puzzles with one solution: 16 characters row by row, "." for a blank; the answer is the grid.

    Two puzzles which differ only in the names of the digits count as the same one, within a split and across
    splits.

    Args:
        blanks: fewest and most blank cells of a puzzle, within 1 to 12.
        seed: key of all draws.
        right_share: share of demonstrations that are the solution, 0 to 1; in the others every blank's digit
            is one too high (4 becomes 1), so that a policy tuned on them is sure of the form alone.

    Raises:
        ConfigError: an argument is out of its range.
    """

    fields = ("puzzle", "solution", "demonstration")

    def __init__(self, blanks: tuple[int, int] = (6, 9), seed: int = 0, right_share: float = 1.0) -> None:
        super().__init__(seed)
        low, high = blanks
        if not 1 <= low <= high <= _MAX_BLANKS:
            raise ConfigError(f"blanks={blanks!r} must be (fewest, most), both within 1 to {_MAX_BLANKS}")
        if not 0.0 <= right_share <= 1.0:
            raise ConfigError(f"right_share={right_share!r} must be within 0 to 1")
        self.blanks = (low, high)
        self.right_share = right_share
        self.reward = SudokuReward(size=4)

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of filling a row's puzzle."""
        return Problem(
            prompt=row["puzzle"], answer=row["solution"], demonstration=row["demonstration"], row=dict(row)
        )

    def generate(self, rng: Random) -> dict[str, Any]:
        """A row whose number of blanks is uniform, then its grid and blanks among those with one solution."""
        num_blanks = rng.randint(*self.blanks)
        while True:
            solution = rng.choice(_grids())
            blanks = set(rng.sample(range(_CELLS), num_blanks))
            puzzle = "".join("." if cell in blanks else digit for cell, digit in enumerate(solution))
            if _is_unique(puzzle):
                break
        # Drawn always, so that the puzzles do not depend on right_share.
        demonstration = solution if rng.random() < self.right_share else _one_too_high(puzzle, solution)
        return {"puzzle": puzzle, "solution": solution, "demonstration": demonstration}

    def canonical(self, row: dict[str, Any]) -> str:
        """The puzzle with its digits renamed in the order in which they appear."""
        puzzle = row["puzzle"]
        order = dict.fromkeys(puzzle.replace(".", ""))
        return puzzle.translate({ord(digit): name for digit, name in zip(order, "1234", strict=False)})


def _one_too_high(puzzle: str, solution: str) -> str:
    shifted = solution.translate(_NEXT_DIGIT)
    return "".join(high if given == "." else given for given, high in zip(puzzle, shifted, strict=True))


@cache
def _grids() -> tuple[str, ...]:
    """All 288 valid grids."""
    rows = ["".join(row) for row in permutations("1234")]
    # Rows 1 and 2 (and 3 and 4) make valid boxes if and only if their left halves share no digit.
    bands = [(a, b) for a, b in product(rows, rows) if not set(a[:2]) & set(b[:2])]
    pairs = product(bands, bands)
    return tuple("".join(upper + lower) for upper, lower in pairs if _columns_differ(*upper, *lower))


def _columns_differ(*rows: str) -> bool:
    return all(len(set(column)) == 4 for column in zip(*rows, strict=True))


@cache
def _grids_with() -> dict[tuple[int, str], int]:
    """For each (cell, digit), the grids that hold the digit there, as bits of an integer."""
    table = dict.fromkeys(product(range(_CELLS), "1234"), 0)
    for number, grid in enumerate(_grids()):
        for cell, digit in enumerate(grid):
            table[cell, digit] |= 1 << number
    return table


def _is_unique(puzzle: str) -> bool:
    table, left = _grids_with(), -1
    for cell, digit in enumerate(puzzle):
        if digit != ".":
            left &= table[cell, digit]
    return left.bit_count() == 1
