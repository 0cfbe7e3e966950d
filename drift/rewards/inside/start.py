"""Where a sandboxed process starts: limits itself, then plays its role."""

from __future__ import annotations

import os
import resource
import sys

from .alarm import end_after
from .values import decode

GREETING = "hello\n"  # before foreign code can write anything

TYPE_CHECKING = False  # loading typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Plays a role until the input or the time ends.

    Args:
        arguments: the role (candidate, checker, rehearsal or program), the file descriptor of its socket (of
            its code, for a program), and the limits: seconds of CPU time, bytes of memory, bytes of a file.
    """
    role, *numbers = arguments
    fd, cpu_seconds, memory_bytes, file_bytes = (int(number) for number in numbers)
    _limit(cpu_seconds, memory_bytes, file_bytes)
    if role == "program":
        _run_program(fd)
    elif role == "candidate":
        from .candidate import serve

        code, seconds = _payload(0)
        _silence(0, 1, 2)
        serve(fd, code, seconds)
    else:
        from . import checker

        task = _payload(0)
        lines = os.dup(1)
        _silence(0, 1, 2)
        if role == "rehearsal":
            problems, seconds = task
            checker.rehearse(problems, seconds, lambda line: _put(lines, line))
        else:
            scripts, seconds, total_seconds = task
            checker.check(fd, scripts, seconds, total_seconds, lambda line: _put(lines, line))


def _run_program(fd: int) -> None:
    from .candidate import answer_module

    code, seconds = _payload(fd)
    sys.argv[:] = ["answer.py"]
    os.write(1, GREETING.encode())
    end_after(seconds)
    exec(compile(code, "answer.py", "exec"), answer_module("__main__"))


def _limit(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lower, lower))


def _payload(fd: int) -> tuple:
    data = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
    if fd:
        os.close(fd)
    return decode(data)


def _silence(*fds: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def _put(fd: int, line: str) -> None:
    os.write(fd, line.encode() + b"\n")
