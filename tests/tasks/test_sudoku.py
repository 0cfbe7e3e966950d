import time
from math import isqrt

import pytest

from drift.contract import ConfigError
from drift.tasks import SudokuTask
from drift.tasks.sudoku import _grids

GRID = "1234341221434321"
PINNED = ".73..2.....5.3.47.48.9.5.13.6...153432....7.6..73..129....573.1.58.63297.3.2.9.45"


def possible(puzzle: str, cell: int) -> list[str]:
    """The digits that no cell of the same row, column or box holds."""
    size = {16: 4, 81: 9}[len(puzzle)]
    box = isqrt(size)
    row, column = divmod(cell, size)
    seen = {
        puzzle[size * r + c]
        for r in range(size)
        for c in range(size)
        if r == row or c == column or (r // box, c // box) == (row // box, column // box)
    }
    return [digit for digit in "123456789"[:size] if digit not in seen]


def solutions(puzzle: str) -> list[str]:
    """Every way to fill a puzzle, by trying each digit in the blank with the fewest: slow and plain."""
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "."]
    if not blanks:
        return [puzzle]
    cell = min(blanks, key=lambda blank: len(possible(puzzle, blank)))
    tried = [puzzle[:cell] + digit + puzzle[cell + 1 :] for digit in possible(puzzle, cell)]
    return sorted(full for trial in tried for full in solutions(trial))


def test_all_grids_are_known():
    assert sorted(_grids()) == solutions("." * 16)
    assert len(_grids()) == 288


@pytest.mark.parametrize("blanks", [(6, 9), (12, 12), (1, 1)])
def test_puzzles_have_one_solution_and_the_right_number_of_blanks(blanks: tuple[int, int]):
    task = SudokuTask(blanks=blanks)
    rows = [task.row("train", index) for index in range(300)]
    assert all(solutions(row["puzzle"]) == [row["solution"]] for row in rows)
    assert {row["puzzle"].count(".") for row in rows} == set(range(blanks[0], blanks[1] + 1))


def test_the_problem_of_a_row():
    task = SudokuTask()
    row = task.row("validation", 0)
    problem = task.problem(row)
    assert problem.prompt == row["puzzle"]
    assert problem.answer == problem.demonstration == row["solution"]
    assert problem.row == row
    bare = {name: row[name] for name in task.fields}
    assert (task.problem(bare).prompt, task.problem(bare).demonstration) == (row["puzzle"], None)
    assert task.reward([row["solution"], row["puzzle"]], [problem, problem]).tolist() == [1.0, 0.0]


def test_puzzles_that_differ_in_the_names_of_digits_are_one():
    task = SudokuTask()
    assert task.canonical({"puzzle": "3.1.4.3..2......"}) == "1.2.3.1..4......"
    assert task.canonical({"puzzle": "4.2.1.4..3......"}) == "1.2.3.1..4......"
    assert task.canonical({"puzzle": "3.1.4.3...2....."}) != "1.2.3.1..4......"


def test_wrong_demonstrations_are_one_too_high_in_every_blank():
    task = SudokuTask(right_share=0.0)
    next_digit = {"1": "2", "2": "3", "3": "4", "4": "1"}
    for index in range(100):
        row = task.row("train", index)
        cells = zip(row["puzzle"], row["solution"], row["demonstration"], strict=True)
        assert all(shown == (next_digit[right] if given == "." else given) for given, right, shown in cells)
        assert task.reward([row["demonstration"]], [task.problem(row)]).item() == 0.0


def test_right_share_changes_the_demonstrations_alone():
    always, often, again = SudokuTask(), SudokuTask(right_share=0.7), SudokuTask(right_share=0.7)
    rows = [often.row("train", index) for index in range(2000)]
    assert rows == [again.row("train", index) for index in range(2000)]
    assert [row["puzzle"] for row in rows] == [always.row("train", index)["puzzle"] for index in range(2000)]
    # 2000 draws of 0.7: standard deviation sqrt(0.7 * 0.3 / 2000) = 0.0102, five of them allowed.
    assert sum(row["demonstration"] == row["solution"] for row in rows) / 2000 == pytest.approx(0.7, abs=0.05)


def test_puzzles_are_cheap():
    task = SudokuTask()
    task.row("train", 0)
    started = time.process_time()
    for index in range(500):
        task.row("train", index)
    assert (time.process_time() - started) / 500 < 1e-3


@pytest.mark.parametrize("blanks", [(1, 1), (36, 48), (54, 54)])
def test_large_puzzles_have_one_solution_and_the_right_number_of_blanks(blanks: tuple[int, int]):
    task = SudokuTask(blanks=blanks, size=9)
    rows = [task.row("train", index) for index in range(12)]
    assert all(solutions(row["puzzle"]) == [row["solution"]] for row in rows)
    assert all(blanks[0] <= row["puzzle"].count(".") <= blanks[1] for row in rows)
    assert len({row["solution"] for row in rows}) == 12
    problems = [task.problem(row) for row in rows]
    assert task.reward([row["solution"] for row in rows], problems).tolist() == [1.0] * 12
    assert task.reward([row["puzzle"] for row in rows], problems).tolist() == [0.0] * 12


def test_large_puzzles_are_the_same_in_every_version():
    task = SudokuTask(size=9)
    assert task.blanks == (36, 48)
    assert task.row("train", 0)["puzzle"] == PINNED
    wrong = SudokuTask(size=9, right_share=0.0).row("train", 0)
    assert wrong["puzzle"] == PINNED
    next_digit = dict(zip("123456789", "234567891", strict=True))
    cells = zip(PINNED, wrong["solution"], wrong["demonstration"], strict=True)
    assert all(shown == (next_digit[right] if given == "." else given) for given, right, shown in cells)


def test_large_puzzles_are_cheap():
    task = SudokuTask(size=9)
    started = time.process_time()
    for index in range(50):
        task.row("train", index)
    assert (time.process_time() - started) / 50 < 0.02  # measured: 1.5 ms


def test_the_prompt_can_be_words_around_the_puzzle():
    puzzle = SudokuTask().row("train", 0)
    task = SudokuTask(prompt="\\boxed{} of {puzzle}:\n{grid}")
    text = puzzle["puzzle"]
    lines = [" ".join(text[i : i + 4]) for i in range(0, 16, 4)]
    assert task.problem(puzzle).prompt == f"\\boxed{{}} of {text}:\n" + "\n".join(lines)
    with pytest.raises(ConfigError, match=r"prompt='Solve it\.' must contain {puzzle} or {grid}"):
        SudokuTask(prompt="Solve it.")
    with pytest.raises(ConfigError, match="size=16 of SudokuTask"):
        SudokuTask(size=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"puzzle": "1.34341221434321."}, "field 'puzzle' is '1.34341221434321.'; it must be 16 cells"),
        ({"puzzle": "1034341221434321"}, "field 'puzzle' is '1034341221434321'"),
        ({"puzzle": "5.34341221434321"}, "field 'puzzle' is '5.34341221434321'"),
        ({"puzzle": list(GRID)}, r"field 'puzzle' is \['1'"),
        ({"puzzle": None}, "has no field 'puzzle'; it is null there"),
        ({"solution": "2143341221434321"}, "field 'solution' is '2143341221434321'; .* solves the puzzle"),
        ({"solution": "1234123412341234"}, "field 'solution' is '1234123412341234'"),
        ({"solution": GRID[:15]}, "field 'solution' is"),
        ({"solution": 1234341221434321}, "field 'solution' is 1234341221434321"),
        ({"demonstration": 3}, "field 'demonstration' is 3; it must be a text"),
    ],
)
def test_bad_rows_are_refused(change: dict, message: str):
    row = {"puzzle": "1.34341221434321", "solution": GRID}
    SudokuTask().check(row, "row 7")
    with pytest.raises(ConfigError, match=f"^row 7(: | ){message}"):
        SudokuTask().check({**row, **change}, "row 7")


@pytest.mark.parametrize("blanks", [(0, 4), (9, 6), (6, 13), (-1, -1)])
def test_impossible_blanks_are_refused(blanks: tuple[int, int]):
    with pytest.raises(ConfigError, match=rf"blanks=\({blanks[0]}, {blanks[1]}\)"):
        SudokuTask(blanks=blanks)
    with pytest.raises(ConfigError, match="within 1 to 54"):
        SudokuTask(blanks=(40, 55), size=9)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(share: float):
    with pytest.raises(ConfigError, match=f"right_share={share}"):
        SudokuTask(right_share=share)
