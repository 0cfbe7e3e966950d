from types import MappingProxyType

import pytest

from drift.contract import ConfigError, Problem
from drift.tasks import Task


class _Spelling(Task):
    fields = ("word", "spelling")
    settings = MappingProxyType({"word": "word_field"})

    def problem(self, row):
        return Problem(prompt=row["word"], answer=row["spelling"])


def test_a_whole_row_passes():
    _Spelling().check({"word": "a", "spelling": "", "more": None}, "data.train (row 3)")


def test_a_row_asks_its_prompt_unless_the_task_says_otherwise():
    assert _Spelling().own_text({"word": "a", "spelling": "b"}) == "a"


class _Numbered(_Spelling):
    def problem(self, row):
        self.require(isinstance(row["word"], str), row, "word", "a text")
        self.require(isinstance(row["spelling"], str), row, "spelling", "a text")
        return Problem(prompt=row["word"], answer=str(1 / row["number"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"word": 3},
            "data.train (row 3): field 'word' is 3; it must be a text: correct the data or set "
            "data.task.word_field",
        ),
        (
            {"spelling": ["a" * 200]},
            f"data.train (row 3): field 'spelling' is ['{'a' * 98}...; it must be a text: correct the data",
        ),
        (
            {"number": 0},
            "data.train (row 3): _Numbered cannot use it (ZeroDivisionError: division by zero); "
            "correct the data or the task",
        ),
    ],
)
def test_whatever_a_task_says_of_a_row_is_said_with_its_place(change: dict, message: str):
    row = {"word": "a", "spelling": "b", "number": 2}
    _Numbered().check(row, "data.train (row 3)")
    with pytest.raises(ConfigError) as caught:
        _Numbered().check({**row, **change}, "data.train (row 3)")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"spelling": "a", "question": "b"},
            "data.train (row 3) has no field 'word'; it has ['question', 'spelling']: "
            "set data.task.word_field or correct the data",
        ),
        (
            {"word": "a", "spelling": None},
            "data.train (row 3) has no field 'spelling'; it is null there: correct the data",
        ),
    ],
)
def test_a_missing_field_is_named_with_the_fix(row: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        _Spelling().check(row, "data.train (row 3)")
    assert str(caught.value) == message
