import json
from pathlib import Path
from typing import Any

import pytest

from drift.contract import ConfigError
from drift.rewards import CodeReward
from drift.tasks import CodeTask

PREFIX = "Here it is:\n```python\ndef double(x):\n"
FUNCTION = {
    "question": "Double x.\n",
    "test_method": "function",
    "test_time_limit": 1,
    "test_list": ["def check(candidate):\n    assert candidate(1) == 2\n\ncheck(double)"],
    "prefix": PREFIX,
}
STDIO = {
    "question": "Print the number.",
    "test_method": "stdio",
    "test_time_limit": 0.5,
    "test_input": ["1\n"],
    "test_output": ["1\n"],
}


@pytest.fixture
def task() -> CodeTask:
    return CodeTask(reward=CodeReward(sandbox="rlimits"))


def test_the_problem_of_a_function():
    task = CodeTask("Write a block.", "Write a program.", reward=CodeReward(sandbox="rlimits"))
    problem = task.problem(FUNCTION)
    assert problem.prompt == "Double x.\nWrite a block."
    assert task.own_text(FUNCTION) == "Double x.\n"
    assert problem.answer_prefix == PREFIX
    assert problem.answer == FUNCTION["test_list"][0]
    assert problem.row == FUNCTION
    bare = {name: value for name, value in FUNCTION.items() if name != "prefix"}
    assert task.problem(bare).answer_prefix == ""
    assert task.problem({**FUNCTION, "prefix": None}).answer_prefix == ""


def test_the_problem_of_a_program(task: CodeTask):
    problem = task.problem({**STDIO, "prefix": "x"})
    assert problem.prompt.startswith("Print the number.\nWrite a Python program")
    assert "```python" in problem.prompt
    assert (problem.answer, problem.answer_prefix) == ("1\n", "")


def test_prefix_and_instruction_can_be_left_out():
    task = CodeTask(function_instruction="", use_prefix=False, reward=CodeReward(sandbox="rlimits"))
    problem = task.problem(FUNCTION)
    assert (problem.prompt, problem.answer_prefix) == ("Double x.", "")


def test_problems_are_judged(task: CodeTask):
    function, program = task.problem(FUNCTION), task.problem(STDIO)
    answers = [
        PREFIX + "    return 2 * x\n```",
        PREFIX + "    return x\n```",
        "```python\nprint(input())\n```",
    ]
    assert task.reward(answers, [function, function, program]).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "field 'question' is ' '; it must be a text"),
        ({"test_method": "unit"}, "field 'test_method' is 'unit'; it must be 'function' or 'stdio'"),
        ({"test_method": ["stdio"]}, "field 'test_method' is"),
        ({"test_time_limit": 0}, "field 'test_time_limit' is 0"),
        ({"test_time_limit": True}, "field 'test_time_limit' is True"),
        ({"test_time_limit": float("inf")}, "field 'test_time_limit' is inf"),
        ({"test_time_limit": None}, "no field 'test_time_limit'"),
        ({"test_list": None}, "field 'test_list' is None"),
        ({"test_list": []}, r"field 'test_list' is \[\]"),
        ({"test_list": "assert f(1)"}, "field 'test_list' is 'assert"),
        ({"test_list": [3]}, r"field 'test_list' is \[3\]"),
        ({"test_list": ["assert f("]}, "field 'test_list' cannot be used: test 0 is no Python code"),
        ({"test_list": ["f(1)"]}, "field 'test_list' cannot be used: test 0 has no assertion"),
        ({"prefix": 3}, "field 'prefix' is 3; it must be a text, or absent"),
    ],
)
def test_bad_functions_are_refused(task: CodeTask, change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=r"data.train \(row 7\)(: | has )" + message):
        task.check({**FUNCTION, **change}, "data.train (row 7)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_input": None}, "field 'test_input' is None"),
        ({"test_input": [1]}, r"field 'test_input' is \[1\]"),
        ({"test_input": ["\ud800"]}, "field 'test_input' is .*ud800"),  # no program could read that
        ({"test_output": []}, r"field 'test_output' is \[\]"),
        ({"test_output": ["1", "2"]}, "field 'test_output' is .* as long as test_input, which has 1"),
    ],
)
def test_bad_programs_are_refused(task: CodeTask, change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=r"row 7: " + message):
        task.check({**STDIO, **change}, "row 7")


@pytest.mark.parametrize(("name", "count"), [("MBPP", 498), ("MBPP_train", 472), ("HumanEval", 164)])
def test_benchmark_files_suit_the_task(task: CodeTask, shared: Path, name: str, count: int):
    rows = json.loads((shared / "data" / f"{name}.json").read_text())
    assert len(rows) == count
    for number, row in enumerate(rows):
        problem = task.problem(row)
        assert problem.answer_prefix == row["prefix"], number
