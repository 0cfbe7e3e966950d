"""A running process in its sandbox: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Self

from drift.rewards.inside.checker import HELLO_SECONDS
from drift.rewards.inside.start import GREETING

_KILL_SECONDS = 2.0
_START_SECONDS = 10.0  # of Python, on the busiest machine


class SandboxProcess:
    """A process in its sandbox.

    Args:
        process: the outermost process.
        info: file descriptor from which bubblewrap's report can be read; None without bubblewrap.
        folder: removed at the end.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        info: int | None,
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        self._process = process
        self._info = info
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def require_greeting(self) -> None:
        """Waits until the process begins with its work, and its own time begins.

        Raises:
            RuntimeError: it does not begin, on the busiest machine.
        """
        greeting = GREETING.encode()
        deadline, said = time.monotonic() + HELLO_SECONDS + _START_SECONDS, b""
        # Not a byte more: what follows is foreign code's.
        while said != greeting and (chunk := self._chunk(deadline, len(greeting) - len(said))):
            said += chunk
        if said != greeting:
            raise RuntimeError("a sandboxed process did not start in time: is this machine overloaded?")

    def read(self, seconds: float, max_bytes: int) -> bytes | None:
        """What the process writes until it ends, or until the time is over; None where it is too much.

        Args:
            seconds: how long to wait.
            max_bytes: the most that may come.
        """
        deadline, data = time.monotonic() + seconds, bytearray()
        while chunk := self._chunk(deadline, 65536):
            data += chunk
            if len(data) > max_bytes:
                return None
        return bytes(data)

    def lines(self, seconds: float) -> Iterator[str]:
        """The lines that the process writes, until it ends or is silent for too long.

        Args:
            seconds: the longest silence.
        """
        data = b""
        while chunk := self._chunk(time.monotonic() + seconds, 65536):
            *whole, data = (data + chunk).split(b"\n")
            yield from (line.decode() for line in whole)

    def _chunk(self, deadline: float, max_bytes: int) -> bytes:
        """Some of what the process writes next; nothing where it has ended or the time is over."""
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return b""
        # Past the buffer of the pipe object: what it had read ahead, the selector would not see.
        return os.read(stdout.fileno(), max_bytes)

    def wait(self, seconds: float) -> int | None:
        """The exit status, None where the process is still running.

        Args:
            seconds: how long to wait.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Ends the process and everything it has started.

        Raises:
            RuntimeError: bubblewrap could not make the sandbox: nothing was run.
        """
        started = self._info is None
        with ExitStack() as stack:
            stack.callback(self._process.wait)
            if self._folder is not None:
                stack.callback(self._folder.cleanup)
            if self._process.stdout is not None:
                stack.callback(self._process.stdout.close)
            if self._info is not None:
                stack.callback(os.close, self._info)
                started = self._end_first_process(self._info)
            if self._info is None or self._process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        if not started:
            raise RuntimeError(
                "bubblewrap could not make a sandbox, though it could before: is this machine full?"
            )

    def _end_first_process(self, info: int) -> bool:
        """Whether the sandbox had been made; its end is what ends everything in it.

        Bubblewrap collects that process and ends itself. Were both killed at once, the orphan would be left
        to the init of a container, which may collect nobody.
        """
        running = self._process.poll() is None
        with selectors.DefaultSelector() as selector:
            selector.register(info, selectors.EVENT_READ)
            # A sandbox that is just being made will report, or close the pipe.
            report = os.read(info, 4096) if selector.select(_KILL_SECONDS if running else 0) else b""
        if report and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(json.loads(report)["child-pid"], signal.SIGKILL)
            self.wait(_KILL_SECONDS)
        return bool(report)
