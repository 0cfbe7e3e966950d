"""Signals that ask a run to stop: they are noted when they come, and followed where the state is whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from drift.contract import ConfigError

STOPPING = (signal.SIGINT, signal.SIGTERM)
_NOTICE = (signal.SIGUSR1,)  # SLURM's, by `sbatch --signal=USR1@SECONDS`; SIGTERM follows when time is up
# torchrun and SLURM pass on to the ranks what the ranks have got themselves: one wish, several signals.
_ECHO_SECONDS = 1.0


class Stopped(SystemExit):
    """Training was asked to stop by a signal; the exit status is 128 + its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


class SignalWatch:
    """Notes the first SIGINT, SIGTERM or SIGUSR1; a second SIGINT or SIGTERM ends the process at once.

    Args:
        last_words: called before the process ends at once, with the signal's number.
        also: a further signal to stop at.
    """

    def __init__(self, last_words: Callable[[int], None] | None = None, also: int | None = None) -> None:
        self.last_words = last_words
        self.numbers = {*STOPPING, *_NOTICE, *([] if also is None else [also])}
        self.pending = 0
        self._urgent_since: float | None = None

    def start(self) -> bool:
        """Takes over the signals; False in any thread but the main one, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in self.numbers:
            signal.signal(number, self._note)
        return True

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        urgent = number in STOPPING
        if urgent and self._urgent_since is not None:
            if now - self._urgent_since >= _ECHO_SECONDS:
                self._end(number)
            return
        if urgent:
            self._urgent_since = now
        if not self.pending:
            self.pending = number
            name = signal.Signals(number).name
            text = f"\ndrift: {name}: saving a checkpoint, then stopping (once more: stop at once)\n"
            os.write(2, text.encode())  # print may be in the middle of a line of its own

    def _end(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self.last_words is not None:
            self.last_words(number)
        os.kill(os.getpid(), number)


def requeue_signal(environment: Any) -> int | None:
    """The signal on which a job is to be put back into SLURM's queue; None where it is not to be."""
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal or signal.SIGUSR1
    return None


def requeue_job() -> str:
    """Puts this job back into SLURM's queue; gives back its id.

    Raises:
        ConfigError: where SLURM refuses.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID", "") if array is None else f"{array}_{task}"
    if not re.fullmatch(r"[0-9_-]+", job):
        raise ConfigError(f"SLURM_JOB_ID is {job!r}: it must be the number of the job to be queued again")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise ConfigError(
            f"SLURM job {job} could not be put back into the queue: {reason}; submit it again by hand"
        ) from error
    return job
