"""Reward of a program: the share of a problem's tests that it passes, run in a sandbox."""

from __future__ import annotations

import math
import os
import re
import socket
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from drift.contract import ConfigError, Problem
from drift.rewards.base import Reward
from drift.rewards.code_tests import TestCode, split_tests
from drift.rewards.code_vet import faults, reference_answer
from drift.rewards.inside.checker import END_SECONDS, GRACE_SECONDS
from drift.rewards.inside.values import encode
from drift.rewards.sandbox import Sandbox, SandboxKind

# Indentation, and the language that the block is said to be in.
_FENCE = re.compile(r"^([ \t]*+)`{3,}+[ \t]*+([^\s`]*+)[^\n`]*+(?:\n|\Z)", re.MULTILINE)
_DEEPER = 4  # columns by which a fence is indented that is text of the block, as in Markdown
_LANGUAGES = ("python", "py", "python3")
_VERDICT_BYTES = 1 << 20
_AT_ONCE = 64  # solutions that are judged together


class CodeReward(Reward):
    """The share of `problem.row`'s tests that the completion's code passes, 0 to 1.

    A row's tests are code with assertions (`test_list`), of which each counts as one test, or inputs and the
    outputs they must lead to (`test_input`, `test_output`), compared line by line without regard to spaces.
    `test_time_limit` is the time of one test in seconds.

    The code runs in one sandbox and the tests in another, and only plain values pass between them: what an
    answer returns is compared where its own code has no say. It gets copies of the arguments: changing them
    in place has no effect on the tests. If its process ends, for whatever reason, all tests that are left
    fail. Only Python's standard library can be imported.

    Args:
        all_or_nothing: 1.0 where all tests pass, else 0.0.
        timeout_seconds: time for all tests of a completion, > 0; also the most that a single one may take.
        memory_megabytes: memory of a completion's process, >= 64.
        output_kilobytes: what a program may print beyond twice the output that is expected, >= 1.
        num_workers: completions judged at the same time, >= 1; None for as many as there are cores.
        solution_field: column of the rows with a solution, such as HumanEval's `canonical_solution` or MBPP's
            `code`, that must pass all tests of its row before training begins; None: solutions are not run.
        sandbox: "bwrap" keeps the code from network, files and other processes; "rlimits" only limits time
            and memory, for machines without bubblewrap and answers that you would run yourself.

    Raises:
        ConfigError: an argument is out of its range, or the sandbox does not work on this machine.
    """

    def __init__(
        self,
        all_or_nothing: bool = False,
        timeout_seconds: float = 10.0,
        memory_megabytes: int = 512,
        output_kilobytes: int = 1024,
        num_workers: int | None = None,
        solution_field: str | None = None,
        sandbox: SandboxKind = "bwrap",
    ) -> None:
        if not 0 < timeout_seconds < math.inf:
            raise ConfigError(
                f"timeout_seconds={timeout_seconds!r} of CodeReward must be greater than 0 and finite"
            )
        if output_kilobytes < 1:
            raise ConfigError(f"output_kilobytes={output_kilobytes!r} of CodeReward must be at least 1")
        if num_workers is not None and num_workers < 1:
            raise ConfigError(f"num_workers={num_workers!r} of CodeReward must be at least 1, or null")
        self.all_or_nothing = all_or_nothing
        self.timeout_seconds = timeout_seconds
        self.output_kilobytes = output_kilobytes
        self.num_workers = num_workers
        self.solution_field = solution_field
        self._sandbox = Sandbox(sandbox, memory_megabytes)

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> Tensor:
        """[N] float32 rewards on the CPU.

        Raises:
            RuntimeError: the sandbox does not start any more.
        """
        codes = [
            extract_code(completion, problem.answer_prefix)
            for completion, problem in zip(completions, problems, strict=True)
        ]
        # Equal answers to the same problem are run once. Problems are told apart by their identity.
        pairs = {(code, id(problem)): problem for code, problem in zip(codes, problems, strict=True) if code}
        with ThreadPoolExecutor(self.num_workers or os.cpu_count()) as threads:
            shares = threads.map(self._share, [code for code, _ in pairs], pairs.values())
            found = dict(zip(pairs, shares, strict=True))
        values = [found.get((code, id(problem)), 0.0) for code, problem in zip(codes, problems, strict=True)]
        return torch.tensor(
            [float(v == 1.0) if self.all_or_nothing else v for v in values], dtype=torch.float32
        )

    def vet(self, problems: Iterable[Problem]) -> Iterator[tuple[int, str]]:
        """The number of each problem whose tests no answer can pass, and why.

        Tests are run without an answer, which takes about a millisecond a problem; with `solution_field` also
        with the row's own solution, which takes as long as judging it.
        """
        asked = list(problems)
        functions = [
            (i, problem.row) for i, problem in enumerate(asked) if problem.row["test_method"] == "function"
        ]
        tests = (_tests(row) for _, row in functions)
        for number, reason in faults(self._sandbox, tests, self.timeout_seconds):
            yield functions[number][0], f"field 'test_list' cannot be used: {reason}"
        if self.solution_field is not None:
            yield from self._failing_solutions(asked, self.solution_field)

    def _failing_solutions(self, problems: Sequence[Problem], field: str) -> Iterator[tuple[int, str]]:
        for start in range(0, len(problems), _AT_ONCE):
            some = problems[start : start + _AT_ONCE]
            known = {i: problem for i, problem in enumerate(some) if isinstance(problem.row.get(field), str)}
            answers = [reference_answer(problem.row, field) for problem in known.values()]
            shares = dict(zip(known, self(answers, list(known.values())).tolist(), strict=True))
            for i in range(len(some)):
                if i not in shares:
                    yield start + i, f"solution_field={field!r} of CodeReward: the row has no such text"
                elif shares[i] < 1:
                    yield (
                        start + i,
                        f"field {field!r}: this solution passes only {shares[i]:.2f} of its tests",
                    )

    def _share(self, code: str, problem: Problem) -> float:
        seconds = min(float(problem.row["test_time_limit"]), self.timeout_seconds)
        if problem.row["test_method"] == "stdio":
            return self._share_of_outputs(code, problem.row, seconds)
        return self._share_of_assertions(code, _tests(problem.row), seconds)

    def _share_of_assertions(self, code: str, tests: TestCode, seconds: float) -> float:
        scripts = [(script.source, script.names) for script in tests.scripts]
        task = encode((scripts, seconds, self.timeout_seconds))
        cpu_seconds = math.ceil(self.timeout_seconds) + 2
        ours, theirs = socket.socketpair()
        with ours, theirs:
            answer = encode((code, seconds))
            with (
                self._sandbox.start("candidate", answer, theirs.fileno(), cpu_seconds, output=False),
                self._sandbox.start("checker", task, ours.fileno(), cpu_seconds) as checker,
            ):
                # Each end lives in one process alone, so that either sees the other's end.
                ours.close()
                theirs.close()
                checker.require_greeting()
                # What the checker computes in one go, with what the answer gave, it cannot interrupt itself.
                said = checker.read(self.timeout_seconds + END_SECONDS, _VERDICT_BYTES) or b""
        verdicts = [line.split() for line in said.decode().split("\n")[:-1]]
        by_kind = {kind: [int(test) for word, test in verdicts if word == kind] for kind in ("pass", "fail")}
        return tests.share(by_kind["pass"], by_kind["fail"])

    def _share_of_outputs(self, code: str, row: Mapping[str, Any], seconds: float) -> float:
        left, passed = self.timeout_seconds, 0
        for given, expected in zip(row["test_input"], row["test_output"], strict=True):
            limit = min(seconds, left)
            if limit <= 0:
                break
            output, seconds_taken = self._output(code, given, limit, len(expected.encode()))
            passed += _lines(output) == _lines(expected)
            left -= seconds_taken
        return passed / len(row["test_input"])

    def _output(self, code: str, given: str, seconds: float, num_expected: int) -> tuple[str | None, float]:
        """What the program prints, None where it fails, takes too long or prints too much; and its time."""
        program = encode((code, seconds))
        with self._sandbox.start("program", given.encode(), program, math.ceil(seconds) + 2) as process:
            process.require_greeting()
            start = monotonic()
            # It ends itself in time, unless its code prevents that.
            deadline = start + seconds + GRACE_SECONDS
            printed = process.read(deadline - start, self.output_kilobytes * 1024 + 2 * num_expected)
            ended = printed is not None and process.wait(max(0.0, deadline - monotonic())) == 0
            taken = monotonic() - start
        try:
            return (printed.decode() if printed is not None and ended else None), taken
        except UnicodeDecodeError:
            return None, taken


def _tests(row: Mapping[str, Any]) -> TestCode:
    return _split(tuple(row["test_list"]), row.get("prefix") or "")


@lru_cache(maxsize=4096)
def _split(sources: tuple[str, ...], prefix: str) -> TestCode:
    return split_tests(sources, prefix)


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [" ".join(line.split()) for line in text.strip().splitlines()]


def extract_code(answer: str, prefix: str = "") -> str:
    """The Python code of an answer, empty where there is none.

    It is the last ```python block that is closed, else the last one that was begun. Where there is neither,
    but the problem has a prefix, it is what follows the prefix's last fence, up to the next one; a prefix
    without any fence is code itself.

    Args:
        answer: the answer, with or without the prefix in front.
        prefix: what the answer was started with.
    """
    whole = answer if answer.startswith(prefix) else prefix + answer
    block = _last_block(answer) or _last_block(whole)
    if block is not None or not prefix:
        return block or ""
    fences = [fence.end() for fence in _FENCE.finditer(prefix)]
    return _up_to_fence(whole[fences[-1] if fences else 0 :])


def _last_block(answer: str) -> str | None:
    closed, opening = None, None
    for fence in _FENCE.finditer(answer):
        if opening is not None and len(fence[1]) >= len(opening[1]) + _DEEPER:
            continue
        if fence[2].lower() in _LANGUAGES:
            opening = fence  # within a block too: the answer begins anew
        elif opening is not None:
            closed, opening = (opening, answer[opening.end() : fence.start()]), None
    if closed is None and opening is not None:
        closed = opening, _up_to_fence(answer[opening.end() :])
    if closed is None:
        return None
    opening, code = closed
    # A block in a list is indented as a whole.
    return textwrap.dedent(code) if opening[1] else code


def _up_to_fence(code: str) -> str:
    fence = _FENCE.search(code)
    return code[: fence.start()] if fence else code
