import pytest

from drift.fingerprint import describe, digest, fingerprint, flattened
from drift.rewards import MathReward
from drift.tasks import MathTask, SudokuTask


def test_a_digest_is_of_texts_and_their_borders():
    assert digest(["ab", "c"]) == digest([b"ab", "c"])
    assert len({digest(["ab", "c"]), digest(["a", "bc"]), digest(["abc"]), digest(["c", "ab"])}) == 4


def test_a_fingerprint_does_not_depend_on_the_order_of_settings():
    assert fingerprint({"a": 1, "b": {"c": None, "d": 2}}) == fingerprint({"b": {"d": 2, "c": None}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5}) != fingerprint({"a": None})


class Kept:
    def __init__(self, plain: int = 1, hidden: str = "h", lost: int = 0, num_workers: int = 2) -> None:
        self.plain = plain
        self._hidden = hidden
        self.num_workers = num_workers
        self.later = 5


def test_an_object_is_its_class_and_the_arguments_that_it_keeps():
    found = describe(Kept())
    assert found == {"class": f"{Kept.__module__}.Kept", "plain": 1, "hidden": "h"}


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (None, None),
        ((1, [2.0, "a"]), [1, [2.0, "a"]]),
        ({"a": (True,)}, {"a": [True]}),
        ({"b", "a"}, ["a", "b"]),
        (len, "builtins.len"),
        (Kept, f"{Kept.__module__}.Kept"),
    ],
)
def test_plain_values(thing: object, expected: object):
    assert describe(thing) == expected


def test_settings_of_tasks_and_their_rewards_are_seen():
    base = flattened(describe(MathTask()))
    changed = flattened(describe(MathTask(instruction="", reward=MathReward(timeout_seconds=2))))
    assert {name for name in base if base[name] != changed[name]} == {"instruction", "reward.timeout_seconds"}
    assert describe(SudokuTask(seed=1))["seed"] == 1


def test_flattened():
    assert flattened({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
