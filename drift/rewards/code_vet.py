"""Finds the problems whose tests no answer can pass, before an answer is asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from drift.rewards.code_tests import TestCode, prefix_code
from drift.rewards.inside.checker import END_SECONDS
from drift.rewards.inside.values import encode
from drift.rewards.sandbox import Sandbox

_AT_ONCE = 500  # problems whose tests one process runs


def faults(sandbox: Sandbox, tests: Iterable[TestCode], seconds: float) -> Iterator[tuple[int, str]]:
    """The number of each problem whose tests cannot be passed, and why; a process stands for many problems.

    The tests run with an answer that fails at once: what goes wrong before they ask it for anything, or
    never ends, does so with every answer.

    Args:
        sandbox: where the tests run.
        tests: of each problem.
        seconds: time for the tests of one problem.
    """
    waiting = enumerate(tests)
    while some := list(islice(waiting, _AT_ONCE)):
        while some:
            reasons = _rehearse(sandbox, [test for _, test in some], seconds)
            yield from ((some[i][0], reason) for i, reason in enumerate(reasons) if reason)
            # The process ends with the tests that do not.
            some = some[len(reasons) :]


def _rehearse(sandbox: Sandbox, tests: list[TestCode], seconds: float) -> list[str]:
    scripts = [[(script.source, script.names) for script in test.scripts] for test in tests]
    cpu_seconds = len(tests) * (int(seconds) + 2)
    reasons: list[str] = []
    with sandbox.start("rehearsal", encode((scripts, seconds)), b"", cpu_seconds) as process:
        process.require_greeting()
        for reason in process.lines(seconds + END_SECONDS):
            reasons.append(reason)
            if len(reasons) == len(tests):
                return reasons
    return [*reasons, f"it does not end within {seconds:g} s, whatever the answer is"]


def reference_answer(row: Mapping[str, Any], field: str) -> str:
    """The row's own solution, as an answer: whole, or a body that goes on from the prefix.

    Args:
        row: the row.
        field: column of the solution.
    """
    solution = str(row[field])
    try:
        ast.parse(solution)
    except SyntaxError:
        solution = f"{prefix_code(row.get('prefix') or '')}{solution}"
    return f"```python\n{solution}\n```"
