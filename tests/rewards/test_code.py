import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drift.contract import ConfigError, Problem
from drift.rewards import CodeReward, extract_code
from drift.rewards.code_tests import split_tests

ADD = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(5, 7) == 12
    assert candidate(-1, -8) == -9

check(add)
"""
Judge = Callable[..., float]


def function(*tests: str, prefix: str = "", seconds: float = 2.0) -> Problem:
    row = {
        "test_method": "function",
        "test_time_limit": seconds,
        "test_list": list(tests),
        "prefix": prefix,
    }
    return Problem(prompt="", answer="", answer_prefix=prefix, row=row)


def program(inputs: list[str], outputs: list[str], seconds: float = 2.0) -> Problem:
    row = {
        "test_method": "stdio",
        "test_time_limit": seconds,
        "test_input": inputs,
        "test_output": outputs,
    }
    return Problem(prompt="", answer="", row=row)


def block(code: str) -> str:
    return f"```python\n{textwrap.dedent(code)}\n```"


@pytest.fixture(scope="module")
def judge(bwrap: None) -> Judge:
    reward = CodeReward(timeout_seconds=4.0)
    return lambda code, problem=None: reward([block(code)], [problem or function(ADD)]).item()


@pytest.mark.parametrize(
    ("answer", "prefix", "code"),
    [
        ("a\n```python\nx = 1\n```\nb", "", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "", "x = 2\n"),
        ("```python\nx = 1\n```\n```python\nx = 2", "", "x = 1\n"),  # the last one that is complete
        ("```python\nx = 1", "", "x = 1"),
        ("```python\nx = 1\n```python\nx = 2\n```", "", "x = 2\n"),  # begun anew within a block
        ("```py\nx = 1\n```\n```text\n1\n```", "", "x = 1\n"),
        ("```\nx = 1\n```", "", ""),
        ("x = 1", "", ""),
        ("", "", ""),
        ("```python\ndef f():\n    return 1\n```\nB", "```python\ndef f():\n", "def f():\n    return 1\n"),
        ("A\n```\ndef f():\n    return 1\n```\nB", "A\n```\ndef f():\n", "def f():\n    return 1\n"),
        ("def f():\n    return 1", "def f():\n", "def f():\n    return 1"),
        ("def f():\n    return 1\n```\nIt is 1.", "def f():\n", "def f():\n    return 1\n"),
        # What goes on from the prefix without repeating it.
        ("    return 1\n```\nB", "A\n```python\ndef f():\n", "def f():\n    return 1\n"),
        ("    return 1", "def f():\n", "def f():\n    return 1"),
        ("B\n```python\nx = 1\n```", "```python\ndef f():\n", "x = 1\n"),
        # A fence within a text of the code.
        ("```python\n'\n    ```\n    1\n    ```\n'\n```\nB", "", "'\n    ```\n    1\n    ```\n'\n"),
        ("```python\n'\n```x```\n'\n```", "", "'\n```x```\n'\n"),
        ("```python\nx = 1\n    ```\nB", "", "x = 1\n"),
        # A block in a list.
        ("1. A\n   ```python\n   if x:\n     y = 1\n   ```\n", "", "if x:\n  y = 1\n"),
        ("  ```python\nx = 1\n  ```", "", "x = 1\n"),
        ("````python\nx = 1\n````", "", "x = 1\n"),
        ("```python\nx = 1\n``` That is all.", "", "x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\n", "", "x = 1\r\n"),
    ],
)  # fmt: skip
def test_the_code_of_an_answer(answer: str, prefix: str, code: str):
    assert extract_code(answer, prefix) == code


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def add(a, b): return a + b", 1.0),
        ("def add(a, b): return abs(a) + b", 2 / 3),
        ("def add(a, b): return 12", 1 / 3),
        ("def add(a, b): return a - b", 0.0),
        ("def sub(a, b): return a + b", 0.0),
        ("def add(a, b) return a + b", 0.0),
        ("import numpy\ndef add(a, b): return a + b", 0.0),
        ("class Odd(Exception): pass\ndef add(a, b):\n    if a == 5: raise Odd\n    return a + b", 2 / 3),
        ("def add(a, b):\n    if a == 5: raise SystemExit\n    return a + b", 2 / 3),
    ],
)
def test_the_share_of_assertions(judge: Judge, code: str, share: float):
    assert judge(code) == pytest.approx(share)


def test_all_or_nothing_and_equal_answers(bwrap: None):
    reward = CodeReward(all_or_nothing=True, num_workers=2)
    right, half = block("def add(a, b): return a + b"), block("def add(a, b): return abs(a) + b")
    one, other = function(ADD), function("assert add(2, 2) == 5")
    assert reward([right, half, right, "", right], [one, one, one, one, other]).tolist() == [1, 0, 1, 0, 0]
    assert reward([], []).tolist() == []


def test_a_call_that_takes_too_long_fails_one_test_even_if_it_catches_everything(judge: Judge):
    code = """
        def add(a, b):
            while a == 5:
                try:
                    while True: pass
                except: pass
            return a + b
    """
    assert judge(code, function(ADD, seconds=0.3)) == pytest.approx(2 / 3)


def test_all_tests_share_the_time_of_the_setting(bwrap: None):
    calls = "\n".join(f"assert f({i}) == {i}" for i in range(50))
    answer = block("def f(i):\n    while i >= 2: pass\n    return i")
    start = time.monotonic()
    share = CodeReward(timeout_seconds=1.0)([answer], [function(calls, seconds=0.7)]).item()
    assert share == pytest.approx(2 / 50)
    assert time.monotonic() - start < 8  # 48 calls of 0.7 s each would be 34 s


def test_tests_that_compute_for_ever_with_a_value_end(bwrap: None):
    tests = "assert f(1) == 1\nn = f(2)\nwhile n: n -= 1\nassert f(3) == 3"
    answer = block("def f(i): return 10**18 if i == 2 else i")
    assert CodeReward(timeout_seconds=0.5)([answer], [function(tests)]).item() == 0.5


def test_an_end_of_iteration_does_not_cut_tests_short(judge: Judge):
    tests = function("assert all(map(f, [1, 2]))\nassert list(map(f, [1])) == []")
    assert judge("def f(x): raise StopIteration", tests) == 0.0
    assert judge("def f(x): return True", tests) == 0.5


def test_arguments_are_copies(judge: Judge):
    tests = "x = [1, 2]\nassert f(x) == [1, 2, 3]\nassert x == [1, 2]\nassert f(x) == [1, 2, 3]"
    assert judge("def f(x):\n    x.append(3)\n    return x", function(tests)) == 1.0


def test_helpers_of_the_prefix_are_not_the_answers(judge: Judge):
    prefix = "```python\nimport math\n\ndef double(x):\n    return 2 * x\n\ndef half(x):\n"
    tests = "assert double(half(3)) == 3\nassert math.isclose(double(half(0.1)), 0.1)"
    assert judge("def half(x): return x / 2", function(tests, prefix=prefix)) == 1.0
    bent = (
        "class Any:\n    def __eq__(self, other): return True\ndef double(x): return 3\ndef half(x): return 0"
    )
    assert judge(bent, function(tests, prefix=prefix)) == 0.0


def test_exceptions_that_the_tests_expect(judge: Judge):
    tests = """
try:
    f(-1)
    assert False
except ValueError as error:
    assert str(error) == "negative"
assert f(1) == 1
"""
    right = "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x"
    assert judge(right, function(tests)) == 1.0
    assert judge("def f(x): return x", function(tests)) == 0.5  # `assert False` was reached, the last holds
    assert judge(right.replace("ValueError", "exit"), function(tests)) == 0.0


def test_a_text_that_could_be_a_fence_is_read_quickly():
    start = time.monotonic()
    assert extract_code("```" + " " * 100_000 + "a" * 100_000 + "`") == ""
    assert extract_code(" \t" * 100_000 + "``\n" + "```python" * 50_000) == ""
    assert time.monotonic() - start < 2


def test_exceptions_of_the_answers_own_are_those_that_they_extend(judge: Judge):
    tests = """
try:
    f(-1)
    assert False
except ValueError:
    pass
assert f(1) == 1
"""
    right = "class Odd({}): pass\ndef f(x):\n    if x < 0: raise Odd\n    return x"
    assert judge(right.format("ValueError"), function(tests)) == 1.0
    assert judge(right.format("UnicodeError"), function(tests)) == 1.0
    assert judge(right.format("KeyError"), function(tests)) == 0.0
    assert judge(right.format("BaseException"), function(tests)) == 0.0


@pytest.mark.parametrize(
    "read",
    [
        "input()",
        "open(0).read()",
        "open('/dev/stdin').read()",
        "__import__('sys').stdin.buffer.read()",
        "__import__('os').read(0, 99)",
        "next(__import__('fileinput').input())",
        "__import__('mmap').mmap(0, 0, access=1).read()",
    ],
)
def test_programs_read_their_input_in_any_way(judge: Judge, read: str):
    assert judge(f"print(sum(map(int, {read}.split())))", program(["1 2\n", "3 4"], ["3", "7"])) == 1.0


def test_programs(judge: Judge):
    problem = program(["1 2\n", "3 4\n", "5 6\n"], ["3", "7\n", "11\n\n"])
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert judge(right, problem) == 1.0
    assert judge(right + "\nexit()", problem) == 1.0
    guarded = "import sys\nif __name__ == '__main__': print(' ', sum(map(int, sys.stdin.read().split())))"
    assert judge(guarded, problem) == 1.0
    assert judge("a, b = map(int, input().split())\nprint(7)", problem) == pytest.approx(1 / 3)
    assert judge(right + "\nraise ValueError", problem) == 0.0
    assert judge(right + "\nexit(1)", problem) == 0.0
    assert judge("print(a)", problem) == 0.0
    lines = program([""], ["1  2\n3\n"])
    assert judge("print('1 2 ')\nprint(3)", lines) == 1.0
    assert judge("print('1 2 3')", lines) == 0.0


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time\ntime.sleep(60)", "while True: print('a' * 10000)"]
)
def test_programs_without_end(judge: Judge, code: str):
    start = time.monotonic()
    assert judge(code, program([""], ["a"], seconds=0.3)) == 0.0
    assert time.monotonic() - start < 5


def test_a_program_of_which_each_run_takes_too_long_shares_the_time(bwrap: None):
    problem = program([""] * 20, ["a"] * 20, seconds=0.6)
    start = time.monotonic()
    assert CodeReward(timeout_seconds=1.0)([block("while True: pass")], [problem]).item() == 0.0
    assert time.monotonic() - start < 6  # 20 runs of 0.6 s each would be 12 s


def test_many_at_once_are_judged_in_order(bwrap: None):
    reward = CodeReward(num_workers=4, timeout_seconds=5.0)
    codes = [block(f"import time\ndef f(x):\n    time.sleep(0.3)\n    return {i}") for i in range(12)]
    problems = [function(f"assert f(0) == {i if i % 3 else -1}") for i in range(12)]
    start = time.monotonic()
    assert reward(codes, problems).tolist() == [float(i % 3 != 0) for i in range(12)]
    assert time.monotonic() - start < 3.3  # one after the other they sleep for 3.6 s


def test_no_process_is_left(judge: Judge):
    before = set(_children())
    judge("def add(a, b):\n    while True: pass", function(ADD, seconds=0.2))
    judge("import os\nos._exit(0)")
    judge("exit()", program([""], [""]))
    assert set(_children()) <= before


def _children() -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == os.getpid():
            found.append(name)
    return found


def test_processes_end_with_their_parent(bwrap: None):
    mark = f"marked_{os.getpid()}"
    script = textwrap.dedent(f"""
        import sys
        from drift.contract import Problem
        from drift.rewards import CodeReward
        row = {{"test_method": "function", "test_time_limit": 60, "test_list": ["assert f(1)"]}}
        reward = CodeReward(timeout_seconds=60)
        print("ready", flush=True)
        code = "```python\\nimport signal\\nsignal.alarm(0)\\n{mark} = 1\\nwhile True: pass\\n```"
        reward([code], [Problem(prompt="", answer="", row=row)])
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while len(offspring := _offspring(parent.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(offspring) >= 4  # two sandboxes, a process in each
    parent.kill()
    parent.communicate()
    while any(_is_running(pid) for pid in offspring) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in offspring if _is_running(pid)]


def _offspring(root: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_seconds": 0},
        {"timeout_seconds": float("inf")},
        {"memory_megabytes": 1},
        {"output_kilobytes": 0},
        {"num_workers": 0},
        {"sandbox": "none"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]):
    (key, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"{key}={value!r}"):
        CodeReward(**{"sandbox": "rlimits", **settings})


def test_without_bubblewrap_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"sandbox='bwrap' needs bubblewrap.*apt install bubblewrap.*rlimits"
    ):
        CodeReward()
    assert (
        CodeReward(sandbox="rlimits")([block("def add(a, b): return a + b")], [function(ADD)]).item() == 1.0
    )


# Bodies of a right answer and a wrong one, which go on from the row's prefix.
HAND_WRITTEN = {
    ("HumanEval", 2): ("return number % 1.0", "return int(number)"),
    ("HumanEval", 10): (
        """
    for i in range(len(string)):
        if is_palindrome(string[i:]):
            return string + string[:i][::-1]
    return ""

def is_palindrome(text):
    return text == text[::-1]
""",
        "return string + string[::-1]",
    ),
    ("HumanEval", 32): (
        """
    low, high = -1.0, 1.0
    while poly(xs, low) * poly(xs, high) > 0:
        low, high = 2 * low, 2 * high
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if poly(xs, middle) * poly(xs, low) > 0 else (low, middle)
    return low
""",
        "global poly\n    poly = lambda *args: 0\n    return 0.0",
    ),
    # Three of its assertions compare the answer with itself.
    ("HumanEval", 33): (
        "thirds = sorted(l[::3])\n    return [thirds[i // 3] if i % 3 == 0 else x for i, x in enumerate(l)]",
        "return l",
    ),
    ("HumanEval", 38): ("return encode_cyclic(encode_cyclic(s))", "return encode_cyclic(s)"),
    ("HumanEval", 44): (
        "digits = ''\n    while x: x, digits = x // base, str(x % base) + digits\n    return digits",
        "return str(x)",
    ),
    ("HumanEval", 50): (
        "return ''.join(chr((ord(letter) - 5 - ord('a')) % 26 + ord('a')) for letter in s)",
        "return s",
    ),
    ("HumanEval", 53): ("return x + y", "return x - y"),
    ("HumanEval", 151): (
        "return sum(x * x for x in lst if x > 0 and x % 2 == 1 and isinstance(x, int))",
        "return None",
    ),
    ("MBPP", 0): ("return s.replace(ch, '', 1)[::-1].replace(ch, '', 1)[::-1]", "return ch"),
    ("MBPP", 1): ("return sorted(M, key=sum)", "return M"),
    ("MBPP", 2): ("return Counter(words).most_common(4)", "return Counter(words)"),
    # Its tests call a function that the prefix doesn't begin.
    ("MBPP", 19): (
        """
    return s[0] == s[-1]

def count_Substring_With_Equal_Ends(s):
    return sum(check_Equality(s[i:j]) for i in range(len(s)) for j in range(i + 1, len(s) + 1))
""",
        "return True",
    ),
    # The answer's function has the name of a built-in one, or of the tests'.
    ("MBPP", 115): (
        "import math\n    return math.fsum(i for i in range(1, a) if a % i == b % i == 0)",
        "return a",
    ),
    ("MBPP", 337): ("return 'Yes' if set(string) <= set('01') else 'No'", "return 'No' * len(string)"),
    # Its tests give a type as an argument.
    ("MBPP_train", 32): ("return [x for x in test_tuple if type(x) != data_type]", "return test_tuple"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), HAND_WRITTEN)
def test_hand_written_answers_to_benchmark_problems(bwrap: None, shared: Path, name: str, number: int):
    row = json.loads((shared / "data" / f"{name}.json").read_text())[number]
    problem = Problem(prompt="", answer="", answer_prefix=row["prefix"], row=row)
    right, wrong = (f"{row['prefix']}    {body}\n```\n" for body in HAND_WRITTEN[name, number])
    rewards = CodeReward()([right, wrong], [problem, problem])
    assert rewards[0] == 1.0
    assert rewards[1] < 0.5


def table_answer(row: dict[str, Any]) -> str | None:
    """Code that looks the expected values up, made from the row's assertions; None where that can't do."""
    tree = ast.parse(row["test_list"][0])
    names = split_tests(row["test_list"], row["prefix"]).scripts[0].names
    check = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    cases: list[str] = []
    for node in check.body:
        if isinstance(node, ast.Assert):
            calls = [
                call
                for call in ast.walk(node.test)
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("candidate", *names)
            ]
            expected = _expected(node.test)
            if len(calls) > 1 or (calls and expected is None):
                return None
            cases += [f"(({', '.join(map(ast.unparse, calls[0].args))},), {expected})" for _ in calls[:1]]
        elif not isinstance(node, ast.Expr) and not isinstance(node, ast.Assign):
            return None
    given = "\n".join(ast.unparse(node) for node in check.body if isinstance(node, ast.Assign))
    table = f"import math, sys\ndef kinds(x): return [*map(type, x)]\n{given}\nCASES = [{', '.join(cases)}]\n"
    answer = "def {}(*args): return next(v for x, v in CASES if x == args and kinds(x) == kinds(args))\n"
    return table + "".join(answer.format(name) for name in names)


def _expected(test: ast.expr) -> str | None:
    """The value of the call in an assertion that makes it hold."""
    if isinstance(test, ast.Call):
        return "True"
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return "False"
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.Is):
        return ast.unparse(test.comparators[0])
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Lt):  # abs(candidate(x) - value) < 1e-6
        difference = next(node for node in ast.walk(test) if isinstance(node, ast.BinOp))
        return ast.unparse(difference.right)
    return None


def check_tables(path: Path, step: int) -> tuple[int, list[int]]:
    rows = json.loads(path.read_text())
    answers = {number: table_answer(row) for number, row in enumerate(rows) if number % step == 0}
    asked = {number: block(answer) for number, answer in answers.items() if answer is not None}
    problems = [Problem(prompt="", answer="", row=rows[number]) for number in asked]
    rewards = CodeReward()(list(asked.values()), problems)
    assert {n: r for n, r in zip(asked, rewards.tolist(), strict=True) if r != 1.0} == {}
    return len(asked), [number for number, answer in answers.items() if answer is None]


@pytest.mark.parametrize("name", ["MBPP", "MBPP_train", "HumanEval"])
def test_benchmark_problems_can_be_solved(bwrap: None, shared: Path, name: str):
    solved, _ = check_tables(shared / "data" / f"{name}.json", step=67)
    assert solved >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("MBPP", 498), ("MBPP_train", 472), ("HumanEval", 164)])
def test_every_benchmark_problem_can_be_solved(bwrap: None, shared: Path, name: str, count: int):
    solved, others = check_tables(shared / "data" / f"{name}.json", step=1)
    assert solved + len(others) == count
    # Those whose tests make their values up have an answer written by hand.
    assert {(name, number) for number in others} <= set(HAND_WRITTEN)
