from types import SimpleNamespace

import pytest

from drift.callbacks import FeedbackCallback
from drift.contract import ConfigError
from drift.module import RLDFModule


class Module(RLDFModule):
    def __init__(self, num_updates: int) -> None:
        self.__dict__.update(num_updates=num_updates, refreshed=[])

    def refresh_feedback(self) -> None:
        self.refreshed.append(self.update)


@pytest.mark.parametrize(
    ("every", "num_updates", "expected"),
    [
        (1, 1, []),  # nothing follows a single update
        (1, 4, [0, 1, 2]),  # not after the last: a new rollout comes
        (2, 4, [1]),
        (2, 6, [1, 3]),
        (5, 4, []),
    ],
)
def test_refreshes_between_the_updates_of_a_rollout(every: int, num_updates: int, expected: list[int]):
    callback, module = FeedbackCallback(every), Module(num_updates)
    for update in range(num_updates):
        module.__dict__["update"] = update
        callback.on_train_batch_end(None, module, None, SimpleNamespace(update=update), 0)
    assert module.refreshed == expected


def test_leaves_other_modules_alone():
    FeedbackCallback().on_train_batch_end(None, object(), None, SimpleNamespace(update=0), 0)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match=r"feedback\.every is 0: set it to 1 or more updates"):
        FeedbackCallback(0)
