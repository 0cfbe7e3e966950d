import time

import pytest

from drift.contract import ConfigError, Problem
from drift.rewards import FormatReward

PROBLEM = Problem(prompt="", answer="")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think> 5", 1.0),  # "." spans lines, and the match need not begin the text
        ("well <think></think>", 1.0),
        ("</think><think>", 0.0),
        ("", 0.0),
        ("\x00\ud800", 0.0),
    ],
)
def test_the_pattern_is_searched(completion: str, reward: float):
    assert FormatReward("<think>.*</think>")([completion], [PROBLEM]).tolist() == [reward]


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(?:x+x+)+y"])
def test_a_pattern_that_would_take_for_ever_finds_nothing(pattern: str):
    start = time.monotonic()
    rewards = FormatReward(pattern, timeout_seconds=0.1)(
        ["a" * 60 + "!", "x" * 5000, "aa xxy"], [PROBLEM] * 3
    )
    assert rewards.tolist() == [0.0, 0.0, float("y" in pattern)]
    assert time.monotonic() - start < 2


def test_the_time_must_be_greater_than_0():
    with pytest.raises(ConfigError, match="timeout_seconds=0 of FormatReward"):
        FormatReward("a", timeout_seconds=0)


def test_a_broken_pattern_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"pattern='\(' is no regular expression: missing \)"):
        FormatReward("(")
