"""Script of a reasoning-gym process: makes problems and scores answers, one JSON line a question.

It runs alone, as `python -P reasoning_gym_judge.py NAME SETTINGS`, with PYTHONHASHSEED=0: some generators
depend on the order of sets. First it writes {"ready": true}, or {"error": ...} where the generator cannot be
used. It answers {"number": ...} by {"question": ..., "answer": ...}, where the answer may be null, or by
{"failed": ...}; and a line that also has "question", "answer" and "timeout_seconds" by {"score": ...}.

Several verifiers evaluate the answer as Python code. So it is here too, but only where it names nothing but
numbers and functions of mathematics.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import resource
import signal
import sys
from functools import lru_cache
from importlib import import_module
from types import CodeType
from typing import Any

_MAX_BYTES = 4 * 1024**3
_NUM_PROBES = 3
_NONSENSE = ("?!", "no answer")
# What an answer may name: what sympy makes of numbers and letters, and functions. One letter is a symbol.
_HARMLESS = {
    "Integer",
    "Float",
    "Rational",
    "Symbol",
    "Function",
    "factorial",
    "factorial2",
    "pi",
    "oo",
    "erf",
}
_HARMLESS |= {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_HARMLESS |= {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "Abs", "abs"}
_HARMLESS |= {"sympy"}  # its parser runs "from sympy import *" first; what is in the module has a name too


class ForbiddenError(Exception):
    """An answer that is evaluated names something else than mathematics."""


class Generator:
    """A generator of reasoning-gym and its verifier.

    Args:
        name: as reasoning-gym registers it.
        settings: of its configuration.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        gym = import_module("reasoning_gym")
        names = sorted(import_module("reasoning_gym.factory").DATASETS)
        if name not in names:
            near = difflib.get_close_matches(name, names) or names
            raise ValueError(f"there is no generator {name!r}; there are {near}")
        if name == "composite" and "datasets" in settings:
            spec = import_module("reasoning_gym.composite").DatasetSpec
            settings = {**settings, "datasets": [spec(**part) for part in settings["datasets"]]}
        self._make = lambda seed: gym.create_dataset(name, **settings, seed=seed, size=1)
        self._first = self._make(0)
        self._judging = False
        sys.addaudithook(self._audit)

    @lru_cache(maxsize=512)  # noqa: B019 - there is one generator, and it lives as long as the process
    def entry(self, number: int) -> dict[str, Any]:
        """The problem with a number, which alone it depends on.

        A generator draws an item by its seed plus the item's place; one that knows no place beyond its size
        is made anew with the number as its seed.
        """
        try:
            return self._first[number]
        except IndexError:
            return self._make(number)[0]

    def score(self, entry: dict[str, Any], answer: str) -> float:
        """What the verifier gives an answer, 0 to 1; 0 where it raises."""
        self._judging = True
        try:
            score = float(self._first.score_answer(answer, entry=copy.deepcopy(entry)))
        except Exception:  # whatever an answer provokes in the verifier, it is not right
            return 0.0
        finally:
            self._judging = False
        return min(score, 1.0) if 0 < score < math.inf else 0.0

    def require_sound(self) -> None:
        """Raises ValueError where the verifier refuses the generator's own answers, or pays for nonsense."""
        for number in range(_NUM_PROBES):
            entry = self.entry(number)
            own = entry["answer"]
            if isinstance(own, str) and self.score(entry, own) < 1:
                raise ValueError(f"its verifier gives less than 1 to its own answer {own!r}")
            for text in _NONSENSE:
                if self.score(entry, text) >= 1:
                    raise ValueError(f"its verifier gives 1 to the answer {text!r} (its own is {own!r})")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._judging and event == "exec":
            _require_harmless(args[0])


def _require_harmless(code: CodeType) -> None:
    # Modules that are imported late come from files; what is evaluated has no file.
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen"):
        return
    strange = [name for name in code.co_names if len(name) > 1 and name not in _HARMLESS]
    if strange:
        raise ForbiddenError(f"an answer may not name {strange}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _require_harmless(constant)


def _reply(generator: Generator, message: dict[str, Any]) -> dict[str, Any]:
    try:
        entry = generator.entry(message["number"])
    except Exception as error:  # generators give up in many ways
        return {"failed": f"{type(error).__name__}: {error}"}
    if "question" not in message:
        return {"question": entry["question"], "answer": entry["answer"]}
    if entry["question"] != message["question"]:
        return {"failed": "the generator makes another question of the same number than before"}
    # Ends the process, in C code too. Making the problem is not the answer's time.
    signal.setitimer(signal.ITIMER_REAL, message["timeout_seconds"])
    score = generator.score(entry, message["answer"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"score": score}


def main(name: str, settings: str) -> None:
    """Answers questions until the input ends."""
    # What generators print must not end up between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))

    def write(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        generator = Generator(name, json.loads(settings))
        generator.require_sound()
    except Exception as error:
        write({"error": f"{type(error).__name__}: {error}"})
        return
    write({"ready": True})
    for line in sys.stdin:
        write(_reply(generator, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
