import pytest

from drift.contract import ConfigError
from drift.rollout import DenoiseConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 0}, r"block_length is 0: set it to 1 or more"),
        (
            {"score": "entropy"},
            r"score is 'entropy': choose one of \['confidence', 'margin', 'neg_entropy', 'random'",
        ),
        (
            {"block_opening": "last"},
            r"block_opening is 'last': choose one of \['confidence', 'first_token'\]",
        ),
        ({"temperature": -0.1}, r"temperature is -0.1: set it to 0"),
        ({"temperature": float("inf")}, r"temperature is inf: set it to 0"),
        ({"temperature": float("nan")}, r"temperature is nan: set it to 0"),
        ({"top_p": 0.0}, r"top_p is 0.0: set it in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1.1: set it in \(0, 1\]"),
        ({"top_k": 0}, r"top_k is 0: set it to 1 or more"),
        ({"horizon": -1}, r"horizon is -1: set it to 0 or more"),
        ({"steps": 0}, r"steps is 0: set it to 1 or more"),
        (
            {"threshold": None},
            r"steps is None: a static schedule \(commit: static, or threshold: null\) needs a number",
        ),
        ({"commit": "static"}, r"steps is None: a static schedule"),
        ({"commit": "random"}, r"commit is 'random': choose one of \['threshold', 'static', 'stochastic'\]"),
        ({"commit_by": "best"}, r"commit_by is 'best': choose one of \['candidate', 'top'\]"),
        (
            {"commit_by": "top", "score": "margin"},
            r"commit_by is 'top': .* score is 'margin': set it to null",
        ),
        ({"width": 0.0}, r"width is 0.0: set it above 0"),
        ({"width": float("nan")}, r"width is nan: set it above 0"),
        (
            {"commit": "stochastic", "threshold": None},
            r"threshold is None: commit: stochastic needs a number",
        ),
        ({"commit": "stochastic", "score": "margin"}, r"score is 'margin': commit: stochastic draws by"),
        ({"commit": "stochastic", "commit_by": "candidate"}, r"commit_by is 'candidate': with commit: stoch"),
        ({"threshold": 0.0}, r"threshold is 0.0: set it in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold is 1.5: set it in \(0, 1\]"),
        ({"threshold": float("nan")}, r"threshold is nan: set it in \(0, 1\]"),
        ({"threshold": 0.5, "score": "neg_entropy"}, r"threshold is 0.5: scores are negative entropies"),
        ({"threshold": -0.5, "score": "margin"}, r"threshold is -0.5: set it in \(0, 1\]"),
    ],
)
def test_a_value_outside_its_range_is_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        DenoiseConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1.0, "top_k": 1, "horizon": 0, "block_length": 1},
        {"threshold": 1.0},
        {"threshold": 0.0, "score": "neg_entropy"},
        {"threshold": None, "steps": 1, "block_length": 256},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(settings: dict):
    DenoiseConfig(**settings).require_fits(256)


@pytest.mark.parametrize("length", [0, 10, 33, -32])
def test_the_completion_must_be_whole_blocks(length: int):
    with pytest.raises(
        ConfigError, match=f"completion_length is {length}, block_length is 32: .* a multiple"
    ):
        DenoiseConfig(block_length=32).require_fits(length)


@pytest.mark.parametrize(
    ("block_length", "steps", "opening", "quotas"),
    [
        # 7 steps over 3 blocks: 3, 2, 2; then 4 positions over 3 steps: 2, 1, 1.
        (4, 7, "confidence", [[2, 1, 1], [2, 2], [2, 2]]),
        (4, 3, "confidence", [[4], [4], [4]]),
        (12, 5, "confidence", [[3, 3, 2, 2, 2]]),
        # More steps than positions: the last ones have nothing left to do.
        (4, 15, "confidence", [[1, 1, 1, 1, 0]] * 3),
        # The opening takes one position and one step, the rest is spread over the others.
        (4, 7, "first_token", [[1, 2, 1], [1, 3], [1, 3]]),
        (1, 12, "first_token", [[1]] * 12),
    ],
)
def test_quotas(block_length: int, steps: int, opening: str, quotas: list[list[int]]):
    config = DenoiseConfig(block_length=block_length, threshold=None, steps=steps, block_opening=opening)
    assert config.quotas(12) == quotas
    assert [sum(block) for block in quotas] == [block_length] * (12 // block_length)


@pytest.mark.parametrize(("steps", "opening", "least"), [(2, "confidence", 3), (5, "first_token", 6)])
def test_too_few_steps_for_the_blocks(steps: int, opening: str, least: int):
    config = DenoiseConfig(block_length=4, threshold=None, steps=steps, block_opening=opening)
    with pytest.raises(
        ConfigError, match=f"steps is {steps}: 3 blocks .* need at least {least}; raise steps"
    ):
        config.require_fits(12)


def test_a_dynamic_schedule_needs_no_steps():
    DenoiseConfig(threshold=0.9, steps=None).require_fits(64)
    with pytest.raises(ConfigError, match="steps is None"):
        DenoiseConfig(threshold=0.9, steps=None).quotas(64)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({}, "threshold"),
        ({"threshold": None, "steps": 4}, "static"),
        ({"commit": "static", "steps": 4}, "static"),
        ({"commit": "stochastic"}, "stochastic"),
    ],
)
def test_what_commits_is_what_is_set_or_what_fits(settings: dict, rule: str):
    config = DenoiseConfig(**settings)
    assert config.rule == rule
    assert (config.least_score is None) == (rule == "static")
    assert config.draws == (rule == "stochastic")
