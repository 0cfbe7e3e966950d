from types import SimpleNamespace

import pytest
import torch

from drift.callbacks import CollapseCallback
from drift.contract import ConfigError


def look(callback: CollapseCallback, *figures: tuple[float, float]) -> list[int]:
    """The steps at which it warned, counted from 0."""
    return [step for step, (reward, timesteps) in enumerate(figures) if callback.look(reward, timesteps)]


def callback(**settings) -> CollapseCallback:
    return CollapseCallback(**{"window": 2, "reward_drop": 0.1, "timestep_drop": 0.1} | settings)


GOOD, BAD = (0.8, 10.0), (0.4, 5.0)


def test_warns_once_where_both_fall():
    # Means of two: (0.8, 10), then (0.6, 7.5): 0.2 and 25 % down.
    assert look(callback(), GOOD, GOOD, BAD, BAD, BAD) == [2]


@pytest.mark.parametrize(
    "later",
    [
        (0.4, 10.0),  # reward alone
        (0.8, 5.0),  # timesteps alone: the policy got faster
        (0.4, 15.0),
        (0.75, 5.0),  # 0.05 is less than the drop
        (0.4, 9.5),  # 5 % fewer timesteps
    ],
)
def test_is_quiet_where_only_one_falls_or_too_little(later: tuple[float, float]):
    assert look(callback(), GOOD, GOOD, *[later] * 5) == []


def test_is_quiet_while_the_policy_gets_better_with_fewer_timesteps():
    figures = [(0.1 * step, 10.0 - step) for step in range(8)]
    assert look(callback(), *figures) == []


def test_compares_with_the_highest_timesteps_not_with_those_of_the_best_reward():
    # Means over ten steps of the quickstart at a learning rate of 5e-4 without KL: timesteps fall first,
    # while the reward still grows. 0.94 - 0.82 = 0.12, and 1.69 timesteps are 38 % fewer than 2.74.
    means = [(0.87, 2.74), (0.92, 1.71), (0.94, 1.49), (0.89, 1.51), (0.88, 1.45), (0.82, 1.69), (0.77, 1.81)]
    assert look(callback(window=1), *means) == [5]


def test_says_nothing_before_the_window_is_full():
    assert look(callback(window=4), GOOD, BAD, BAD) == []


def test_the_message_names_figures_and_remedies():
    found = callback(window=1)
    found.look(*GOOD)
    message = found.look(*BAD)
    remedies = ("model.optimizer.lr", "model.loss.beta", "checkpoint")
    for words in ("from 0.80 to 0.40", "from 10.0 to 5.0", *remedies):
        assert words in message


def test_a_resumed_run_goes_on_comparing():
    before = callback()
    assert look(before, GOOD, GOOD) == []
    after = callback()
    after.load_state_dict(before.state_dict())
    assert look(after, BAD) == [0]
    third = callback()
    third.load_state_dict(after.state_dict())
    assert look(third, BAD, BAD) == []


def test_state_can_be_loaded_without_executing_anything(tmp_path):
    found = callback()
    look(found, GOOD, GOOD)
    torch.save(found.state_dict(), tmp_path / "state.pt")
    again = callback()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state_dict() == found.state_dict()
    assert look(again, BAD) == [0]


def test_looks_at_the_logged_figures():
    found, trainer = callback(window=1), SimpleNamespace(callback_metrics={})
    batch = SimpleNamespace(rollout="a rollout")
    found.on_train_batch_end(trainer, None, None, batch, 0)
    assert not found.recent
    for number, (reward, timesteps) in enumerate((GOOD, BAD)):
        trainer.callback_metrics = {
            "reward/mean": torch.tensor(reward),
            "rollout/timesteps": torch.tensor(timesteps),
        }
        if number == 0:
            found.on_train_batch_end(trainer, None, None, batch, 0)
            # A further update of the same rollout is not looked at again.
            found.on_train_batch_end(trainer, None, None, SimpleNamespace(rollout=None), 1)
            assert list(found.recent) == [pytest.approx(GOOD)]
        else:
            with pytest.warns(UserWarning, match="over-confident collapse"):
                found.on_train_batch_end(trainer, None, None, batch, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, r"collapse\.window is 0"),
        ({"reward_drop": 0}, r"collapse\.reward_drop is 0"),
        ({"timestep_drop": 1}, r"collapse\.timestep_drop is 1"),
        ({"timestep_drop": 0}, r"collapse\.timestep_drop is 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        callback(**settings)
