import contextlib

import pytest

from drift.rewards.code_tests import split_tests


class Recorder:
    """What the rewritten tests report to, kept as lists."""

    def __init__(self):
        self.passed, self.failed, self.held = [], [], set()

    def begin(self, num_tests):
        pass

    def open(self, test):
        return test not in self.failed

    def hold(self, test):
        self.held.add(test)

    def fail(self, test):
        self.failed.append(test)

    def settle(self, *tests):
        self.passed += [test for test in tests if test in self.held and test not in self.failed]


def share(tests: str, prefix: str = "", **functions: object) -> float:
    """Runs rewritten tests in this process."""
    code = split_tests([tests], prefix)
    (script,) = code.scripts
    record = Recorder()
    with contextlib.suppress(Exception):  # as the checker does: what was not settled has not passed
        exec(script.source, {"__drift__": record, **{name: functions.get(name) for name in script.names}})
    return code.share(record.passed, record.failed)


def double(x):
    return 2 * x


def test_each_assertion_is_a_test():
    tests = """
def check(candidate):
    assert candidate(1) == 2
    assert (candidate(2)
        == 5)
    y = candidate(3)
    assert y == 6, 'six'
check(f)
"""
    assert share(tests, f=double) == pytest.approx(2 / 3)
    assert share("assert f(1) == 2\nassert f(1) == 3\nassert f(0) == 0\nassert f(2) == 4", f=double) == 0.75


def test_an_assertion_in_a_loop_is_one_test_that_must_always_hold():
    tests = "for i in range(4):\n    assert f(i) == 2 * i\n    assert f(i) != {}"
    assert share(tests.format(4), f=double) == 0.5
    assert share(tests.format(9), f=double) == 1.0
    assert (
        share("for x in f(0) * [1]:\n    assert x == 1\nassert f(1) == 2", f=double) == 0.5
    )  # never reached


def test_an_exception_between_assertions_fails_what_was_not_run_to_its_end():
    tests = """
def check(c):
    assert c(1) == 2
    for i in (1, 0):
        assert c(i) == 2 * i
        1 / i
    assert c(2) == 4
check(f)
"""
    assert share(tests, f=double) == pytest.approx(1 / 3)


def test_helper_functions_and_nested_ones():
    tests = "def same(x, y):\n    assert f(x) == y\nsame(1, 2)\nsame(2, {})\nassert f(3) == 6"
    assert share(tests.format(4), f=double) == 1.0
    assert share(tests.format(5), f=double) == 0.5
    nested = """
def check(c):
    def same(x, y):
        assert c(x) == y
    same(1, 2)
    same(2, {})
check(f)
"""
    assert share(nested.format(4), f=double) == 1.0
    assert share(nested.format(5), f=double) == 0.0


def test_constants_and_comparisons_with_itself_are_no_tests():
    assert share("assert True, 'yes'\nassert f(1) == 3", f=double) == 0.0
    tests = """
def check(c):
    assert c(1) == f(1)
    assert str(c(2)) == str(f(2))
    assert c(1) == 2
    assert c(1) == 3
check(f)
"""
    assert share(tests, f=double) == 0.5
    with pytest.raises(ValueError, match="test 0 has no assertion that an answer could fail"):
        split_tests(["def check(c):\n    assert True\n    c(1)\ncheck(f)"])


def test_branches_count_where_they_are_reached():
    tests = "if f(1) == {}:\n    assert f(2) == 5\nelse:\n    assert f(2) == 4\nassert f(0) == 0"
    assert share(tests.format(2), f=double) == 0.5
    assert share(tests.format(3), f=double) == 1.0
    tests = "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass\nassert f(2) == 4"
    assert share(tests, f=double) == 0.5


def test_which_names_are_the_answers():
    tests = (
        "import math\ndef check(c):\n    k = limit\n    assert c(k) == other(len('a')) + math.pi\ncheck(main)"
    )
    assert split_tests([tests]).scripts[0].names == ("limit", "main", "other")
    prefix = """
Code:
```python
limit = base + 1
base = 3
def other(x):
    return x

def main(x):
    '''Doc.'''

"""
    script = split_tests([tests], prefix).scripts[0]
    assert script.names == ("main",)
    assert "def other" in script.source
    assert "base = 3" in script.source
    assert "Doc" not in script.source
    assert split_tests(["def check(c):\n    assert sum(2, 3) == 5\ncheck(sum)"]).scripts[0].names == ("sum",)


def test_an_answer_with_the_name_of_the_tests():
    tests = "def check(c):\n    assert check(1) == 2\n    assert check(2) == 5\ncheck(check)"
    assert share(tests, check=double) == 0.5


def test_tests_that_draw_are_the_same_every_time():
    tests = "import random\nassert f(random.random()) == 0"
    seen = []
    for _ in range(2):
        share(tests, f=seen.append)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["assert f(1", "assert f(1)"], "test 0 is no Python code"),
        (["assert f(1)", "f(1)"], "test 1 has no assertion"),
        (["import numpy as np\nassert f(1)"], r"the tests import \['numpy'\]"),
    ],
)
def test_unusable_tests_are_refused(sources: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        split_tests(sources)


def test_a_failure_outweighs_what_held_before():
    code = split_tests(["assert f(1)\nassert f(2)"])
    assert code.share([0, 1], []) == 1.0
    assert code.share([0, 1], [0]) == 0.5
    assert code.share([], []) == 0.0


def test_only_true_comparisons_with_itself_are_left_out():
    tests = "def check(c):\n    assert c(1) == {}(1)\n    assert c(2) == 5\ncheck(f)"
    assert len(split_tests([tests.format("f")]).required) == 1
    assert len(split_tests([tests.format("g")]).required) == 2
