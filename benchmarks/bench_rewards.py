"""Speed of the rewards that run something: candidates and answers judged per second.

Code: candidates that all differ, each with its own three assertions, each in two sandboxes. Beside it stands
what two bare starts of Python take in the same number of threads, because no sandbox can be faster. Math:
answers that all differ and need the symbolic judge, half of them right, after the judges have started. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from drift.contract import Problem
from drift.rewards import CodeReward, MathReward

_TESTS = """
def check(candidate):
    assert candidate(1, 2) == {}
    assert candidate(5, 7) == {}
    assert candidate(-1, -8) == {}

check(combine)
"""


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def candidates(num: int) -> tuple[list[str], list[Problem]]:
    """[num] right answers and their problems."""
    answers, problems = [], []
    for i in range(num):
        answers.append(f"```python\ndef combine(a, b):\n    return {i} * a + b\n```")
        tests = [_TESTS.format(i + 2, 5 * i + 7, -i - 8)]
        row = {"test_method": "function", "test_time_limit": 5.0, "test_list": tests, "prefix": ""}
        problems.append(Problem(prompt="", answer="", row=row))
    return answers, problems


def answers(num: int) -> tuple[list[str], list[Problem]]:
    """[num] fractions written otherwise than the ground truth, every second one wrong."""
    texts = [f"\\boxed{{\\frac{{{2 * i + 1 + i % 2}}}{{{2 * i + 4}}}}}" for i in range(num)]
    return texts, [Problem(prompt="", answer=f"{2 * i + 1}/{2 * i + 4}") for i in range(num)]


def start_python() -> None:
    """Python's start as a sandbox starts it, without the sandbox."""
    subprocess.run([sys.executable, "-P", "-s", "-S", "-B", "-c", ""], check=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--answers", type=int, default=512)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of either reward")
    parser.add_argument("--sandbox", default="bwrap", choices=["bwrap", "rlimits"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    code = CodeReward(num_workers=options.workers, sandbox=options.sandbox)
    maths = MathReward(num_workers=options.workers)
    programs, formulas = candidates(options.candidates), answers(options.answers)
    maths(*answers(options.workers * 4))  # starts the judges

    def bare() -> None:
        with ThreadPoolExecutor(options.workers) as threads:
            list(threads.map(lambda _: start_python(), range(2 * options.candidates)))

    right = float(code(*programs).mean()), float(maths(*formulas).mean())
    runs = (lambda: code(*programs), bare, lambda: maths(*formulas))
    times = [[seconds(run) for run in runs] for _ in range(options.repeats)]
    maths.close()
    code_seconds, python_seconds, math_seconds = (
        statistics.median(column) for column in zip(*times, strict=True)
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "benchmark": "rewards",
        "right": {"code": right[0], "math": right[1]},
        "code_per_second": round(options.candidates / code_seconds, 1),
        "math_per_second": round(options.answers / math_seconds, 1),
        "code_milliseconds": round(1000 * code_seconds / options.candidates, 1),
        "python_milliseconds": round(1000 * python_seconds / options.candidates, 1),
        "spread_seconds": [
            [round(min(column), 3), round(max(column), 3)] for column in zip(*times, strict=True)
        ],
        "config": vars(options),
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "cpu": platform.machine(),
        },
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
