"""The side of an answer: loads its code, then evaluates calls of its functions, one after the other."""

from __future__ import annotations

import builtins
import sys

from .alarm import OutOfTime, interrupt_after, stop
from .channel import receive, send
from .values import decode, encode

TYPE_CHECKING = False  # loading typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def answer_module(name: str) -> dict[str, Any]:
    """The namespace of a new module, known under its name to those who look for it, such as dataclasses."""
    # Python's start without its site module, which is slow, leaves these out.
    builtins.exit = builtins.quit = sys.exit
    module = sys.modules[name] = type(sys)(name)
    return module.__dict__


def serve(fd: int, code: str, seconds: float) -> None:
    """Answers calls until nobody asks any more.

    Says "hello" before it touches the code. Then, and to every (name, args, kwargs, seconds), the reply is
    ("value", value), ("late",) or ("error", name of the built-in exception that it is or extends, text).

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
            interrupt_after(seconds)
            # Encoding counts as part of the call: it may fail, or run the answer's code for an iterator.
            return encode(("value", action()))
        finally:
            stop()
    except OutOfTime:
        stop()  # it may have come just before the first stop
        return encode(("late",))
    except BaseException as error:
        return encode(("error", _kind(error), _text(error)))


def _kind(error: BaseException) -> str:
    # Tests know of exceptions of the answer's own only what these extend.
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return "an error without a text"
