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


def test_a_broken_pattern_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"pattern='\(' is no regular expression: missing \)"):
        FormatReward("(")
