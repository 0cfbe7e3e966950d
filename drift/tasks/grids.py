"""9 x 9 Sudoku grids: drawing a full one, and blanking cells as long as the solution stays the only one."""

from __future__ import annotations

from random import Random

from drift.rewards.sudoku import BLANK, units

_CELLS = range(81)
_ALL = 0b111111111  # a set of digits is an integer: bit d - 1 stands for the digit d
_UNITS = units(9)
_PEERS = [frozenset(c for unit in _UNITS if cell in unit for c in unit) - {cell} for cell in _CELLS]
_UNITS_OF = [[unit for unit in _UNITS if cell in unit] for cell in _CELLS]


def draw_grid(rng: Random) -> str:
    """A full grid of 81 digits, row by row.

    Args:
        rng: source of every draw.
    """
    grid = _fill([_ALL] * 81, rng)
    assert grid is not None  # every search that starts from the empty grid succeeds
    return "".join(str(digits.bit_length()) for digits in grid)


def blank_cells(grid: str, num_blanks: int, rng: Random) -> str | None:
    """The grid with so many cells blanked that it is still its puzzle's only solution; None: it can't be.

    Cells are tried in random order and each stays blank if the rest determines its digit, so None says that
    this order does not lead so far.

    Args:
        grid: 81 digits.
        num_blanks: how many cells to blank.
        rng: source of every draw.
    """
    given = [1 << (int(digit) - 1) for digit in grid]
    puzzle = list(given)
    order = list(_CELLS)
    rng.shuffle(order)
    num_left = num_blanks
    for tried, cell in enumerate(order):
        if num_left == 0:
            break
        if num_left > len(order) - tried:
            return None
        puzzle[cell] = 0
        if _is_determined(puzzle, cell, given[cell]):
            num_left -= 1
        else:
            puzzle[cell] = given[cell]
    if num_left:
        return None
    return "".join(digit if known else BLANK for digit, known in zip(grid, puzzle, strict=True))


def _is_determined(puzzle: list[int], cell: int, digit: int) -> bool:
    """Whether no other digit can stand in a blank cell; the puzzle had one solution with the digit there."""
    others = _candidates(puzzle, cell) & ~digit
    if not others or any(_only_place(puzzle, unit, cell, digit) for unit in _UNITS_OF[cell]):
        return True
    options = [known or _candidates(puzzle, c) for c, known in enumerate(puzzle)]
    options[cell] = others
    blank = [c for c, known in enumerate(puzzle) if not known]
    return not _propagate(options, [c for c in blank if _is_single(options[c])]) or _fill(options) is None


def _only_place(puzzle: list[int], unit: list[int], cell: int, digit: int) -> bool:
    return not any(c != cell and not puzzle[c] and _candidates(puzzle, c) & digit for c in unit)


def _candidates(puzzle: list[int], cell: int) -> int:
    seen = 0
    for peer in _PEERS[cell]:
        seen |= puzzle[peer]
    return _ALL & ~seen


def _fill(options: list[int], rng: Random | None = None) -> list[int] | None:
    """One way to choose a digit of each cell's options, None where there is none.

    Args:
        options: the digits that each cell may hold.
        rng: chooses at random among a cell's digits; None: in their order.
    """
    cell, fewest = -1, 10
    for c, digits in enumerate(options):
        num = digits.bit_count()
        if 1 < num < fewest:
            cell, fewest = c, num
            if num == 2:
                break
    if cell < 0:
        return options
    digits = [1 << d for d in range(9) if options[cell] >> d & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        trial = list(options)
        trial[cell] = digit
        if _propagate(trial, [cell]):
            found = _fill(trial, rng)
            if found is not None:
                return found
    return None


def _propagate(options: list[int], settled: list[int]) -> bool:
    """Takes digits from the options of peers, and what follows from that; False where a cell has none left.

    Args:
        options: the digits that each cell may hold; changed.
        settled: cells with one option, of which their peers' options don't know yet; used up.
    """
    while settled:
        cell = settled.pop()
        digit = options[cell]
        for peer in _PEERS[cell]:
            if options[peer] & digit:
                options[peer] ^= digit
                if not options[peer]:
                    return False
                if _is_single(options[peer]):
                    settled.append(peer)
    return True


def _is_single(digits: int) -> bool:
    return not digits & (digits - 1)
