"""Messages over a file descriptor: their length, then their bytes."""

from __future__ import annotations

import os
import select
from time import monotonic

MAX_MESSAGE_BYTES = 1 << 24


def send(fd: int, message: bytes) -> None:
    """Writes a message.

    Raises:
        OSError: nobody reads any more.
    """
    data = memoryview(len(message).to_bytes(4, "big") + message)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int, seconds: float | None = None) -> bytes | None:
    """The next message; None where it is too long, late, or nobody writes any more.

    Args:
        fd: what to read.
        seconds: for how long to wait until all of it is there; None for ever.
    """
    deadline = None if seconds is None else monotonic() + seconds
    head = _read_exactly(fd, 4, deadline)
    if head is None or (size := int.from_bytes(head, "big")) > MAX_MESSAGE_BYTES:
        return None
    return _read_exactly(fd, size, deadline)


def _read_exactly(fd: int, size: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - monotonic()))[0]:
            return None
        try:
            chunk = os.read(fd, min(size - len(data), 1 << 20))
        except ConnectionResetError:
            return None
        if not chunk:
            return None
        data += chunk
    return bytes(data)
