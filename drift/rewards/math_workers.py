"""Judge processes with a time limit: what hangs or crashes in one of them costs one answer, not the run."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import IO, Any, TypeVar

from drift.contract import ConfigError
from drift.rewards.math_form import Question

Q = TypeVar("Q")
R = TypeVar("R")

JUDGE_COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("math_judge.py")))
_ADVICE = f"Install math-verify for {sys.executable} (pip install math-verify)"
_STARTUP_SECONDS = 120.0  # importing sympy from a cold network disk
_GRACE_SECONDS = 0.5  # a judge ends what takes too long in time, unless it hangs itself
_MAX_QUESTIONS = 5000  # the symbolic libraries keep caches: a fresh process now and then keeps memory flat


class JudgeProcess:
    """One judge, started at its first question and replaced if it does not say what became of one.

    Args:
        timeout_seconds: limit of one answer, > 0; starting the process does not count.
        command: program that speaks the protocol of math_judge.py.
        advice: what to do where it cannot start, in words.
    """

    def __init__(
        self, timeout_seconds: float, command: Sequence[str] = JUDGE_COMMAND, advice: str = _ADVICE
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.command = list(command)
        self.advice = advice
        self._process: subprocess.Popen[bytes] | None = None
        self._num_questions = 0

    def ask(self, questions: Sequence[Question]) -> bool:
        """Whether the judge says that all these pairs are equal; False where it hangs or crashes.

        Args:
            questions: (gold, answer) pairs of one answer, which share its time.

        Raises:
            ConfigError: the judge cannot be started.
        """
        process = self._ready()
        deadline = time.monotonic() + self.timeout_seconds
        return all(self._equal(process, *question, deadline - time.monotonic()) for question in questions)

    def exchange(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to a question of any form; None where the judge hangs or crashes.

        Raises:
            ConfigError: the judge cannot be started.
        """
        return self._exchange(self._ready(), question, self.timeout_seconds)

    def _equal(self, process: subprocess.Popen[bytes], gold: str, answer: str, seconds: float) -> bool:
        question = {"gold": gold, "answer": answer, "timeout_seconds": seconds}
        reply = self._exchange(process, question, seconds)
        return reply is not None and reply["equal"]

    def _exchange(
        self, process: subprocess.Popen[bytes], question: Mapping[str, Any], seconds: float
    ) -> dict[str, Any] | None:
        if seconds <= 0:
            return None
        self._num_questions += 1
        stdin, _ = _pipes(process)
        try:
            stdin.write(json.dumps(question).encode() + b"\n")
            stdin.flush()
        except OSError:
            reply = None
        else:
            reply = _read_message(process, seconds + _GRACE_SECONDS)
        if reply is None:
            self.kill()
        return reply

    def kill(self) -> None:
        """Ends the process, if there is one; the next question starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has forked
            process.wait()
        for pipe in _pipes(process):
            try:
                pipe.close()
            except OSError:
                continue  # a question that was never read is still in the buffer

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._num_questions >= _MAX_QUESTIONS:
            self.kill()
        return self._running() or self._start()

    def _running(self) -> subprocess.Popen[bytes] | None:
        process = self._process
        return process if process and process.poll() is None else None

    def _start(self) -> subprocess.Popen[bytes]:
        self.kill()
        self._process = process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._num_questions = 0
        greeting = _read_message(process, _STARTUP_SECONDS) or {"error": "it said nothing"}
        if "error" in greeting:
            self.kill()
            command = " ".join(self.command)
            raise ConfigError(
                f"a judge cannot start: {greeting['error']}. {self.advice}; to see the whole error run: "
                f"{command}"
            )
        return process


class JudgePool:
    """Judges that share the answers of a batch. Closed by `close`, when collected and at interpreter exit.

    Args:
        num_workers: judges, >= 1; a judge that is never needed is never started.
        timeout_seconds: limit of one answer, > 0.
        command: program that speaks the protocol of math_judge.py.
        advice: what to do where it cannot start, in words.
    """

    def __init__(
        self,
        num_workers: int,
        timeout_seconds: float,
        command: Sequence[str] = JUDGE_COMMAND,
        advice: str = _ADVICE,
    ) -> None:
        self._workers = [JudgeProcess(timeout_seconds, command, advice) for _ in range(num_workers)]
        # Last in, first out: a running judge before a new one.
        self._idle: LifoQueue[JudgeProcess] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        weakref.finalize(self, _kill_all, self._workers)

    def judge(self, answers: Sequence[Sequence[Question]]) -> list[bool]:
        """Whether all the (gold, answer) pairs of each answer are equal.

        Raises:
            ConfigError: a judge cannot be started.
        """
        return self._share(answers, lambda worker, questions: worker.ask(questions))

    def exchange(self, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """The reply to each question; None where the judge hangs or crashes.

        Raises:
            ConfigError: a judge cannot be started.
        """
        return self._share(questions, lambda worker, question: worker.exchange(question))

    def close(self) -> None:
        """Ends all judges; the next batch starts them again."""
        _kill_all(self._workers)

    def _share(self, questions: Sequence[Q], ask: Callable[[JudgeProcess, Q], R]) -> list[R]:
        def ask_idle(question: Q) -> R:
            worker = self._idle.get()
            try:
                return ask(worker, question)
            finally:
                self._idle.put(worker)

        if not questions:
            return []
        with ThreadPoolExecutor(min(len(self._workers), len(questions))) as threads:
            return list(threads.map(ask_idle, questions))


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _kill_all(workers: Sequence[JudgeProcess]) -> None:
    for worker in workers:
        worker.kill()


def _read_message(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """The next line of a judge, None where there is none in time or the judge has ended."""
    deadline = time.monotonic() + seconds
    line = b""
    _, stdout = _pipes(process)
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            # Past the buffer of the pipe object: what it had read ahead, the selector would not see.
            chunk = os.read(stdout.fileno(), 65536)
            if not chunk:
                return None
            line += chunk
    return json.loads(line)
