import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from drift.rewards.inside.channel import receive, send
from drift.rewards.inside.checker import Clock, check
from drift.rewards.inside.values import decode, encode

TESTS = """
def check(candidate):
    for i in (0, 1):
        if __drift__.open(i):
            try: assert candidate(i) == i
            except: __drift__.fail(i)
            else: __drift__.hold(i)
        __drift__.settle(i)
check(f)
"""


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:

    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours.fileno(), theirs.fileno()


@pytest.fixture(autouse=True)
def no_alarm(monkeypatch: pytest.MonkeyPatch):
    # It would end the process that runs the tests.
    monkeypatch.setattr("drift.rewards.inside.checker.end_after", lambda seconds: None)


def verdicts(ends: tuple[int, int], talk: Callable[[int], None], seconds: float = 5.0) -> list[str]:
    """The checker's lines when something else than a candidate talks to it."""
    lines: list[str] = []
    thread = threading.Thread(target=talk, args=(ends[1],))
    thread.start()
    check(ends[0], [(TESTS, ["f"])], seconds, 2 * seconds, lines.append)
    thread.join()
    return lines


def replies(*messages: bytes) -> Callable[[int], None]:
    def talk(fd: int) -> None:
        send(fd, encode("hello"))
        send(fd, encode(("value", None)))
        for message in messages:
            receive(fd, 5.0)
            send(fd, message)

    return talk


def test_values_are_compared_here(ends: tuple[int, int]):
    talk = replies(encode(("value", 0)), encode(("value", 7)))
    assert verdicts(ends, talk) == ["hello", "pass 0", "fail 1"]


@pytest.mark.parametrize(
    "bad",
    [
        encode(("error", "ValueError", "no")),
        encode(("error", "UnicodeDecodeError", "no")),
        encode(("error", "SystemExit", "0")),
        encode(("error", "print", "no")),
        encode(("error", 3, 4)),
        encode(("error",)),
        encode(("value",)),
        encode(("late",)),
    ],
)
def test_a_bad_reply_fails_one_test(ends: tuple[int, int], bad: bytes):
    assert verdicts(ends, replies(bad, encode(("value", 1)))) == ["hello", "fail 0", "pass 1"]


@pytest.mark.parametrize("bad", [b"", b"x", b"l9\n", encode(5), encode(("pass", 0)), b"l1\n" * 100_000])
def test_what_is_no_reply_fails_all_that_follow(ends: tuple[int, int], bad: bytes):
    assert verdicts(ends, replies(bad)) == ["hello", "fail 0", "fail 1"]


def test_a_message_that_is_too_long_is_not_read(ends: tuple[int, int]):
    def talk(fd: int) -> None:
        replies()(fd)
        receive(fd, 5.0)
        os.write(fd, b"\xff\xff\xff\xff")

    assert verdicts(ends, talk) == ["hello", "fail 0", "fail 1"]


def test_no_reply_in_time_fails_all_that_follow(ends: tuple[int, int]):
    assert verdicts(ends, replies(), seconds=0.1) == ["hello", "fail 0", "fail 1"]


def test_an_answer_that_was_not_loaded_is_not_asked(ends: tuple[int, int]):
    def talk(fd: int) -> None:
        send(fd, encode("hello"))
        send(fd, encode(("error", "SyntaxError", "")))

    assert verdicts(ends, talk) == ["hello"]


def test_without_a_hello_nothing_is_said(ends: tuple[int, int]):
    assert verdicts(ends, lambda fd: send(fd, encode("pass 0"))) == []


def test_the_question_holds_arguments_only(ends: tuple[int, int]):
    asked = []

    def talk(fd: int) -> None:
        replies()(fd)
        for _ in range(2):
            asked.append(decode(receive(fd, 5.0) or b""))
            send(fd, encode(("value", 0)))

    verdicts(ends, talk, seconds=5.0)
    assert [(name, args, kwargs) for name, args, kwargs, _ in asked] == [("f", (0,), {}), ("f", (1,), {})]
    assert all(0 < seconds <= 5.0 for *_, seconds in asked)


def test_after_nonsense_nothing_more_is_asked(ends: tuple[int, int]):
    asked = []

    def talk(fd: int) -> None:
        replies(b"x")(fd)
        asked.append(receive(fd, 0.2))

    assert verdicts(ends, talk) == ["hello", "fail 0", "fail 1"]
    assert asked == [None]


def test_the_clock():
    clock = Clock(2.0, 100.0)
    clock.spend(1.5)
    assert clock.left() == 0.5
    clock.extend(3)  # two tests more
    assert clock.left() == 4.5
    clock.restart()
    assert clock.left() == 2.0
    assert Clock(2.0, 0.0).left() <= 0
