"""Time limits that a process sets for itself."""

from __future__ import annotations

# The signal module itself would add an enum, which takes as long to load as all the rest.
import _signal as signal  # pyright: ignore[reportMissingImports]
import os

_AGAIN_SECONDS = 0.05  # a bare `except:` in a loop may swallow the first interruption


class OutOfTime(BaseException):
    """Interrupts what takes too long."""


def end_after(seconds: float) -> None:
    """Ends this process after some seconds, unless its code prevents that."""
    # A handler, because the first process of a sandbox is immune to signals that nobody handles.
    signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def interrupt_after(seconds: float) -> None:
    """Raises OutOfTime after some seconds, and again, until `stop` is called."""
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), _AGAIN_SECONDS)


def stop() -> None:
    """Interrupts nothing any more."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    os._exit(1)


def _interrupt(number: int, frame: object) -> None:
    raise OutOfTime
