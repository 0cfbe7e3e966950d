"""A time limit on rewards: one that hangs is interrupted where it stands, and the error says where."""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from drift.contract import ConfigError, HungError, Problem
from drift.rewards import Reward

KEY = "rollout.reward_timeout_seconds"
# After the limit, for code that no signal can interrupt: a call into C that never comes back.
GRACE_SECONDS = 30.0
_STDERR = 2
# The interrupt may be caught on its way, or end up waiting for a thread of the reward: it comes again.
_AGAIN_SECONDS = 1.0


class _Interrupt(BaseException):
    """Raised within the reward; no Exception, for rewards that catch those and give 0."""


def require_limit(seconds: float | None) -> None:
    """Raises ConfigError where a limit is no limit, or cannot be kept in this process.

    Args:
        seconds: the limit; None: there is none.
    """
    if seconds is None:
        return
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{KEY} is {seconds}: set it to a positive number, or null for no limit")
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            f"{KEY} is {seconds}: only the main thread of a process on Linux or macOS can be interrupted; "
            "train there, or set it to null for no limit"
        )


@contextmanager
def reward_limit(
    seconds: float | None, completions: Sequence[str], problems: Sequence[Problem]
) -> Iterator[None]:
    """A context in which rewards judge completions, and no longer than some time.

    What holds the interpreter and takes no signals is ended with the whole process, `GRACE_SECONDS` later;
    Python then prints where every thread was.

    Args:
        seconds: the limit; None: there is none. See `require_limit`.
        completions: [N] what is being judged.
        problems: [N] what they answer.

    Raises:
        HungError: the time was over; it names the reward, the line that it was at and the completion.
    """
    if seconds is None:
        yield
        return
    found: list[HungError] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        found.append(_hung(seconds, frame, completions, problems))
        raise _Interrupt

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, interrupt)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=_STDERR)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
        yield
    except _Interrupt:
        pass  # raised below, as is one that the reward has caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    # The reward may have used the process's one alarm itself, and was not interrupted.
    if not found and time.monotonic() - start > seconds:
        found.append(_hung(seconds, None, completions, problems))
    if found:
        raise found[0]


def _hung(
    seconds: float, frame: FrameType | None, completions: Sequence[str], problems: Sequence[Problem]
) -> HungError:
    name, at, about = "the reward", "", f"{len(completions)} completions"
    sample: dict[str, Any] = {"seconds": seconds}
    frame = _reward_frame(frame)
    if frame is not None:
        name = type(frame.f_locals["self"]).__name__
        at = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        sample |= {"at": at}
        # Where it judges them one by one, the one it is at.
        completion = frame.f_locals.get("completion")
        if completion in completions:
            row = completions.index(completion)
            about = f"completion {row} of {len(completions)}"
            sample |= {"row": row, "prompt": problems[row].prompt, "completion": completion}
    sample |= {"prompts": [problem.prompt for problem in problems], "completions": list(completions)}
    return HungError(
        f"{name} did not come back within {seconds:g} s ({KEY}), with {about}"
        f"{f'; it was at {at}' if at else ''}: a reward must judge whatever the policy writes: mend it, or "
        "raise the limit",
        sample,
    )


def _reward_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost method of a reward at work: what it calls and waits in may be anybody's code."""
    while frame is not None and not isinstance(frame.f_locals.get("self"), Reward):
        frame = frame.f_back
    return frame
