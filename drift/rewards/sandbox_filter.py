"""The system calls that a sandboxed process may not make, as a program for the kernel (seccomp).

A sandboxed process is alone: without fork, its limits of memory and time are those of the whole answer, for
root too, whom the kernel exempts from limits on the number of processes. It gets no sockets, no shared
memory, and none of the calls by which sandboxes have been left.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_LOAD, _IS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in the kernel's struct seccomp_data
_FIRST_X32_CALL = 0x40000000  # x86-64 knows every call a second time, with 32-bit pointers
_CLONE_THREAD = 0x10000
_MAP_STACK = 0x20000
_MIN_STACK_BYTES = 1 << 20  # bounds the number of threads by the limit of memory
_CLONE3 = 435  # on every machine


@dataclass(frozen=True, slots=True)
class _Machine:
    """System call numbers of a processor family."""

    audit: int  # the kernel's name of it
    clone: int
    mmap: int
    denied: tuple[int, ...]


# Denied are, a line each: fork, vfork (x86-64 only); socket, shmget, msgget, semget, mq_open, memfd_create;
# ptrace, process_vm_readv, process_vm_writev; unshare, setns, mount, umount2, pivot_root, chroot,
# open_by_handle_at; bpf, perf_event_open, userfaultfd; add_key, request_key, keyctl; init_module,
# finit_module, kexec_load; and with the same numbers everywhere io_uring_setup, open_tree, move_mount,
# fsopen, mount_setattr.
_EVERYWHERE = (425, 428, 429, 430, 442)
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E,
        56,
        9,
        (
            *(57, 58),
            *(41, 29, 68, 64, 240, 319),
            *(101, 310, 311),
            *(272, 308, 165, 166, 155, 161, 304),
            *(321, 298, 323),
            *(248, 249, 250),
            *(175, 313, 246),
            *_EVERYWHERE,
        ),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        220,
        222,
        (
            *(198, 194, 186, 190, 180, 279),
            *(117, 270, 271),
            *(97, 268, 40, 39, 41, 51, 265),
            *(280, 241, 282),
            *(217, 218, 219),
            *(105, 273, 104),
            *_EVERYWHERE,
        ),
    ),
}
MACHINES = tuple(_MACHINES)


def filter_program(machine: str) -> bytes:
    """The filter for a machine, as bubblewrap reads it.

    Args:
        machine: one of `MACHINES`, as `platform.machine()` says it.
    """
    return b"".join(struct.pack("=HBBI", *step) for step in _steps(_MACHINES[machine]))


def _steps(machine: _Machine) -> Iterator[tuple[int, int, int, int]]:
    """(operation, steps to skip if true, steps to skip if false, operand) each."""

    def fail(number: int) -> tuple[int, int, int, int]:
        return _RETURN, 0, 0, _ERRNO | number

    yield _LOAD, 0, 0, _MACHINE
    yield _IS, 1, 0, machine.audit
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _NUMBER
    yield _AT_LEAST, 0, 1, _FIRST_X32_CALL
    yield _RETURN, 0, 0, _KILL
    for call in machine.denied:
        yield _IS, 0, 1, call
        yield fail(errno.EPERM)
    yield _IS, 0, 1, _CLONE3
    yield fail(errno.ENOSYS)  # its flags cannot be seen from here; the C library then uses clone
    yield _IS, 0, 4, machine.clone
    yield _LOAD, 0, 0, _ARGUMENTS
    yield _ANY_BIT, 1, 0, _CLONE_THREAD
    yield fail(errno.EPERM)
    yield _RETURN, 0, 0, _ALLOW
    yield _IS, 0, 7, machine.mmap
    yield _LOAD, 0, 0, _ARGUMENTS + 3 * 8
    yield _ANY_BIT, 0, 5, _MAP_STACK
    yield _LOAD, 0, 0, _ARGUMENTS + 8 + 4
    yield _IS, 0, 3, 0
    yield _LOAD, 0, 0, _ARGUMENTS + 8
    yield _AT_LEAST, 1, 0, _MIN_STACK_BYTES
    yield fail(errno.ENOMEM)
    yield _RETURN, 0, 0, _ALLOW
