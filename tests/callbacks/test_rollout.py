import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

import drift.callbacks.rollout
from drift.callbacks import RolloutCallback
from drift.contract import ConfigError, HungError, PromptBatch, Rollout, SampleError
from drift.data import PromptDataModule
from drift.models import load_policy, load_tokenizer
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rewards import FormatReward, LengthReward
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig, rollout_groups
from drift.tasks import ExtraReward, SudokuTask

DECODE = DenoiseConfig(block_length=8, threshold=0.5, temperature=1.0)
GREEDY = DenoiseConfig(block_length=16, threshold=0.9)


class Keep(Callback):
    def __init__(self) -> None:
        self.batches: list[PromptBatch] = []
        self.evaluated: list[PromptBatch] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append(batch)


def rollout_callback(**settings) -> RolloutCallback:
    return RolloutCallback(
        **{"group_size": 3, "completion_length": 16, "decode": DECODE, "evaluation": GREEDY} | settings
    )


@pytest.fixture
def train(tiny_folder: Path, spread_task: SudokuTask, make_trainer: Callable[..., Trainer]):
    def run(steps: int, ckpt_path: str | None = None, prompts_per_step: int = 2, trainer=(), **settings):
        keep = Keep()
        module = RLDFModule(str(tiny_folder), optimizer=OptimizerConfig(lr=1e-3))
        data = PromptDataModule(spread_task, prompts_per_step=prompts_per_step, num_validation=3)
        fit = make_trainer(steps, callbacks=[rollout_callback(**settings), keep], **dict(trainer))
        fit.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return keep, fit

    return run


def same(first: Rollout, second: Rollout) -> bool:
    names = ("completion_ids", "step_map", "rewards", "seeds", "correct")
    # Another batch is another order of summation, so that probabilities differ in their last digits.
    alike = torch.allclose(first.token_probs, second.token_probs, rtol=1e-4, atol=1e-6)
    return alike and all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_training_makes_groups_and_evaluation_one_answer_each(train):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1}
    keep, _ = train(1, trainer=settings, evaluation_length=32)
    rollout, evaluated = keep.batches[0].rollout, keep.evaluated[0].rollout
    assert rollout.completion_ids.shape == (6, 16)
    assert evaluated.completion_ids.shape == (3, 32)
    assert rollout.rewards.shape == (6, 1)
    assert not rollout.completion_ids.requires_grad
    assert not rollout.token_probs.is_inference()


def test_training_decodes_by_decode_and_evaluation_by_evaluation(train, monkeypatch):
    seen = []
    real = rollout_groups

    def record(policy, batch, length, config, **settings):
        seen.append((length, config, settings["group_size"]))
        return real(policy, batch, length, config, **settings)

    monkeypatch.setattr(drift.callbacks.rollout, "rollout_groups", record)
    train(1, trainer={"limit_val_batches": 1.0, "val_check_interval": 1}, evaluation_length=32)
    assert seen == [(16, DECODE, 3), (32, GREEDY, 1)]


def test_rollout_is_that_of_the_policy_with_the_tasks_rewards(train, tiny_folder, spread_task):
    keep, _ = train(1, seed=5)
    batch = keep.batches[0]
    expected = rollout_groups(
        load_policy(tiny_folder).eval(), replace(batch, rollout=None), 16, DECODE, group_size=3, seed=5
    )
    assert torch.equal(batch.rollout.completion_ids, expected.completion_ids)
    assert torch.equal(batch.rollout.step_map, expected.step_map)
    tokenizer = load_tokenizer(tiny_folder)
    for row, ids in enumerate(expected.completion_ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        reward = spread_task.reward.score(text, batch.problems[row // 3])
        assert float(batch.rollout.rewards[row, 0]) == pytest.approx(reward)
        assert bool(batch.rollout.correct[row]) == (reward >= 1)


def test_correct_means_a_reward_of_1(train, spread_task):
    class Graded(PerSampleReward):
        def score(self, completion, problem):
            return (0.0, 0.5, 0.999, 1.0)[sum(map(ord, completion)) % 4]

    spread_task.reward = Graded()
    keep, _ = train(1, prompts_per_step=4)
    rollout = keep.batches[0].rollout
    assert set(rollout.correct.tolist()) == {True, False}
    assert rollout.correct.tolist() == [reward == 1 for (reward,) in rollout.rewards.tolist()]


def test_extra_rewards_add_to_the_sum_and_are_logged(train, spread_task):
    class Loud(FormatReward):
        closed = False

        def close(self):
            self.closed = True

    loud = Loud("1")
    keep, trainer = train(
        1,
        extra_rewards=[ExtraReward(loud, 0.5), ExtraReward(LengthReward(max_length=16, margin=16))],
        trainer={"limit_val_batches": 1.0, "val_check_interval": 1},
    )
    rollout, logged = keep.batches[0].rollout, trainer.callback_metrics
    assert rollout.reward_names == ("spread_reward", "loud", "length")
    torch.testing.assert_close(rollout.rewards, rollout.scores * torch.tensor([1.0, 0.5, 1.0]))
    torch.testing.assert_close(rollout.scores[:, 2], -rollout.completion_mask.sum(dim=1) / 16)
    assert torch.equal(rollout.correct, rollout.scores[:, 0] >= 1)
    for i, name in enumerate(rollout.reward_names):
        torch.testing.assert_close(logged[f"reward/{name}"], rollout.scores[:, i].mean())
        validated = keep.evaluated[0].rollout.scores[:, i].mean()
        torch.testing.assert_close(logged[f"val/reward/{name}"], validated)
    assert loud.closed


def test_two_parts_of_one_name_stop_at_once(train):
    extra = [ExtraReward(FormatReward("1")), ExtraReward(FormatReward("2"))]
    with pytest.raises(ConfigError, match="name 'format' for several rewards"):
        train(1, extra_rewards=extra)


def test_a_sample_is_the_same_in_any_batch(train):
    whole, _ = train(1, prompts_per_step=4)
    pieces, _ = train(1, prompts_per_step=4, batch_size=5)
    fewer, _ = train(1, prompts_per_step=2)
    rollout = whole.batches[0].rollout
    assert same(pieces.batches[0].rollout, rollout)
    assert same(fewer.batches[0].rollout, rollout.select(torch.arange(6)))


def test_a_sample_is_the_same_in_any_order(make_policy, make_prompts):
    policy = make_policy()
    ids, mask = make_prompts(5, 9, 2)
    batch = PromptBatch(prompt_ids=ids, prompt_mask=mask, problems=[], positions=torch.tensor([4, 9, 2]))
    turned = replace(
        batch, prompt_ids=ids.flip(0), prompt_mask=mask.flip(0), positions=batch.positions.flip(0)
    )
    first = rollout_groups(policy, batch, 16, DECODE, group_size=2)
    second = rollout_groups(policy, turned, 16, DECODE, group_size=2)
    assert torch.equal(first.completion_ids, second.completion_ids[[4, 5, 2, 3, 0, 1]])


def test_the_members_of_a_group_differ_and_seeds_matter(train):
    first, _ = train(1)
    other, _ = train(1, seed=1)
    ids = first.batches[0].rollout.completion_ids
    assert len({tuple(row) for row in ids[:3].tolist()}) == 3
    assert not torch.equal(ids, other.batches[0].rollout.completion_ids)


def test_samples_of_a_step_are_the_same_after_a_resume(train, tmp_path: Path):
    whole, _ = train(4)
    _, trainer = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    late, _ = train(4, ckpt_path=str(tmp_path / "two.ckpt"))
    assert len(late.batches) == 2
    for found, expected in zip(late.batches, whole.batches[2:], strict=True):
        assert found.positions.tolist() == expected.positions.tolist()
        assert same(found.rollout, expected.rollout)
    assert not same(late.batches[0].rollout, whole.batches[0].rollout)


def test_evaluation_is_the_same_each_time(tiny_folder, make_trainer, spread_task):
    keeps = [Keep(), Keep()]
    for keep, size in zip(keeps, (3, 2), strict=True):
        data = PromptDataModule(spread_task, num_validation=3, evaluation_batch_size=size)
        trainer = make_trainer(callbacks=[rollout_callback(), keep], limit_val_batches=1.0)
        trainer.validate(RLDFModule(str(tiny_folder)), datamodule=data, verbose=False)
    ids = [torch.cat([batch.rollout.completion_ids for batch in keep.evaluated]) for keep in keeps]
    assert torch.equal(*ids)
    assert len(keeps[1].evaluated) == 2


def test_training_logs_what_the_rollout_was_like(train):
    keep, trainer = train(1)
    logged, rollout = trainer.callback_metrics, keep.batches[0].rollout
    torch.testing.assert_close(logged["reward/mean"], rollout.rewards.mean())
    torch.testing.assert_close(logged["reward/accuracy"], rollout.correct.float().mean())
    torch.testing.assert_close(logged["rollout/timesteps"], rollout.num_timesteps.float().mean())
    per_forward = rollout.completion_mask.sum() / rollout.num_timesteps.sum()
    torch.testing.assert_close(logged["rollout/tokens_per_forward"], per_forward)
    assert logged["rollout/seconds"] > 0
    assert logged["reward/seconds"] > 0


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("raises", "raised ZeroDivisionError"),
        ("nan", "gave nan"),
        ("short", r"gave values of shape \[1\] for 6"),
    ],
)
def test_a_reward_that_cannot_judge_stops_training(train, spread_task, problem: str, message: str):
    class BadReward(PerSampleReward):
        def __call__(self, completions, problems):
            if problem == "raises":
                raise ZeroDivisionError
            return torch.full((1 if problem == "short" else len(completions),), torch.nan)

        def score(self, completion, problem):
            raise NotImplementedError

    spread_task.reward = BadReward()
    with pytest.raises(SampleError, match=f"BadReward {message}"):
        train(1)


def test_a_figure_that_a_rollout_does_not_have_is_not_logged_with_it(train, monkeypatch, tmp_path: Path):
    real, calls = RLDFModule.measure, []

    def measure(module, rollout):
        calls.append(1)
        only = {f"collapse/of_{len(calls)}": torch.tensor(7.0)} if len(calls) in (1, 3) else {}
        return {**real(module, rollout), **only}

    monkeypatch.setattr(RLDFModule, "measure", measure)
    _, trainer = train(3, trainer={"logger": CSVLogger(tmp_path)})
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open(newline="") as rows:
        logged = [(row["collapse/of_1"], row["collapse/of_3"]) for row in csv.DictReader(rows)]
    assert logged == [("7.0", ""), ("", ""), ("", "7.0")]
    assert "collapse/of_1" not in trainer.callback_metrics
    assert "collapse/of_3" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("decode", "confident"),
    [
        ({"threshold": 0.7}, 0.7),
        # A difference, nats, a random number, and no threshold: none is a probability.
        ({"threshold": 0.7, "score": "margin"}, 0.9),
        ({"threshold": -0.1, "score": "neg_entropy"}, 0.9),
        ({"threshold": 0.7, "score": "random"}, 0.9),
        ({"threshold": None, "steps": 8}, 0.9),
    ],
)
def test_tokens_are_confident_from_the_threshold_on(train, decode: dict, confident: float):
    keep, trainer = train(1, decode=DenoiseConfig(block_length=8, temperature=1.0, **decode))
    assert trainer.lightning_module.collapse_metrics.confident == confident
    rollout = keep.batches[0].rollout
    valid, sure = rollout.completion_mask, rollout.commit_probs >= confident
    wrong = valid & sure & ~rollout.correct[:, None]
    found = trainer.callback_metrics.get("collapse/confident_wrong", torch.tensor(0.0))
    assert float(found) == pytest.approx(float(wrong.sum() / (valid & sure).sum().clamp(min=1)))
    shares = [value for name, value in trainer.callback_metrics.items() if name.startswith("collapse/share_")]
    assert sum(map(float, shares)) == pytest.approx(1)


def test_a_reward_that_hangs_stops_training(train, spread_task):
    class SlowReward(PerSampleReward):
        def score(self, completion, problem):
            time.sleep(60)
            return 0.0

    spread_task.reward = SlowReward()
    with pytest.raises(
        HungError, match=r"SlowReward did not come back within 0\.5 s .*completion 0 of 6"
    ) as error:
        train(1, reward_timeout_seconds=0.5)
    assert len(error.value.sample["completions"]) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, r"rollout\.group_size is 1: .*set it to 2 or more"),
        ({"batch_size": 0}, r"rollout\.batch_size is 0: set it to 1 or more rows, or null"),
        ({"completion_length": 20}, "completion_length is 20, block_length is 8: .*multiple"),
        ({"evaluation_length": 24}, "completion_length is 24, block_length is 16: .*multiple"),
        ({"completion_length": 0}, "completion_length is 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        rollout_callback(**settings)


def test_an_evaluation_length_of_0_is_refused():
    with pytest.raises(ConfigError, match="length is 0"):
        rollout_callback(evaluation_length=0)


def test_a_time_limit_of_0_is_refused(train):
    with pytest.raises(ConfigError, match=r"rollout\.reward_timeout_seconds is 0\.0: set it to a positive"):
        train(1, reward_timeout_seconds=0.0)


def test_only_modules_with_a_policy_can_be_rolled_out(make_trainer):
    class Other(LightningModule):
        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with pytest.raises(ConfigError, match="RolloutCallback works with an RLDFModule or SFTModule, not Other"):
        make_trainer(callbacks=[rollout_callback()]).fit(Other(), [1])
