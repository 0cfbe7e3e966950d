import warnings
from random import Random

import pytest

from drift.contract import ConfigError, Problem
from drift.tasks import CountdownTask, ProceduralTask, SudokuTask


class _Numbers(ProceduralTask):
    """Puzzles are the numbers below 60; the noise makes no other puzzle."""

    def generate(self, rng: Random) -> dict:
        return {"number": rng.randrange(60), "noise": rng.random()}

    def canonical(self, row: dict) -> str:
        return str(row["number"])

    def problem(self, row) -> Problem:
        return Problem(prompt=str(row["number"]), answer="")


def test_a_row_depends_on_seed_split_and_index_alone():
    task = _Numbers(seed=1)
    rows = [task.row("train", index) for index in range(20)]
    assert [_Numbers(seed=1).row("train", index) for index in reversed(range(20))] == rows[::-1]
    assert len({row["noise"] for row in rows}) == 20
    assert _Numbers(seed=2).row("train", 0) != rows[0]


def test_rows_are_the_same_in_every_version():
    # Written down once: a change here would give another dataset to everybody who resumes.
    assert SudokuTask().row("train", 0)["puzzle"] == "......41.21.1423"
    assert SudokuTask(seed=3).row("test", 7)["puzzle"] == "2..13.2413..4.13"


def test_splits_share_the_whole_space_without_overlap():
    task = _Numbers()
    puzzles = {split: {task.row(split, index)["number"] for index in range(1000)} for split in task.splits}
    assert sorted(number for split in puzzles.values() for number in split) == list(range(60))
    assert len(puzzles["train"]) > 40


@pytest.mark.parametrize(
    ("kind", "settings", "num"),
    [
        (SudokuTask, {}, 1000),
        (SudokuTask, {"blanks": (12, 12)}, 100),
        (SudokuTask, {"size": 9}, 20),
        (CountdownTask, {}, 1000),
        (CountdownTask, {"num_numbers": 2}, 1000),
    ],
)
def test_no_puzzle_is_in_two_splits_whatever_the_seed(kind: type[ProceduralTask], settings: dict, num: int):
    tasks = [kind(seed=0, **settings), kind(seed=1, **settings)]
    puzzles = {
        split: {task.canonical(task.row(split, index)) for task in tasks for index in range(num)}
        for split in ("train", "validation", "test")
    }
    assert all(puzzles.values())
    assert not puzzles["train"] & puzzles["validation"]
    assert not puzzles["train"] & puzzles["test"]
    assert not puzzles["validation"] & puzzles["test"]


def test_rows_of_a_finite_split_are_distinct_and_nested():
    task = CountdownTask(num_numbers=2)
    # 2 numbers up to 20 leave few puzzles: drawn one by one, 50 would repeat some.
    drawn = [task.canonical(task.row("test", index)) for index in range(50)]
    assert len(set(drawn)) < 50
    rows = task.rows("test", 46)
    assert len({task.canonical(row) for row in rows}) == 46
    assert task.rows("test", 20) == rows[:20]
    assert task.rows("test", 20) == CountdownTask(num_numbers=2).rows("test", 20)


def test_a_space_that_is_too_small_is_an_error():
    task = _Numbers()
    num_test = len({task.row("test", index)["number"] for index in range(1000)})
    assert len(task.rows("test", num_test)) == num_test
    with pytest.raises(
        ConfigError, match=f"_Numbers: {num_test + 1} different test puzzles.*{num_test} were found"
    ):
        task.rows("test", num_test + 1)


def test_a_split_without_puzzles_is_an_error():
    class _One(_Numbers):
        def generate(self, rng: Random) -> dict:
            return {"number": 0}

    empty = [split for split in _One.splits if split != _One()._split_of({"number": 0})]
    assert len(empty) == 2
    for split in empty:
        with pytest.raises(ConfigError, match=f"no {split} puzzle was found"):
            _One().row(split, 0)


def test_impossible_requests_are_refused():
    with pytest.raises(ConfigError, match="split='dev'"):
        _Numbers().row("dev", 0)
    with pytest.raises(ConfigError, match="test rows is 0"):
        _Numbers().rows("test", 0)


def test_held_out_puzzles_are_not_made_for_training():
    task = _Numbers()
    train = [task.row("train", index)["number"] for index in range(40)]
    test = [task.row("test", index) for index in range(5)]
    task.hold_out([{"number": train[0]}, *test])
    after = [task.row("train", index)["number"] for index in range(40)]
    assert train[0] not in after
    assert all(old == new for old, new in zip(train, after, strict=True) if old != train[0])
    assert [task.row("test", index) for index in range(5)] == test


def test_puzzles_are_compared_by_their_canonical_form():
    row = CountdownTask().row("test", 0)
    assert CountdownTask().own_text(row | {"numbers": row["numbers"][::-1]}) == CountdownTask().canonical(row)


def test_a_set_that_uses_up_rare_puzzles_is_warned_of():
    hard = SudokuTask(blanks=(8, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hard.rows("test", 256)
    with pytest.warns(UserWarning, match=r"SudokuTask: 2048 different test puzzles took \d+ draws: .*rarer"):
        rows = hard.rows("test", 2048)
    # A fifth of the draws has 12 blanks, of which the split has not so many.
    assert sum(row["puzzle"].count(".") == 12 for row in rows) < 0.1 * len(rows)
