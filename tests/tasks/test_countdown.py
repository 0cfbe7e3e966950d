import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from drift.contract import ConfigError
from drift.tasks import CountdownTask

ROW = {"numbers": [3, 4, 5], "target": 35, "solution": "(3+4)*5"}


@pytest.mark.parametrize("num_numbers", [2, 3, 4, 6])
def test_rows_hold_a_solution_with_every_number(num_numbers: int):
    task = CountdownTask(num_numbers=num_numbers)
    for index in range(300):
        row = task.row("train", index)
        numbers, target, solution = row["numbers"], row["target"], row["solution"]
        assert len(numbers) == num_numbers
        assert all(1 <= number <= 20 for number in numbers)
        assert 1 <= target <= 100
        assert target not in numbers
        assert Counter(map(int, re.findall(r"\d+", solution))) == Counter(numbers)
        exact = re.sub(r"\d+", lambda digits: f"Fraction({digits[0]})", solution)
        assert eval(exact, {"Fraction": Fraction}) == target
        assert task.reward([solution], [task.problem(row)]).item() == 1.0


def test_every_operation_occurs():
    task = CountdownTask()
    text = "".join(task.row("train", index)["solution"] for index in range(300))
    assert set("+-*/()") <= set(text)


def test_wrong_demonstrations_swap_the_operations():
    task = CountdownTask(right_share=0.0)
    problem = task.problem({**ROW, "demonstration": "(3-4)/5"})
    assert (problem.answer, problem.demonstration) == ("(3+4)*5", "(3-4)/5")
    problems = [task.problem(task.row("train", index)) for index in range(300)]
    swapped = {"+": "-", "-": "+", "*": "/", "/": "*"}
    for problem in problems:
        assert "".join(swapped.get(c, c) for c in problem.answer) == problem.demonstration
    # Some make the target all the same, as 6 * 1 and 6 / 1 do.
    assert task.reward([problem.demonstration for problem in problems], problems).mean() < 0.05
    assert task.reward([problem.answer for problem in problems], problems).min() == 1.0


def test_right_share_changes_the_demonstrations_alone():
    always, often, again = (CountdownTask(right_share=share) for share in (1.0, 0.7, 0.7))
    num_right = 0
    for index in range(400):
        row = often.row("train", index)
        assert row == again.row("train", index)
        demonstration = row.pop("demonstration", row["solution"])
        assert row == always.row("train", index)
        num_right += demonstration == row["solution"]
    assert num_right / 400 == pytest.approx(0.7, abs=0.06)


def test_the_problem_of_a_row():
    problem = CountdownTask().problem(ROW)
    assert problem.prompt == (
        "Use each of the numbers 3, 4, 5 at most once with + - * / to make 35. Write the expression only."
    )
    assert problem.answer == problem.demonstration == "(3+4)*5"
    assert problem.row == ROW
    short = CountdownTask(prompt="\\boxed{}: {numbers} -> {target}")
    assert short.problem(ROW).prompt == "\\boxed{}: 3, 4, 5 -> 35"


def test_the_order_of_the_numbers_is_no_other_puzzle():
    task = CountdownTask()
    one, other = {"numbers": [3, 10, 5], "target": 7}, {"numbers": [10, 5, 3], "target": 7}
    assert task.canonical(one) == task.canonical(other)
    assert task.canonical(one) != task.canonical({"numbers": [3, 10, 5], "target": 8})
    assert task.canonical(one) != task.canonical({"numbers": [3, 1, 5], "target": 7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": []}, r"field 'numbers' is \[\]; it must be a list of integers greater than 0"),
        ({"numbers": [3, 0, 5]}, r"field 'numbers' is \[3, 0, 5\]"),
        ({"numbers": [3, 4.0, 5]}, r"field 'numbers' is \[3, 4.0, 5\]"),
        ({"numbers": [True, 4, 5]}, "field 'numbers' is"),
        ({"numbers": "3, 4, 5"}, "field 'numbers' is '3, 4, 5'"),
        ({"target": "35"}, "field 'target' is '35'; it must be an integer greater than 0"),
        ({"target": -35}, "field 'target' is -35"),
        ({"target": None}, "has no field 'target'; it is null there"),
        (
            {"solution": "3+4*5"},
            r"field 'solution' is '3\+4\*5'; it must be an expression of \[3, 4, 5\] that makes 35",
        ),
        ({"solution": "35"}, "field 'solution' is '35'"),
        ({"solution": "(3+4)*5 = 35"}, "field 'solution' is"),
        ({"solution": 35}, "field 'solution' is 35"),
        ({"demonstration": 35}, "field 'demonstration' is 35; it must be a text, or absent"),
    ],
)
def test_bad_rows_are_refused(change: dict, message: str):
    CountdownTask().check(ROW, "row 7")
    CountdownTask().check({**ROW, "solution": None}, "row 7")
    with pytest.raises(ConfigError, match=f"^row 7(: | ){message}"):
        CountdownTask().check({**ROW, **change}, "row 7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_numbers": 1}, "num_numbers=1 "),
        ({"num_numbers": 7}, "num_numbers=7 "),
        ({"max_number": 1}, "max_number=1 "),
        ({"max_target": 0}, "max_target=0 "),
        ({"right_share": -0.1}, "right_share=-0.1 must be within 0 to 1"),
        ({"right_share": 1.1}, "right_share=1.1 must be within 0 to 1"),
        ({"prompt": "make {target}"}, "must contain {numbers}"),
        ({"prompt": "use {numbers}"}, "must contain {numbers} and {target}"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        CountdownTask(**settings)


def test_a_target_that_is_never_met_is_an_error():
    # Two numbers of 1 or 2 reach 1 only as 1 * 1, 1 / 1, 2 / 2 or 2 - 1: 2 / 2 alone lacks a 1.
    task = CountdownTask(num_numbers=2, max_number=2, max_target=1)
    assert task.generate(Random(0)) == {"numbers": [2, 2], "target": 1, "solution": "2/2"}
    task.max_target = 0
    with pytest.raises(ConfigError, match="max_target=0 is hardly ever met"):
        task.generate(Random(0))
