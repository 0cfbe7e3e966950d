import errno
import struct

import pytest

from drift.rewards.sandbox_filter import MACHINES, filter_program

ALLOW, KILL = 0x7FFF0000, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE, MMAP = {"x86_64": 56, "aarch64": 220}, {"x86_64": 9, "aarch64": 222}
THREAD_FLAGS, FORK_FLAGS = 0x3D0F00, 0x1200011  # what the C library passes for each


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the kernel would do with a system call: a small interpreter of the filter."""
    data = struct.pack(
        "=IIQ6Q",
        number,
        AUDIT[machine] if audit is None else audit,
        0,
        *arguments,
        *[0] * (6 - len(arguments)),
    )
    steps = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    place = value = 0
    while True:
        operation, yes, no, operand = steps[place]
        place += 1
        if operation == 0x06:
            return operand
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, operand)
        else:
            true = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[operation]
            place += yes if true else no


def fails(number: int) -> int:
    return 0x00050000 | number


@pytest.mark.parametrize("machine", MACHINES)
def test_threads_may_start_and_processes_may_not(machine: str):
    assert verdict(machine, CLONE[machine], THREAD_FLAGS) == ALLOW
    assert verdict(machine, CLONE[machine], FORK_FLAGS) == fails(errno.EPERM)
    assert verdict(machine, 435) == fails(errno.ENOSYS)


@pytest.mark.parametrize("machine", MACHINES)
def test_stacks_are_not_small(machine: str):
    stack = 0x20022  # private, anonymous, stack
    assert verdict(machine, MMAP[machine], 0, (1 << 20) - 1, 0, stack) == fails(errno.ENOMEM)
    assert verdict(machine, MMAP[machine], 0, 1 << 20, 0, stack) == ALLOW
    assert verdict(machine, MMAP[machine], 0, 1 << 32, 0, stack) == ALLOW
    assert verdict(machine, MMAP[machine], 0, 4096, 0, 0x22) == ALLOW


@pytest.mark.parametrize(
    ("machine", "read", "denied"),
    [("x86_64", 0, {"fork": 57, "socket": 41, "ptrace": 101, "unshare": 272, "mount": 165, "bpf": 321}),
     ("aarch64", 63, {"socket": 198, "ptrace": 117, "unshare": 97, "mount": 40, "bpf": 280})],
)  # fmt: skip
def test_calls_that_leave_a_sandbox(machine: str, read: int, denied: dict[str, int]):
    assert verdict(machine, read) == ALLOW
    assert {name: verdict(machine, number) for name, number in denied.items()} == dict.fromkeys(
        denied, fails(errno.EPERM)
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_other_ways_to_call_the_kernel_end_the_process(machine: str):
    assert verdict(machine, 0, audit=0x40000003) == KILL  # 32-bit x86
    assert verdict(machine, 0x40000000) == KILL  # x32
