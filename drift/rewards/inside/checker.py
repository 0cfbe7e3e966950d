"""The side of the tests: runs them with stand-ins for the functions of an answer, and writes the verdicts.

The tests were rewritten by drift.rewards.code_tests: they report to an object named `__drift__`.
"""

from __future__ import annotations

import builtins
from time import monotonic

from .alarm import end_after
from .channel import receive, send
from .values import decode, encode

TYPE_CHECKING = False  # loading typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

HELLO_SECONDS = 30.0  # to start the candidate's process, on the busiest machine
GRACE_SECONDS = 0.4  # a candidate interrupts its own calls in time, unless its code prevents that
END_SECONDS = 0.6  # after the answer's time: for what the tests do with what it gave


class Gone(BaseException):
    """The answer's process has ended or its time is up. No `except Exception` in a test may catch that."""


class AnswerError(Exception):
    """The answer raised an exception that is none of Python's own."""


class Clock:
    """The time that the answer has left, in seconds.

    Args:
        seconds: for each test.
        total_seconds: for all of them.
    """

    def __init__(self, seconds: float, total_seconds: float) -> None:
        self.seconds = seconds
        self._left = seconds
        self._end = monotonic() + total_seconds

    def left(self) -> float:
        """The time left for the next call; 0 or less where there is none."""
        return min(self._left, self._end - monotonic())

    def spend(self, seconds: float) -> None:
        """Takes the time of a call away."""
        self._left -= seconds

    def restart(self) -> None:
        """Gives a new test its time."""
        self._left = self.seconds

    def extend(self, num_tests: int) -> None:
        """Gives several tests that run as one their time together."""
        self._left += self.seconds * (num_tests - 1)


class Answer:
    """The functions of a candidate, called through its socket. The candidate gets copies of the arguments.

    Args:
        fd: the socket.
        clock: what limits the calls.
    """

    def __init__(self, fd: int, clock: Clock) -> None:
        self._fd = fd
        self._clock = clock
        self._alive = True

    def load(self) -> bool:
        """Whether the answer's code was loaded."""
        try:
            self._reply(self._clock.left())
        except (Gone, Exception):
            return False
        return True

    def function(self, name: str) -> Callable[..., Any]:
        """The stand-in for a function of the answer."""
        return lambda *args, **kwargs: self._call(name, args, kwargs)

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seconds = self._clock.left()
        if not self._alive or seconds <= 0:
            raise Gone
        message = encode((name, args, kwargs, seconds))
        start = monotonic()
        try:
            send(self._fd, message)
            return self._reply(seconds)
        except OSError as error:
            self._alive = False
            raise Gone from error
        finally:
            self._clock.spend(monotonic() - start)

    def _reply(self, seconds: float) -> Any:
        message = receive(self._fd, seconds + GRACE_SECONDS)
        try:
            kind, *content = ("gone",) if message is None else decode(message)
        except Exception:  # the candidate wrote it, and may have written anything
            kind, content = "gone", []
        if kind == "value":
            return content[0]
        if kind == "error":
            raise _exception(*content)
        self._alive = kind == "late"
        raise Gone


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    # An end of iteration would cut tests such as `all(map(candidate, cases))` short.
    ends = (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
        try:
            return kind(text)
        except TypeError:  # some need more than a text
            return AnswerError(f"{name}: {text}")
    return AnswerError(f"{name}: {text}")


class Verdicts:
    """What the tests report to, as `__drift__`; writes "pass N" and "fail N", the latter for good.

    Args:
        clock: started anew for every test.
        put: takes a line.
    """

    def __init__(self, clock: Clock, put: Callable[[str], None]) -> None:
        self._clock = clock
        self._put = put
        self._held: set[int] = set()
        self._failed: set[int] = set()

    def begin(self, num_tests: int) -> None:
        """Several tests follow that share their time."""
        self._clock.extend(num_tests)

    def open(self, test: int) -> bool:
        """Whether the test must be run: one that failed before need not."""
        return test not in self._failed

    def hold(self, test: int) -> None:
        """The assertion was true this time."""
        self._held.add(test)

    def fail(self, test: int) -> None:
        """The assertion was false, or could not be evaluated."""
        if test not in self._failed:
            self._failed.add(test)
            self._put(f"fail {test}")

    def settle(self, *tests: int) -> None:
        """The tests were run to their end."""
        for test in tests:
            if test in self._held and test not in self._failed:
                self._put(f"pass {test}")
        self._clock.restart()


def check(
    fd: int,
    scripts: Sequence[tuple[str, Sequence[str]]],
    seconds: float,
    total_seconds: float,
    put: Callable[[str], None],
) -> None:
    """Runs the tests; puts "hello" once the candidate's process has started, then the verdicts.

    Args:
        fd: socket to the candidate.
        scripts: source of the tests, and the names in it that stand for the answer's functions.
        seconds: time of the answer for one test, and for loading.
        total_seconds: time of the answer for all tests.
        put: takes a line.
    """
    if receive(fd, HELLO_SECONDS) != encode("hello"):
        return
    put("hello")
    # With what the answer gave, the tests may compute too long by themselves.
    end_after(total_seconds + END_SECONDS)
    clock = Clock(seconds, total_seconds)
    answer = Answer(fd, clock)
    if answer.load():
        for source, names in scripts:
            clock.restart()
            namespace = {"__name__": "tests", "__drift__": Verdicts(clock, put)}
            namespace |= {name: answer.function(name) for name in names}
            _run(source, namespace)


def rehearse(
    problems: Sequence[Sequence[tuple[str, Sequence[str]]]], seconds: float, put: Callable[[str], None]
) -> None:
    """Runs tests with an answer that fails at once, so that only the tests themselves can go wrong.

    Puts a line a problem: empty, or what goes wrong whatever the answer is. Tests without end put none.

    Args:
        problems: for each, the scripts as in `check`.
        seconds: time for the tests of one problem.
        put: takes a line.
    """
    put("hello")
    for scripts in problems:
        end_after(seconds)
        put(" ".join(next(filter(None, (_fault(*script) for script in scripts)), "").split()))


def _fault(source: str, names: Sequence[str]) -> str:
    """What goes wrong in a script before it asks the answer for anything; nothing where nothing does."""
    asked: list[str] = []
    failed: list[str] = []

    def ask(*args: Any, **kwargs: Any) -> None:
        asked.append("")
        raise Gone

    clock = Clock(0.0, 0.0)
    verdicts = Verdicts(clock, lambda line: None if asked else failed.append(line))
    namespace = {"__name__": "tests", "__drift__": verdicts} | dict.fromkeys(names, ask)
    try:
        exec(compile(source, "tests.py", "exec"), namespace)
    except BaseException as error:
        if not asked:
            return f"it raises {type(error).__name__}: {error}"[:500]
    return f"assertion {failed[0].split()[1]} is false whatever the answer is" if failed else ""


def _run(source: str, namespace: dict[str, Any]) -> None:
    try:
        exec(compile(source, "tests.py", "exec"), namespace)
    except (Gone, Exception):
        return  # tests that were not run to their end have no verdict, and don't count as passed
