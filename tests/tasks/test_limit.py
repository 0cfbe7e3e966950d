"""A reward that does not come back is interrupted, wherever it hangs, and named."""

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from drift.contract import ConfigError, HungError, Problem
from drift.rewards.base import PerSampleReward, Reward
from drift.tasks import require_limit, reward_limit, score

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS = ["one", "two", "three"]
PROBLEMS = [Problem(prompt=f"question {n}", answer=str(n)) for n in range(3)]
SECONDS = 0.3


class HangingReward(PerSampleReward):
    def __init__(self, hang) -> None:
        self.hang = hang

    def score(self, completion, problem):
        if completion == "two":
            self.hang()
        return 1.0


def loop() -> None:
    while True:
        pass


def match() -> None:
    # 2 ** 60 ways to fail, in C and holding the interpreter.
    re.match(r"(a|a)*$", "a" * 60 + "b")


def acquire() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def swallow() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            return


def wait_for_a_thread() -> None:
    with ThreadPoolExecutor(1) as threads:  # which waits for its thread however the block is left
        threads.submit(time.sleep, 4).result()


@pytest.mark.parametrize(
    "hang",
    [
        loop,
        match,
        acquire,
        swallow,
        wait_for_a_thread,
        lambda: time.sleep(60),
        lambda: subprocess.run(["sleep", "3"], check=False),
    ],
    ids=["loop", "match", "lock", "swallow", "thread", "sleep", "process"],
)
def test_wherever_a_reward_hangs_it_is_interrupted_and_named(hang):
    reward, start = HangingReward(hang), time.monotonic()
    with pytest.raises(HungError) as caught, reward_limit(SECONDS, COMPLETIONS, PROBLEMS):
        score(reward, COMPLETIONS, PROBLEMS)
    assert time.monotonic() - start < 3.5
    message = str(caught.value)
    what = "HangingReward did not come back within 0.3 s (rollout.reward_timeout_seconds)"
    assert message.startswith(f"{what}, with completion 1 of 3; it was at {__file__}:")
    assert " in score: " in message
    sample = caught.value.sample
    assert (sample["row"], sample["completion"], sample["prompt"]) == (1, "two", "question 1")
    assert sample["completions"] == COMPLETIONS


class CatchingReward(Reward):
    """Gives 0 for whatever happens."""

    def __call__(self, completions, problems):
        try:
            time.sleep(60)
        except BaseException:
            return torch.zeros(len(completions))


def test_a_reward_that_catches_everything_gives_no_silent_zero():
    with (
        pytest.raises(HungError, match=r"CatchingReward .*, with 3 completions; it was at"),
        reward_limit(SECONDS, COMPLETIONS, PROBLEMS),
    ):
        score(CatchingReward(), COMPLETIONS, PROBLEMS)


class AlarmingReward(Reward):
    """Uses the one alarm of the process itself, as common judges of mathematics do."""

    def __call__(self, completions, problems):
        signal.alarm(0)
        time.sleep(2 * SECONDS)
        return torch.zeros(len(completions))


def test_a_reward_that_took_too_long_unseen_is_an_error_too():
    with (
        pytest.raises(HungError, match="did not come"),
        reward_limit(SECONDS, COMPLETIONS, PROBLEMS),
    ):
        score(AlarmingReward(), COMPLETIONS, PROBLEMS)


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_reward_in_time_is_left_alone(seconds: float | None):
    before = signal.getsignal(signal.SIGALRM)
    with reward_limit(seconds, COMPLETIONS, PROBLEMS):
        assert score(HangingReward(lambda: None), COMPLETIONS, PROBLEMS).tolist() == [1, 1, 1]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


STUCK = """
import drift.tasks.limit
from drift.rewards.base import Reward

class StuckReward(Reward):
    def __call__(self, completions, problems):
        return sum(range(10**15))  # a loop in C that looks at no signals and holds the interpreter

drift.tasks.limit.GRACE_SECONDS = 0.5
with drift.tasks.limit.reward_limit(0.5, [], []):
    StuckReward()([], [])
"""


def test_what_no_signal_interrupts_ends_the_process_and_shows_the_line():
    done = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "line 7 in __call__" in done.stderr


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(seconds: float):
    with pytest.raises(ConfigError, match=r"rollout\.reward_timeout_seconds is .*or null for no limit"):
        require_limit(seconds)


def test_a_limit_that_cannot_be_kept_is_refused():
    require_limit(1.0)
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(ConfigError, match="only the main thread"):
            threads.submit(require_limit, 1.0).result()
        threads.submit(require_limit, None).result()


THREAD = """
import threading, time
from drift.cli import errors_in_one_line
from drift.rewards.base import Reward
from drift.tasks import reward_limit

class ThreadReward(Reward):
    def __call__(self, completions, problems):
        thread = threading.Thread(target=time.sleep, args=(600,))
        thread.start()
        thread.join()

with errors_in_one_line(), reward_limit(0.5, ["one"], []):
    ThreadReward()(["one"], [])
"""


def test_the_command_does_not_wait_for_threads_of_a_reward_that_hangs():
    done = subprocess.run(
        [sys.executable, "-c", THREAD], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "drift: stopped: ThreadReward did not come back within 0.5 s"
    )
