import time

import pytest

from drift.contract import ConfigError
from drift.tasks import SudokuTask
from drift.tasks.sudoku import _grids


def solutions(puzzle: str) -> list[str]:
    """Every way to fill a puzzle, by trying each digit in each blank: slow and plain."""
    cell = puzzle.find(".")
    if cell < 0:
        return [puzzle]
    row, column = divmod(cell, 4)
    seen = {
        puzzle[4 * r + c]
        for r in range(4)
        for c in range(4)
        if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    }
    digits = [digit for digit in "1234" if digit not in seen]
    return [full for digit in digits for full in solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])]


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
    assert set(task.fields) == set(row)
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


@pytest.mark.parametrize("blanks", [(0, 4), (9, 6), (6, 13), (-1, -1)])
def test_impossible_blanks_are_refused(blanks: tuple[int, int]):
    with pytest.raises(ConfigError, match=rf"blanks=\({blanks[0]}, {blanks[1]}\)"):
        SudokuTask(blanks=blanks)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(share: float):
    with pytest.raises(ConfigError, match=f"right_share={share}"):
        SudokuTask(right_share=share)
