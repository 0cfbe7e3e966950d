"""Steps whose numbers are not finite change nothing but the count of steps, or stop training."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

import drift.module
import drift.sft
from drift.callbacks import FeedbackCallback, RescueCallback, RolloutCallback
from drift.contract import ConfigError, Rollout, SampleError
from drift.data import PromptDataModule
from drift.logprobs import token_logprobs
from drift.losses import rldf_loss
from drift.masking import masked_batch
from drift.models import load_policy
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.randomness import fold
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.samplers import WeightedSampler
from drift.sft import SFTModule
from drift.tasks import SudokuTask

ROOT = Path(__file__).resolve().parent.parent
DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


class Recorder(Callback):
    """Keeps what every step left: weights, optimizer, learning rate, prompts, and whether it was skipped."""

    def __init__(self) -> None:
        self.weights, self.optimizers, self.rates, self.positions, self.skipped = [], [], [], [], []
        self.probs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})
        self.optimizers.append(deepcopy(trainer.optimizers[0].state_dict()["state"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.positions.append(batch.positions.tolist())
        self.skipped.append(float(trainer.callback_metrics["update/skipped"]))
        if isinstance(pl_module, RLDFModule):
            self.probs.append(pl_module.learned.token_probs.clone())


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer, monkeypatch: pytest.MonkeyPatch):
    """Trains the tiny policy; the loss is not finite at the steps `bad`."""

    def run(
        steps: int,
        bad: tuple[int, ...] = (),
        where: str = "loss",
        max_skipped: int = 0,
        ckpt_path: Path | None = None,
        save_at: tuple[int, Path] | None = None,
        module_settings: dict | None = None,
    ):
        def broken(*args, **settings):
            output = rldf_loss(*args, **settings)
            if module.global_step not in bad:
                return output
            if where == "loss":
                return replace(output, loss=output.loss * torch.nan)
            # sqrt has an infinite slope at 0: the loss is finite, its gradient is not.
            sink = (output.loss - output.loss.detach()).clamp(min=0).sqrt()
            return replace(output, loss=output.loss + sink)

        class Save(Callback):
            def on_train_batch_end(self, trainer, *args):
                if save_at is not None and trainer.global_step == save_at[0]:
                    trainer.save_checkpoint(save_at[1])

        monkeypatch.setattr(drift.module, "rldf_loss", broken)
        optimizer = OptimizerConfig(lr=1e-3, warmup_steps=10, max_skipped=max_skipped)
        settings = {"sampler": WeightedSampler(k=2), "optimizer": optimizer, "micro_batch_size": 8}
        module = RLDFModule(str(tiny_folder), **settings | (module_settings or {}))
        recorder = Recorder()
        rollout = RolloutCallback(group_size=4, completion_length=16, decode=DECODE, evaluation=DECODE)
        callbacks = [rollout, FeedbackCallback(), recorder, Save(), RescueCallback()]
        trainer = make_trainer(steps, callbacks=callbacks)
        data = PromptDataModule(spread_task, prompts_per_step=3)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        finally:
            recorder.trainer = trainer
        return recorder

    return run


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_but_the_count(train, where: str):
    with pytest.warns(UserWarning, match=r"is nan at step 2: this step changes nothing .*1 of 1 in a row"):
        found = train(4, (2,), where, max_skipped=1)
    assert found.skipped == [0, 0, 1, 0]
    assert same(found.weights[1], found.weights[2])
    assert not same(found.weights[2], found.weights[3])
    for number, state in found.optimizers[1].items():
        assert same(state, found.optimizers[2][number])
    # Warm-up: a tenth of 1e-3 a step that was taken.
    assert found.rates == pytest.approx([1e-4, 2e-4, 2e-4, 3e-4])
    assert found.trainer.global_step == 4
    assert found.positions == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_only_steps_in_a_row_count(train, tmp_path: Path):
    found = train(6, (1, 2, 4, 5), max_skipped=2)
    assert found.skipped == [0, 1, 1, 0, 1, 1]
    message = r"the loss is nan at step 3, after 2 skipped steps in a row: the weights are as before"
    with pytest.raises(SampleError, match=message):
        train(6, (1, 2, 3), max_skipped=2)
    assert torch.load(tmp_path / "rescue.ckpt", weights_only=True)["global_step"] == 3


def test_by_default_the_first_one_stops(train):
    with pytest.raises(SampleError, match=r"the loss is nan at step 0: the weights"):
        train(2, (0,))


def test_a_resumed_run_goes_on_counting(train, tmp_path: Path):
    train(2, (1,), max_skipped=2, save_at=(2, tmp_path / "two.ckpt"))
    with pytest.raises(SampleError, match="at step 3, after 2 skipped steps in a row"):
        train(9, (2, 3), max_skipped=2, ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.parametrize("bad", [(2,), (3,), (2, 3)], ids=["first update", "second update", "both"])
def test_a_resumed_run_is_never_stopped_with_several_updates(train, tmp_path: Path, bad: tuple[int, ...]):
    settings = {"max_skipped": 2, "module_settings": {"num_updates": 2}}
    whole = train(6, bad, save_at=(bad[0] + 1, tmp_path / "some.ckpt"), **settings)
    assert whole.skipped == [float(step in bad) for step in range(6)]
    assert whole.positions == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2 + [[6, 7, 8]] * 2
    resumed = train(6, bad, ckpt_path=tmp_path / "some.ckpt", **settings)
    assert resumed.positions == whole.positions[bad[0] + 1 :]
    assert resumed.skipped == whole.skipped[bad[0] + 1 :]
    assert same(resumed.weights[-1], whole.weights[-1])
    assert not same(whole.weights[-1], whole.weights[1])


def test_a_skipped_update_gives_no_feedback(train):
    # The rate is 0 in update 0, so that the probabilities of update 2 are the first to differ.
    settings = {"max_skipped": 1, "module_settings": {"num_updates": 4, "micro_batch_size": 4}}
    good = train(4, **settings)
    assert not torch.equal(good.probs[2], good.probs[1])
    found = train(4, (2,), where="gradient", **settings)
    assert torch.equal(found.probs[2], found.probs[1])


class HugeReward(PerSampleReward):
    """Finite numbers whose sum is not."""

    def score(self, completion, problem):
        return 3e38 if sum(map(ord, completion)) % 2 else 2e38


def test_the_batch_that_was_saved_can_be_computed_again(
    train, tiny_folder: Path, spread_task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    spread_task.reward = HugeReward()
    scored = []

    def keep(policy, states, **settings):
        scored.append((states, token_logprobs(policy, states, **settings).detach()))
        return token_logprobs(policy, states, **settings)

    monkeypatch.setattr(drift.module, "token_logprobs", keep)
    with pytest.raises(SampleError, match=r"the loss is (nan|-?inf) at step 0"):
        train(1, module_settings={"micro_batch_size": 1000})
    states, found = scored[-1]

    written = json.loads((tmp_path / "rescue.json").read_text())
    rollout = Rollout(**load_file(tmp_path / "rescue.safetensors"))
    assert rollout.completion_ids.tolist() == written["completion_ids"]
    assert written["update"] == 0
    policy = load_policy(tiny_folder)
    checkpoint = torch.load(tmp_path / "rescue.ckpt", weights_only=True)["state_dict"]
    policy.load_state_dict({name.removeprefix("policy."): value for name, value in checkpoint.items()})
    # The plan of an update is keyed by the rollout's seeds, -1 and the update's number.
    plan = WeightedSampler(k=2).plan(replace(rollout, seeds=fold(rollout.seeds, -1, written["update"])))
    again = masked_batch(rollout, plan, policy.mask_token_id)
    assert torch.equal(again.input_ids, states.input_ids)
    assert torch.equal(again.advantages.isfinite(), states.advantages.isfinite())
    assert not bool(again.advantages.isfinite().all())
    assert torch.equal(token_logprobs(policy, again).logp, found.logp)


def test_fine_tuning_skips_too(make_trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken(policy, states, **settings):
        found = token_logprobs(policy, states, **settings)
        return replace(found, logp=found.logp * torch.nan) if module.global_step in (1, 3, 4) else found

    monkeypatch.setattr(drift.sft, "token_logprobs", broken)
    module = SFTModule("sudoku_base", OptimizerConfig(lr=1e-3, warmup_steps=10, max_skipped=1))
    data = PromptDataModule(SudokuTask(), prompts_per_step=2, demonstration_length=16)
    recorder = Recorder()
    trainer = make_trainer(9, callbacks=[recorder, RescueCallback()])
    with pytest.raises(SampleError, match="the norm of the gradient is nan at step 4, after 1 skipped"):
        trainer.fit(module, datamodule=data)
    assert recorder.skipped == [0, 1, 0, 1]
    assert same(recorder.weights[0], recorder.weights[1])
    assert not same(recorder.weights[1], recorder.weights[2])
    assert recorder.rates == pytest.approx([1e-4 * steps for steps in (1, 1, 2, 2)], rel=1e-6)
    assert load_file(tmp_path / "rescue.safetensors")["completion_ids"].shape == (2, 16)


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from lightning import Callback, Trainer
import drift.module
from drift.callbacks import RescueCallback, RolloutCallback
from drift.data import PromptDataModule
from drift.losses import rldf_loss
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

def broken(*args, **settings):
    output = rldf_loss(*args, **settings)
    bad = module.global_step in (1, 3, 4) and module.trainer.global_rank == 1
    return replace(output, loss=output.loss * torch.nan) if bad else output

class Save(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        weights = {n: p.detach().clone() for n, p in pl_module.policy.named_parameters()}
        torch.save(weights, folder / f"{trainer.global_step}.{trainer.global_rank}.pt")

folder = Path(sys.argv[1])
drift.module.rldf_loss = broken
module = RLDFModule("sudoku_base", optimizer=OptimizerConfig(lr=1e-5, max_skipped=1), micro_batch_size=8)
decode = DenoiseConfig(block_length=16, temperature=1.0)
rollout = RolloutCallback(group_size=8, completion_length=16, decode=decode, evaluation=decode)
trainer = Trainer(
    max_steps=6, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder,
    callbacks=[rollout, Save(), RescueCallback()],
)
trainer.fit(module, PromptDataModule(SudokuTask(), prompts_per_step=8))
"""


@pytest.mark.two_ranks
def test_all_ranks_skip_where_one_has_to(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(call, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SampleError: the loss is nan on rank 1 of 2 at step 4, after 1 skipped" in done.stderr
    steps = {
        (step, rank): torch.load(tmp_path / f"{step}.{rank}.pt", weights_only=True)
        for step in (1, 2, 3, 4)
        for rank in (0, 1)
    }
    assert not (tmp_path / "5.0.pt").exists()
    for step in (1, 2, 3, 4):
        assert same(steps[step, 0], steps[step, 1])
    assert same(steps[1, 0], steps[2, 0])
    assert not same(steps[2, 0], steps[3, 0])
    assert same(steps[3, 0], steps[4, 0])
    # Each rank keeps its own share of the batch.
    places = [
        json.loads((tmp_path / f"rescue{rank}.json").read_text())["positions"] for rank in ("", ".rank1")
    ]
    assert places == [[32, 33, 34, 35], [36, 37, 38, 39]]
    assert (tmp_path / "rescue.rank1.safetensors").exists()
    assert torch.load(tmp_path / "rescue.ckpt", weights_only=True)["global_step"] == 4


def test_the_number_in_a_row_is_checked():
    with pytest.raises(ConfigError, match=r"max_skipped is -1: set it to 0 or more steps in a row"):
        OptimizerConfig(max_skipped=-1)
