"""What every rank is at, told to all others, so that those who wait in vain can say for whom."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple

from drift.distributed import rank, ranks_store, world_size

_INTERVAL_SECONDS = 5.0
# A new stage is told at once, so that what was last seen is where a rank stopped.
_GLANCE_SECONDS = 0.1
# Signs that a rank may miss before it is said to give none.
_MISSED = 3


class Stage(NamedTuple):
    """What a rank is doing."""

    name: str
    done: int
    total: int
    since: float  # time.monotonic()


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself every few seconds, also while its main thread waits."""

    stage: str
    step: int
    finished: bool  # and waits for others to finish it, too
    seconds: float  # since the stage was reported, when this was sent
    sent: float  # time.time()
    place: str  # the line that the main thread was at


class RankWatch:
    """Two threads: one exchanges signs with the other ranks, one sees to it that this rank gets on.

    A second one, because the first may itself wait: the store of the signs is in one of the ranks.

    Args:
        timeout_seconds: how long a stage may take, > 0.
        stage: gives the stage of this rank, and the optimizer steps taken.
        on_expiry: called, in a thread, where this rank's stage took longer, with what is known of all ranks.
    """

    def __init__(
        self, timeout_seconds: float, stage: Callable[[], tuple[Stage, int]], on_expiry: Callable[[str], None]
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.interval_seconds = min(_INTERVAL_SECONDS, timeout_seconds / 10)
        self._stage = stage
        self._on_expiry = on_expiry
        self._store = ranks_store(timedelta(seconds=4 * self.interval_seconds))
        self._signs: dict[int, Sign] = {}
        self._trouble = ""
        self._due = 0.0  # when the others are next looked at, time.monotonic()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Starts both threads."""
        for run in (self._exchange, self._look):
            threading.Thread(target=run, daemon=True, name=f"rank watch {run.__name__}").start()

    def stop(self) -> None:
        """Ends both threads, the next time they wake."""
        self._stopped.set()

    def news(self, others_fail_too: bool = True) -> str:
        """The report, after a look at what the others said last.

        Args:
            others_fail_too: waits a moment, in which they may say so.
        """
        if others_fail_too:
            time.sleep(3 * _GLANCE_SECONDS)
        try:
            self._read()
        except RuntimeError as error:
            self._note(error)
        return self.report()

    def report(self) -> str:
        """A line for every rank: first those without a sign, then those that others wait for, by time."""
        signs = {**self._signs, rank(): self._sign()}
        now = time.time()
        lines = []
        for number in range(world_size()):
            sign = signs.get(number)
            if sign is None:
                lines.append((True, True, 0.0, f"rank {number} was never seen"))
                continue
            silent = now - sign.sent
            seconds = silent + sign.seconds
            where = f"stage '{sign.stage}' of step {sign.step}"
            what = f"rank {number} was last seen in {where}, {seconds:.0f} s ago"
            gone = silent > _MISSED * self.interval_seconds
            if gone:
                what += f", and has given no sign for {silent:.0f} s"
            lines.append((gone, not sign.finished, seconds, f"{what} (at {sign.place})"))
        found = [line for *_, line in sorted(lines, reverse=True)]
        if self._trouble:
            found.append(f"what they said last is all that is known: their store fails ({self._trouble})")
        return "\n".join(f"  {line}" for line in found)

    def _sign(self) -> Sign:
        stage, step = self._stage()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        place = "an unknown line"
        if threading.current_thread() is threading.main_thread():
            place = "the error"
        elif frame is not None:
            place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        finished = stage.done >= stage.total
        return Sign(stage.name, step, finished, time.monotonic() - stage.since, time.time(), place)

    def _exchange(self) -> None:
        told = ""
        while not self._stopped.wait(_GLANCE_SECONDS):
            stage, step = self._stage()
            at, now = f"{stage.name} {step}", time.monotonic()
            if at == told and now < self._due:
                continue
            try:
                self._store.set(str(rank()), json.dumps(asdict(self._sign())))
                told = at
                if now >= self._due:
                    self._due = now + self.interval_seconds
                    self._read()
                self._trouble = ""
            except RuntimeError as error:
                self._note(error)

    def _note(self, error: RuntimeError) -> None:
        # Some rank has not started, or the store has gone with its rank: what was known stays known.
        self._trouble = str(error).partition("\n")[0]

    def _read(self) -> None:
        texts = self._store.multi_get([str(number) for number in range(world_size())])
        self._signs = {number: Sign(**json.loads(text)) for number, text in enumerate(texts)}

    def _look(self) -> None:
        while not self._stopped.wait(self.interval_seconds):
            stage, _ = self._stage()
            if time.monotonic() - stage.since >= self.timeout_seconds:
                self._on_expiry(self.report())
                return
