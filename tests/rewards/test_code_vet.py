import re
import time
from typing import Any

import pytest

from drift.contract import Problem
from drift.rewards import CodeReward

PREFIX = 'Here it is:\n```python\ndef f(x):\n    """One more."""\n'
GOOD = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n\ncheck(f)"


def problem(*tests: str, **columns: Any) -> Problem:
    row = {"test_method": "function", "test_time_limit": 1.0, "test_list": list(tests), **columns}
    return Problem(prompt="", answer="", row=row)


@pytest.fixture
def reward(bwrap: None) -> CodeReward:
    return CodeReward(timeout_seconds=0.5)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (GOOD + "\nwhile True: pass", r"does not end within 0\.5 s"),
        ("import time\ntime.sleep(60)\n" + GOOD, "does not end"),
        ("while True:\n    try: f(1)\n    except: pass\nassert f(1) == 2", "does not end"),
        ("x = 9 ** 9 ** 9\nassert f(1) == x", "does not end"),
        ("x = 1 / 0\n" + GOOD, "raises ZeroDivisionError: division by zero"),
        ("raise SystemExit\n" + GOOD, "raises SystemExit"),
        ("import collections.there_is_no_such_module\n" + GOOD, "raises ModuleNotFoundError"),
        ("x = 1\nassert x == 2\nassert f(x) == 2", "assertion 0 is false whatever"),
    ],
)
def test_tests_that_no_answer_can_pass_are_named(reward: CodeReward, tests: str, reason: str):
    start = time.monotonic()
    ((number, found),) = reward.vet([problem(GOOD), problem(tests), problem(GOOD)])
    assert number == 1
    assert found.startswith("field 'test_list' cannot be used: ")
    assert re.search(reason, found)
    assert time.monotonic() - start < 5


def test_good_tests_are_not_named(reward: CodeReward):
    fair = [
        GOOD,
        "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass\nassert f(1) == 2",
        "for i in range(3):\n    assert f(i) == i + 1",
        "x = f(1)\nassert x == 2",  # nothing of it is reached by an answer that fails
        "n = 0\nwhile f(n) < 9: n += 1\nassert n == 8",  # ends with an answer that is right, or fails
    ]
    programs = {"test_method": "stdio", "test_input": [""], "test_output": [""]}
    problems = [problem(tests) for tests in fair]
    assert list(reward.vet([Problem(prompt="", answer="", row=programs), *problems])) == []
    assert list(reward.vet([])) == []


def test_several_are_named_by_their_numbers(reward: CodeReward):
    endless = problem("assert f(1) == 1\nwhile True: pass")
    problems = [endless, problem(GOOD), problem("x = 1 / 0\n" + GOOD), endless]
    assert [number for number, _ in reward.vet(problems)] == [0, 2, 3]


def test_solutions_of_the_rows_are_run_on_demand(bwrap: None):
    body, whole = "    return x + 1\n", "def f(x):\n    return x + 1\n"
    problems = [
        problem(GOOD, prefix=PREFIX, canonical_solution=body),
        problem(GOOD, canonical_solution=whole),
        problem(GOOD, prefix=PREFIX, canonical_solution="    return 2\n"),
        problem(GOOD, canonical_solution=None),
    ]
    assert list(CodeReward().vet(problems)) == []
    assert list(CodeReward(solution_field="canonical_solution").vet(problems)) == [
        (2, "field 'canonical_solution': this solution passes only 0.50 of its tests"),
        (3, "solution_field='canonical_solution' of CodeReward: the row has no such text"),
    ]
