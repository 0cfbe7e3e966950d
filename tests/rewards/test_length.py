import pytest
import torch

from drift.contract import ConfigError, Problem
from drift.rewards import LengthReward

PROBLEM = Problem(prompt="", answer="")


def test_by_characters():
    # At most 10, falling from 6 on: (6 - length) / 4.
    reward = LengthReward(max_length=10, margin=4, unit="characters")
    texts = ["", "a" * 6, "a" * 7, "\u00e9" * 8, "a" * 10, "a" * 50]
    assert reward(texts, [PROBLEM] * 6).tolist() == [0, 0, -0.25, -0.5, -1, -1]


def test_by_tokens_the_texts_do_not_matter():
    lengths = torch.tensor([0, 6, 8, 20])
    rewards = LengthReward(max_length=10, margin=4).judge(["a" * 99] * 4, [PROBLEM] * 4, lengths)
    assert rewards.tolist() == [0, 0, -0.5, -1]
    assert rewards.dtype == torch.float32


def test_tokens_must_have_been_counted():
    with pytest.raises(ConfigError, match=r"unit='tokens' of LengthReward.*characters"):
        LengthReward(max_length=10, margin=4)(["a"], [PROBLEM])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length=0 "),
        ({"margin": 0}, "margin=0 .*within 1 to max_length=10"),
        ({"margin": 11}, "margin=11 "),
        ({"unit": "words"}, "unit='words' .*tokens"),
    ],
)
def test_impossible_settings(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LengthReward(**{"max_length": 10, "margin": 4, **settings})
