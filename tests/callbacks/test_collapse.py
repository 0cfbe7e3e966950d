import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drift.callbacks import CheckpointCallback, CollapseCallback, RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
NAMES = {
    "reward": "reward/mean",
    "timesteps": "rollout/timesteps",
    "spread": "reward/spread",
    "kl": "loss/kl",
    "states": "update/noisy_states",
    "skipped": "update/skipped",
}


def trainer_at(step: int = 0, **figures: float) -> SimpleNamespace:
    metrics = {NAMES[name]: torch.tensor(value) for name, value in figures.items()}
    return SimpleNamespace(
        callback_metrics=metrics, global_step=step, checkpoint_callbacks=[], should_stop=False
    )


def end_step(
    callback: CollapseCallback, trainer: SimpleNamespace, rollout: object = "a rollout"
) -> list[str]:
    """What it warned of at the end of a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback.on_train_batch_end(trainer, None, None, SimpleNamespace(rollout=rollout), 0)
    return [str(warning.message) for warning in caught]


def look(callback: CollapseCallback, *figures: tuple[float, float]) -> list[int]:
    """The steps at which it warned, counted from 0."""
    return [
        step
        for step, (reward, timesteps) in enumerate(figures)
        if end_step(callback, trainer_at(reward=reward, timesteps=timesteps))
    ]


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
    remedies = ("model.optimizer.lr", "model.loss.beta")
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


def test_looks_once_at_each_rollout_and_only_where_it_was_measured():
    found = callback(window=1)
    assert end_step(found, trainer_at()) == []
    assert not found.recent
    good = trainer_at(reward=GOOD[0], timesteps=GOOD[1])
    end_step(found, good)
    end_step(found, good, rollout=None)  # a further update of the same rollout
    assert list(found.recent) == [pytest.approx(GOOD)]


def test_warns_where_rewards_no_longer_differ():
    found = callback(window=2, min_spread=0.1)
    steps = [0.5, 0.2, 0.05, 0.1, 0.0]
    said = [end_step(found, trainer_at(reward=1.0, timesteps=4.0, spread=share)) for share in steps]
    # Means of two: 0.35, 0.125, 0.075.
    assert [len(messages) for messages in said] == [0, 0, 0, 1, 0]
    assert "over the last 2 steps 92% of the groups had equal rewards, 1.00 in the mean" in said[3][0]
    assert "rollout.group_size" in said[3][0]


def test_warns_where_the_policy_is_far_from_the_reference():
    found = callback(window=2, kl_limit=0.5)
    steps = [
        {"kl": 0.3, "states": 9.0},
        {"kl": 9.0, "states": 0.0},  # nothing was scored
        {"kl": 9.0, "states": 9.0, "skipped": 1.0},  # figures of an earlier step
        {"kl": 0.6, "states": 9.0, "skipped": 0.0},
        {"kl": 0.625, "states": 9.0, "skipped": 0.0},
    ]
    said = [end_step(found, trainer_at(**figures), rollout=None) for figures in steps]
    # Means of two: 0.45, and 0.6125.
    assert [len(messages) for messages in said] == [0, 0, 0, 0, 1]
    assert "loss/kl was 0.613 nats per token, above collapse.kl_limit of 0.5" in said[4][0]


@pytest.mark.parametrize("kind", ["overconfidence", "no_spread", "high_kl"])
@pytest.mark.parametrize("action", ["warn", "stop", "ignore"])
def test_every_kind_has_its_action(kind: str, action: str):
    others = dict.fromkeys({"overconfidence", "no_spread", "high_kl"} - {kind}, "ignore")
    found = callback(window=1, **others, **{kind: action})
    end_step(found, trainer_at(reward=0.8, timesteps=10.0, spread=0.5, kl=0.0, states=9.0))
    trainer = trainer_at(7, reward=0.4, timesteps=5.0, spread=0.0, kl=3.0, states=9.0)
    said = end_step(found, trainer)
    words = {"overconfidence": "over-confident", "no_spread": "equal rewards", "high_kl": "loss/kl"}[kind]
    assert len(said) == (action != "ignore")
    assert trainer.should_stop == (action == "stop")
    if action != "ignore":
        assert words in said[0]
        assert "there is no checkpoint of an earlier validation" in said[0]
    assert (found.stopped is not None) == (action == "stop")
    if action == "stop":
        assert found.stopped == f"step 7: {said[0]}"


class AllEqual(PerSampleReward):
    def score(self, completion, problem):
        return 0.25


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer):
    def run(steps: int, collapse: CollapseCallback, reward=None, ckpt_path=None, **settings):
        spread_task.reward = reward or spread_task.reward
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        checkpoint = CheckpointCallback(every=100)
        trainer = make_trainer(
            steps, callbacks=[rollout, collapse, checkpoint], enable_checkpointing=True, **settings
        )
        module = RLDFModule(
            str(tiny_folder),
            loss=LossConfig(beta=0.1),
            optimizer=OptimizerConfig(lr=1e-2),
            micro_batch_size=9,
        )
        data = PromptDataModule(spread_task, prompts_per_step=2, num_validation=1)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def test_a_stop_leaves_a_checkpoint_and_names_the_best(train, tmp_path: Path):
    collapse = callback(window=3, no_spread="stop")
    trainer = train(9, collapse, AllEqual(), limit_val_batches=1.0, val_check_interval=2)
    assert trainer.global_step == 3
    assert collapse.stopped.startswith(
        "step 3: over the last 3 steps 100% of the groups had equal rewards, 0.25"
    )
    assert str(tmp_path) in collapse.stopped
    assert collapse.stopped.endswith("best.ckpt (val/accuracy 0.000)")
    last = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 3
    # Unlike early stopping, which a later start has nothing to add to.
    assert not saved["drift_run"]["stopped_early"]

    # What restarts by itself must not train on; whoever changes the setting may.
    with pytest.raises(ConfigError, match=r"was stopped: step 3: .*set collapse\.no_spread to warn"):
        train(9, callback(window=3, no_spread="stop"), AllEqual(), ckpt_path=last)
    again = callback(window=3)
    assert train(5, again, AllEqual(), ckpt_path=last).global_step == 5
    assert again.stopped is None


def test_the_figures_of_a_real_run_are_seen(train):
    # A learning rate of 0.01 takes the policy far away at once; most groups have spread.
    collapse = callback(window=2, kl_limit=1e-3, high_kl="stop", min_spread=0.4, no_spread="stop")
    assert train(9, collapse).global_step < 9
    assert "loss/kl was" in collapse.stopped
    assert len(collapse.spreads) == min(2, len(collapse.kls))
    assert max(collapse.spreads) > 0.4


def test_the_command_fails_where_a_run_is_stopped(tiny_folder: Path, tmp_path: Path):
    arguments = [
        "fit", "--config=quickstart", f"--model.policy={tiny_folder}", "--trainer.max_steps=9",
        "--trainer.logger.init_args.save_dir=runs", "--data.prompts_per_step=2", "--data.num_validation=2",
        "--rollout.group_size=2", "--collapse.window=2", "--collapse.no_spread=stop",
        "--progress.refresh_rate=0", "--doctor.enabled=false",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "drift", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # A random policy solves no sudoku.
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("drift: stopped: step 2: over the last 2 steps 100% of")
    assert "--- summary ---" in done.stdout
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, r"collapse\.window is 0"),
        ({"reward_drop": 0}, r"collapse\.reward_drop is 0"),
        ({"timestep_drop": 1}, r"collapse\.timestep_drop is 1"),
        ({"timestep_drop": 0}, r"collapse\.timestep_drop is 0"),
        ({"min_spread": 1.0}, r"collapse\.min_spread is 1\.0: set it in \[0, 1\)"),
        ({"kl_limit": 0.0}, r"collapse\.kl_limit is 0\.0: set it to a positive number of nats"),
        ({"kl_limit": float("nan")}, r"collapse\.kl_limit is nan"),
        ({"high_kl": "off"}, r"collapse\.high_kl is 'off': choose one of warn, stop, ignore"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        callback(**settings)
