"""Script of a judge process: says whether two mathematical answers are equal, one JSON line a question.

It runs alone, as `python -P math_judge.py`: -P because this folder's math.py would hide the standard
library's. It imports neither drift nor torch, so it starts quickly and stays small. First it writes
{"ready": true}, or {"error": ...} where it cannot work; then it answers each line of the form
{"gold": ..., "answer": ..., "timeout_seconds": ...} by {"equal": ...}. It ends when its input does.

A child answers; where one hangs or crashes, the parent says "not equal" and forks the next one, which has all
libraries loaded: that takes milliseconds, and a new start seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_MAX_BYTES = 2 * 1024**3  # answers such as 10^(10^10) would otherwise take all memory there is
# Delimiters inside an answer would let it hold several formulas, of which only one had to be right.
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_FULL_STOP = re.compile(r"(?<!\\right)\.$")  # "\boxed{18.}" ends a sentence; "\right." is LaTeX


def as_formula(answer: str) -> str:
    """The answer as a single LaTeX formula between dollar signs."""
    formula = " ".join(_DELIMITERS.sub(" ", answer).split())
    return "$" + _FULL_STOP.sub("", formula) + "$"


def is_equal(gold: str, answer: str) -> bool:
    """Whether math-verify holds the two LaTeX answers for equal."""
    from math_verify import LatexExtractionConfig, parse, verify

    # math-verify's own time limits are off (0): they rely on signals and cannot stop a long computation in C.
    config = [LatexExtractionConfig()]
    parsed_gold = parse(as_formula(gold), config, parsing_timeout=0)
    parsed_answer = parse(as_formula(answer), config, parsing_timeout=0)
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=0))


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    except (ImportError, ValueError, OSError):
        return  # not every system has it; the time limit still holds


def _set_alarm(seconds: float) -> None:
    """Ends this process after so many seconds, in C code too; 0 for never."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _judge(line: bytes) -> bool:
    question = json.loads(line)
    _set_alarm(question["timeout_seconds"])
    try:
        return is_equal(question["gold"], question["answer"])
    except Exception:  # whatever an answer provokes in the parser, it is not equal
        return False
    finally:
        _set_alarm(0)


def _serve(reply: Callable[..., None]) -> NoReturn:
    try:
        # Without a buffer: the next child goes on with the line behind.
        for line in os.fdopen(0, "rb", buffering=0):
            reply(equal=_judge(line))
    finally:
        os._exit(0)


def main() -> None:
    """Answers questions until the input ends."""
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(**message: bool | str) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    _limit_memory()
    try:
        is_equal("1", "1")  # loads everything, so that no answer pays for it
    except ImportError as error:
        reply(error=str(error))
        return
    reply(ready=True)
    # A child that ends by itself, at the end of its input, ends with status 0.
    while os.waitpid(os.fork() or _serve(reply), 0)[1]:
        reply(equal=False)


if __name__ == "__main__":
    main()
