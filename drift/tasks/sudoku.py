"""Sudoku, 4 x 4 for a quickstart and 9 x 9: exact to judge, endless to draw."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import permutations, product
from random import Random
from typing import Any, Literal, get_args

from drift.contract import ConfigError, Problem
from drift.rewards import SudokuReward
from drift.rewards.sudoku import BLANK, DIGITS, solves
from drift.tasks.grids import blank_cells, draw_grid
from drift.tasks.procedural import ProceduralTask

SudokuSize = Literal[4, 9]

_CELLS = 16
# A 4 x 4 puzzle needs 4 givens to have one solution alone; 9 x 9 ones with fewer than 27 are slow to find.
_MAX_BLANKS = {4: 12, 9: 54}
_BLANKS = {4: (6, 9), 9: (36, 48)}


class SudokuTask(ProceduralTask):
    """Puzzles with one solution: the cells row by row, "." for a blank; the answer is the whole grid.

    Two puzzles which differ only in the names of the digits count as the same one, within a split and across
    splits. Rows may also come from a file with `puzzle` and `solution`, and perhaps `demonstration`.

    Args:
        blanks: fewest and most blank cells of a puzzle, within 1 to 12 (4 x 4) or 1 to 54 (9 x 9); None for
            6 to 9, or 36 to 48.
        seed: key of all draws.
        right_share: share of demonstrations that are the solution, 0 to 1; in the others every blank's digit
            is one too high (the highest becomes 1), so that a policy tuned on them is sure of the form alone.
        size: digits of a row, 4 or 9.
        prompt: the question; {puzzle} becomes the cells in one line, {grid} a line for each row with spaces
            between its cells.

    Raises:
        ConfigError: an argument is out of its range.
    """

    fields = ("puzzle", "solution")

    def __init__(
        self,
        blanks: tuple[int, int] | None = None,
        seed: int = 0,
        right_share: float = 1.0,
        size: SudokuSize = 4,
        prompt: str = "{puzzle}",
    ) -> None:
        super().__init__(seed)
        if size not in get_args(SudokuSize):
            raise ConfigError(f"size={size!r} of SudokuTask is not possible: use 4 or 9")
        low, high = _BLANKS[size] if blanks is None else blanks
        most = _MAX_BLANKS[size]
        if not 1 <= low <= high <= most:
            raise ConfigError(f"blanks={blanks!r} must be (fewest, most), both within 1 to {most}")
        if not 0.0 <= right_share <= 1.0:
            raise ConfigError(f"right_share={right_share!r} must be within 0 to 1")
        if "{puzzle}" not in prompt and "{grid}" not in prompt:
            raise ConfigError(f"prompt={prompt!r} must contain {{puzzle}} or {{grid}}")
        self.blanks = (low, high)
        self.right_share = right_share
        self.size: SudokuSize = size
        self.prompt = prompt
        self.reward = SudokuReward(size=size)

    def problem(self, row: Mapping[str, Any]) -> Problem:
        """The problem of filling a row's puzzle.

        Raises:
            ConfigError: its puzzle is no grid, or its solution does not solve it.
        """
        self.require_fields(row)
        puzzle, solution = row["puzzle"], row["solution"]
        cells, digits = self.size**2, DIGITS[: self.size]
        good = isinstance(puzzle, str) and len(puzzle) == cells and set(puzzle) <= {BLANK, *digits}
        self.require(good, row, "puzzle", f"{cells} cells in one text, {digits} and '{BLANK}'")
        good = isinstance(solution, str) and solves(solution, puzzle, self.size)
        self.require(good, row, "solution", f"the {cells} digits of a grid that solves the puzzle {puzzle!r}")
        demonstration = row.get("demonstration")
        good = demonstration is None or isinstance(demonstration, str)
        self.require(good, row, "demonstration", "a text, or absent")
        lines = [puzzle[i : i + self.size] for i in range(0, cells, self.size)]
        # Not str.format: other braces of a prompt, such as those of LaTeX, are text.
        prompt = self.prompt.replace("{puzzle}", puzzle).replace("{grid}", "\n".join(map(" ".join, lines)))
        return Problem(prompt=prompt, answer=solution, demonstration=demonstration, row=dict(row))

    def generate(self, rng: Random) -> dict[str, Any]:
        """A row whose number of blanks is uniform, then its grid and blanks among those with one solution."""
        num_blanks = rng.randint(*self.blanks)
        draw = _draw_small if self.size == 4 else _draw_large
        puzzle, solution = draw(rng, num_blanks)
        # Drawn always, so that the puzzles do not depend on right_share.
        right = rng.random() < self.right_share
        demonstration = solution if right else _one_too_high(puzzle, solution, self.size)
        return {"puzzle": puzzle, "solution": solution, "demonstration": demonstration}

    def canonical(self, row: dict[str, Any]) -> str:
        """The puzzle with its digits renamed in the order in which they appear."""
        puzzle = row["puzzle"]
        order = dict.fromkeys(puzzle.replace(BLANK, ""))
        return puzzle.translate({ord(digit): name for digit, name in zip(order, DIGITS, strict=False)})


def _draw_large(rng: Random, num_blanks: int) -> tuple[str, str]:
    """A 9 x 9 puzzle and its solution."""
    while True:
        solution = draw_grid(rng)
        puzzle = blank_cells(solution, num_blanks, rng)
        if puzzle is not None:
            return puzzle, solution


def _draw_small(rng: Random, num_blanks: int) -> tuple[str, str]:
    """A 4 x 4 puzzle and its solution."""
    while True:
        solution = rng.choice(_grids())
        blanks = set(rng.sample(range(_CELLS), num_blanks))
        puzzle = "".join(BLANK if cell in blanks else digit for cell, digit in enumerate(solution))
        if _is_unique(puzzle):
            return puzzle, solution


def _one_too_high(puzzle: str, solution: str, size: int) -> str:
    digits = DIGITS[:size]
    shifted = solution.translate(str.maketrans(digits, digits[1:] + digits[0]))
    return "".join(high if given == BLANK else given for given, high in zip(puzzle, shifted, strict=True))


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
        if digit != BLANK:
            left &= table[cell, digit]
    return left.bit_count() == 1
