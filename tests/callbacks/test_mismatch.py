from types import SimpleNamespace

import pytest
import torch

from drift.callbacks import MismatchCallback
from drift.contract import ConfigError


def look(callback: MismatchCallback, *figures: float) -> list[int]:
    """The steps at which it warned, counted from 0."""
    return [step for step, kl in enumerate(figures) if callback.look(kl)]


def callback(**settings) -> MismatchCallback:
    return MismatchCallback(**{"window": 2, "kl_limit": 0.05, "growth": 3.0} | settings)


def test_warns_once_where_the_mean_of_the_window_is_above_the_limit():
    # Means of two: 0.04, 0.05 (not above it), 0.07.
    assert look(callback(), 0.04, 0.04, 0.06, 0.08, 0.09, 0.09) == [3]


def test_one_step_alone_does_not_decide():
    assert look(callback(window=4), 0.03, 0.03, 0.03, 0.1, 0.03, 0.03) == []


def test_warns_where_it_has_grown_over_the_first_window():
    # Means of two: 0.004, 0.007, 0.0115, 0.013: 3 times 0.004 is 0.012.
    assert look(callback(), 0.004, 0.004, 0.01, 0.013, 0.013) == [4]


@pytest.mark.parametrize(
    "later",
    [
        0.0049,  # fifty times as much, and still below a tenth of the limit
        0.0001,
    ],
)
def test_growth_of_next_to_nothing_is_nothing(later: float):
    assert look(callback(), 0.0001, 0.0001, *[later] * 4) == []
    assert look(callback(), 0.0001, 0.0001, *[0.0051] * 2) == [3]


def test_is_quiet_where_it_is_small_and_steady():
    assert look(callback(), *[0.02] * 10) == []


def test_says_nothing_before_the_window_is_full():
    assert look(callback(window=4), 1.0, 1.0, 1.0) == []


def test_the_message_names_figures_and_remedies():
    message = callback(window=1).look(0.0723)
    remedies = (
        "rollout.decode.use_cache",
        "rollout.decode.horizon",
        "model.loss.importance_cap",
        "trainer.precision",
    )
    for words in ("0.0723 nats", "above mismatch.kl_limit of 0.05", *remedies):
        assert words in message
    found = callback(window=1)
    assert found.look(0.004) is None
    assert "0.02 nats per token over the last 1 steps (0.004 over the first), growing" in found.look(0.02)


def test_a_resumed_run_goes_on_comparing():
    before = callback()
    assert look(before, 0.004, 0.004) == []
    after = callback()
    after.load_state_dict(before.state_dict())
    # (0.004 + 0.02) / 2 is 3 times the first window's mean, and without that window there was nothing to say.
    assert look(after, 0.02) == [0]
    third = callback()
    third.load_state_dict(after.state_dict())
    assert look(third, 0.5, 0.5) == []


def test_state_can_be_loaded_without_executing_anything(tmp_path):
    found = callback()
    look(found, 0.004, 0.004)
    torch.save(found.state_dict(), tmp_path / "state.pt")
    again = callback()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state_dict() == found.state_dict()
    assert look(again, 0.02) == [0]


def test_looks_at_the_logged_figures_of_steps_that_had_some():
    found, trainer = callback(window=1), SimpleNamespace(callback_metrics={})

    def end_of_step(**figures: float) -> None:
        names = {"kl": "mismatch/kl", "states": "update/noisy_states", "skipped": "update/skipped"}
        trainer.callback_metrics = {names[key]: torch.tensor(value) for key, value in figures.items()}
        found.on_train_batch_end(trainer, None, None, None, 0)

    end_of_step(states=24.0)  # not measured
    end_of_step(kl=0.0, states=0.0)  # nothing to measure
    end_of_step(kl=0.5, states=24.0, skipped=1.0)  # figures of the step before
    assert not found.recent
    end_of_step(kl=0.01, states=24.0)
    assert list(found.recent) == [pytest.approx(0.01)]
    with pytest.warns(UserWarning, match=r"mismatch/kl was 0\.2 nats"):
        end_of_step(kl=0.2, states=24.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, r"mismatch\.window is 0: set it to 1 or more"),
        ({"kl_limit": 0.0}, r"mismatch\.kl_limit is 0\.0: set it to a positive number"),
        ({"kl_limit": float("nan")}, r"mismatch\.kl_limit is nan"),
        ({"growth": 1.0}, r"mismatch\.growth is 1\.0: set it to a number above 1"),
        ({"growth": float("nan")}, r"mismatch\.growth is nan"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        callback(**settings)
