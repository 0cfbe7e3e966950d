"""Processes that may run what a policy wrote: alone, limited, and without a view of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import IO, Literal

from drift.contract import ConfigError
from drift.rewards.inside import candidate, checker, start
from drift.rewards.inside.values import encode
from drift.rewards.sandbox_filter import MACHINES, filter_program
from drift.rewards.sandbox_process import SandboxProcess

SandboxKind = Literal["bwrap", "rlimits"]

_INSIDE = Path(__file__).with_name("inside")
# Importing the roles here compiles them, once for all sandboxes, which may not write.
_MODULES = (candidate, checker, start)
# The same answer must get the same reward every time: sets of texts have the same order in every process.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_START = """
import sys
sys.path.insert(0, {!r})
from inside import start
del sys.path[0]
start.main(sys.argv[1:])
"""
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/sbin", "/nix/store", "/etc/ld.so.cache")
_DISK_BYTES = 16 * 1024**2  # of /tmp, in memory; also of a single file
_STDIN_PATH = "/proc/self/fd/0"  # where /dev/stdin leads; there is no /proc besides
_PROBE_SECONDS = 30
_PROBE = "import os\ntry:\n    os.fork()\nexcept PermissionError:\n    print('alone')\n"
_INSTALL = (
    "install bubblewrap 0.7 or newer (apt install bubblewrap; it needs user namespaces, which some "
    "containers forbid), or set sandbox: rlimits, which only limits time and memory"
)


class Sandbox:
    """Starts processes that limit themselves before they touch foreign code.

    With "bwrap" they see the system's programs and Python, read-only, and an empty /tmp in memory; they
    have no network, see no other process and can start none, and their environment is empty. With "rlimits"
    there are limits on time, memory and file size, and nothing else.

    Args:
        kind: what keeps the processes in.
        memory_megabytes: address space of a process, >= 64.

    Raises:
        ConfigError: an argument is out of its range, or this machine has no such sandbox.
    """

    def __init__(self, kind: SandboxKind = "bwrap", memory_megabytes: int = 512) -> None:
        if memory_megabytes < 64:
            raise ConfigError(
                f"memory_megabytes={memory_megabytes!r} must be at least 64: Python needs that itself"
            )
        if kind not in ("bwrap", "rlimits"):
            raise ConfigError(f"sandbox={kind!r} must be 'bwrap' or 'rlimits'")
        self.kind: SandboxKind = kind
        self.memory_megabytes = memory_megabytes
        if kind == "bwrap":
            _require_bwrap()
            _probe(self)

    def start(
        self,
        role: str,
        stdin: bytes,
        channel: int | bytes,
        cpu_seconds: int,
        output: bool = True,
        errors: IO[bytes] | int = subprocess.DEVNULL,
    ) -> SandboxProcess:
        """A running process; close it, or use it as a context manager.

        Args:
            role: candidate, checker, rehearsal or program, see drift.rewards.inside.start.
            stdin: what it reads.
            channel: file descriptor that it gets besides its input, or the content of such a file.
            cpu_seconds: limit of its computing time, >= 1.
            output: whether anybody will read its output.
            errors: where its error messages go.
        """
        with ExitStack() as stack:
            if isinstance(channel, bytes):
                channel = stack.enter_context(_file(channel)).fileno()
            passed, command, info, folder = [channel], [], None, None
            if self.kind == "bwrap":
                info, info_write = os.pipe()
                rules = _pipe_with(filter_program(platform.machine()))
                stack.callback(os.close, info_write)
                stack.callback(os.close, rules)
                passed += [info_write, rules]
                command = [*_bwrap(), "--info-fd", str(info_write), "--seccomp", str(rules)]
                if role == "program":
                    copy = stack.enter_context(_file(stdin)).fileno()
                    passed.append(copy)
                    command += ["--ro-bind-data", str(copy), _STDIN_PATH]
                command += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
            else:
                folder = tempfile.TemporaryDirectory()
            numbers = [channel, cpu_seconds, self.memory_megabytes * 1024**2, _DISK_BYTES]
            scripts = "/drift" if folder is None else str(_INSIDE.parent)
            home = "/tmp" if folder is None else folder.name
            process = subprocess.Popen(
                [*command, *_python(), "-c", _START.format(scripts), role, *map(str, numbers)],
                stdin=stack.enter_context(_file(stdin)),
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=errors,
                pass_fds=passed,
                env={**_ENVIRONMENT, "HOME": home, "TMPDIR": home},
                cwd="/" if folder is None else folder.name,
                start_new_session=True,
            )
            return SandboxProcess(process, info, folder)


def _file(data: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


def _pipe_with(data: bytes) -> int:
    """The reading end of a pipe that holds some data, less than a pipe's capacity."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def _python() -> list[str]:
    return [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-X", "utf8"]


@cache
def _bwrap() -> tuple[str, ...]:
    """The command up to the arguments that differ between processes."""
    binds: list[str] = []
    for path in dict.fromkeys((*_SYSTEM, sys.base_prefix)):
        if Path(path).is_symlink():
            binds += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists() and not path.startswith("/usr/"):
            binds += ["--ro-bind", path, path]
    # Packages may hold benchmarks with their solutions.
    roots = {Path(sys.base_prefix), Path("/usr"), Path("/usr/local")}
    for path in sorted({str(path) for root in roots for path in root.glob("lib/python3*/*-packages")}):
        binds += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    return (
        shutil.which("bwrap") or "bwrap",
        *("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        # As the first process of its namespace the command is bubblewrap's own child, which it collects.
        # Another one in between would be left to the init of a container, which may collect nobody.
        *("--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"),
        # A signal to its own group would reach bubblewrap, though that is outside.
        "--new-session",
        *binds,
        *("--ro-bind", str(_INSIDE), "/drift/inside"),
        *("--dev", "/dev", "--remount-ro", "/dev"),
        *("--size", str(_DISK_BYTES), "--tmpfs", "/tmp"),
    )


def _require_bwrap() -> None:
    if shutil.which("bwrap") is None:
        raise ConfigError(f"sandbox='bwrap' needs bubblewrap, and there is no program bwrap: {_INSTALL}")
    if platform.machine() not in MACHINES:
        raise ConfigError(f"sandbox='bwrap' knows {MACHINES}, not {platform.machine()!r}: {_INSTALL}")


def _probe(sandbox: Sandbox) -> None:
    """Runs a program that finds out whether it is alone.

    Raises:
        ConfigError: it cannot be run, or isn't alone.
    """
    reason = ""
    with _file(b"") as errors:
        try:
            channel = encode((_PROBE, _PROBE_SECONDS))
            with sandbox.start("program", b"", channel, _PROBE_SECONDS, errors=errors) as process:
                said = process.read(_PROBE_SECONDS, 1000)
        except RuntimeError as error:
            said, reason = None, str(error)
        errors.seek(0)
        reason = errors.read(1000).decode(errors="replace").strip() or reason
    if said != f"{start.GREETING}alone\n".encode():
        raise ConfigError(
            f"sandbox='bwrap' does not work here ({reason or 'it lets processes start'}): {_INSTALL}"
        )
