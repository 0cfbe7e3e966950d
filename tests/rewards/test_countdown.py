import pytest

from drift.contract import Problem
from drift.rewards import CountdownReward


def judge(completion: str, numbers: tuple[int, ...] = (3, 4, 5), target: int = 35) -> float:
    problem = Problem(prompt="", answer="", row={"numbers": list(numbers), "target": target})
    return CountdownReward()([completion], [problem]).item()


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("(3+4)*5", (3, 4, 5), 35),
        (" ( 3 + 4 ) * 5 ", (3, 4, 5), 35),
        ("5*(4+3)", (3, 4, 5), 35),
        ("3+4", (3, 4, 5), 7),  # not every number need be used
        ("(1+1/2)*2*5", (1, 1, 2, 2, 5), 15),
        ("8/(3-8/3)", (3, 3, 8, 8), 24),  # 8 / (1/3): exact only with fractions
        ("1/3*3", (1, 3, 3), 1),
        ("2-3+5", (2, 3, 5), 4),  # a negative intermediate result needs no sign
        ("7", (7, 2), 7),  # the target is one of the numbers
        ("(3+4)*5 = 35", (3, 4, 5), 35),
        ("(3+4)*5=35", (3, 4, 5), 35),
        ("First 3+4 = 7.\nThen:\n(3+4)*5\n\n", (3, 4, 5), 35),
    ],
)
def test_right_expressions(expression: str, numbers: tuple[int, ...], target: int):
    assert judge(expression, numbers, target) == 1.0


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("35", (3, 4, 5), 35),  # the bare target
        ("35 = 35", (3, 4, 5), 35),
        ("3+4*5", (3, 4, 5), 35),  # 23
        ("5*5+5+5", (3, 4, 5), 35),  # 5 used four times
        ("5*7", (3, 4, 5), 35),  # 7 was not given
        ("3*4*5-25", (3, 4, 5), 35),
        ("(3+4)*5 = 36", (3, 4, 5), 35),
        ("(3+4)*5 =", (3, 4, 5), 35),
        ("35 = (3+4)*5", (3, 4, 5), 35),
        ("(3+4)*5 = 35 = 35", (3, 4, 5), 35),
        ("(3+4)*5 == 35", (3, 4, 5), 35),
        ("(3+4)*5\nor so", (3, 4, 5), 35),
        ("-3+4", (3, 4, 5), 1),
        ("4--3", (3, 4, 5), 7),
        ("+3+4", (3, 4, 5), 7),
        ("5/0", (0, 5), 5),
        ("5/(3-3)", (3, 3, 5), 5),
        ("2**3", (2, 3), 8),
        ("7//2", (2, 7), 3),
        ("7%4", (4, 7), 3),
        ("2^3", (2, 3), 1),
        ("2<<3", (2, 3), 16),
        ("34+5", (3, 4, 5), 39),  # digits of two numbers run together
        ("3 4+5", (3, 4, 5), 12),
        ("3,4", (3, 4), 3),
        ("(3,4)", (3, 4), 3),
        ("3(4)", (3, 4), 12),
        ("3.0+4", (0, 3, 4), 7),
        ("3e0+4", (0, 3, 4), 7),
        ("0x3+4", (0, 3, 4), 7),
        ("1_0+5", (1, 0, 5, 10), 15),
        ("03+4", (3, 4), 7),
        ("3+4 # 35", (3, 4), 7),
        ("\uff13+\uff14", (3, 4), 7),  # full-width digits, which int() would read
        ("\u0663+4", (3, 4), 7),  # an Arabic-Indic three
        ("3\u00d74", (3, 4), 12),
        ("3+4\x00", (3, 4), 7),
        ("x+4", (3, 4), 7),
        ("__import__('os').getpid()", (3, 4), 7),
        ("()", (3, 4), 7),
        ("(3+4", (3, 4), 7),
        ("3+", (3, 4), 7),
        ("`3+4`", (3, 4), 7),
        ("<answer>3+4</answer>", (3, 4), 7),
        ("", (3, 4), 7),
        ("\n \n", (3, 4), 7),
        ("=", (3, 4), 7),
        ("\ud800", (3, 4), 7),
        ("(" * 100 + "3+4" + ")" * 90, (3, 4), 7),
        ("(" * 1_000_000, (3, 4), 7),
        ("9" * 1_000_000, (3, 4), 7),
        ("9**9**9**9", (9, 9, 9, 9), 9),
    ],
)
def test_everything_else_is_wrong_and_nothing_raises(expression: str, numbers: tuple[int, ...], target: int):
    assert judge(expression, numbers, target) == 0.0


def test_a_number_may_be_used_as_often_as_it_is_given():
    assert judge("4+4", (4, 4), 8) == 1.0
    assert judge("4+4", (4, 5), 8) == 0.0


def test_deep_nesting_is_no_danger():
    # 96 parentheses on each side and "3+4" make 195 characters, within the limit.
    assert judge("(" * 96 + "3+4" + ")" * 96, (3, 4), 7) == 1.0


def test_the_length_limit_counts_the_last_line_only():
    assert judge("3" * 10_000 + "\n3+4", (3, 4), 7) == 1.0
    assert judge("3" + " " * 100 + "+4", (3, 4), 7) == 1.0
    assert judge("3" + " " * 198 + "+4", (3, 4), 7) == 0.0
