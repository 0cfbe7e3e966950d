"""The side of an answer: loads its code, then evaluates calls of its functions, one after the other."""

from __future__ import annotations

import _signal  # what the signal module adds to it, an enum, costs as much as the rest of the process
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .channel import receive, send
from .values import decode, encode

if TYPE_CHECKING:
    from typing import Any

_AGAIN_SECONDS = 0.05  # a bare `except:` in a loop may swallow the first interruption


class OutOfTime(BaseException):
    """Interrupts an answer whose time is up."""


def answer_module(name: str) -> dict[str, Any]:
    """The namespace of a new module, known under its name to those who look for it, such as dataclasses."""
    module = sys.modules[name] = type(sys)(name)
    return module.__dict__


def serve(fd: int, code: str, seconds: float) -> None:
    """Answers calls until nobody asks any more.

    Says "hello" before it touches the code. Then, and to every (name, args, kwargs, seconds), the reply is
    ("value", value), ("late",) or ("error", name of the exception, text).

    Args:
        fd: socket to the checker.
        code: the answer.
        seconds: time to load it.
    """
    namespace = answer_module("answer")
    send(fd, encode("hello"))
    send(fd, _attempt(lambda: exec(compile(code, "answer.py", "exec"), namespace), seconds))
    while (message := receive(fd)) is not None:
        *call, seconds = decode(message)
        send(fd, _attempt(lambda: _call(namespace, *call), seconds))  # noqa: B023


def _call(namespace: dict[str, Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    if name not in namespace:
        raise NameError(f"the answer defines no {name!r}")
    return namespace[name](*args, **kwargs)


def _attempt(action: Callable[[], object], seconds: float) -> bytes:
    try:
        try:
            _signal.signal(_signal.SIGALRM, _interrupt)
            _signal.setitimer(_signal.ITIMER_REAL, max(seconds, 0.001), _AGAIN_SECONDS)
            # Encoding counts as part of the call: it may fail, or run the answer's code for an iterator.
            return encode(("value", action()))
        finally:
            _signal.setitimer(_signal.ITIMER_REAL, 0)
            _signal.signal(_signal.SIGALRM, _signal.SIG_IGN)
    except OutOfTime:
        _signal.setitimer(_signal.ITIMER_REAL, 0)  # it may have come before the timer was stopped
        return encode(("late",))
    except BaseException as error:
        return encode(("error", type(error).__name__, _text(error)))


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return "an error without a text"


def _interrupt(number: int, frame: object) -> None:
    raise OutOfTime
