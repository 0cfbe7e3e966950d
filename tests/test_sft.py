from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer

from drift.callbacks import RolloutCallback
from drift.contract import ConfigError, Problem, PromptBatch
from drift.data import PromptDataModule
from drift.models import load_policy
from drift.optimizer import OptimizerConfig
from drift.randomness import fold, uniform
from drift.rollout import DenoiseConfig
from drift.sft import MIN_SHARE, SFTModule, mask_demonstrations
from drift.tasks import SudokuTask

MASK = 1


def demonstrations(num: int, length: int = 16, first: int = 0) -> PromptBatch:
    places = range(first, first + num)
    return PromptBatch(
        prompt_ids=torch.full((num, 3), 5),
        prompt_mask=torch.tensor([[False, True, True]] * num),
        problems=[Problem(prompt="", answer="")] * num,
        positions=torch.tensor(places),
        completion_ids=torch.tensor([[2 + (place + c) % 40 for c in range(length)] for place in places]),
    )


def test_masked_states_are_those_of_plain_loops():
    batch = demonstrations(6)
    states, share = mask_demonstrations(batch, MASK, seed=3)
    for row in range(6):
        key = fold(3, row)
        expected = MIN_SHARE + (1 - MIN_SHARE) * float(uniform(fold(key, 0)))
        assert float(share[row]) == pytest.approx(expected, rel=1e-6)
        for c in range(16):
            masked = float(uniform(fold(key, c + 1))) < expected
            token = int(batch.completion_ids[row, c])
            assert bool(states.scored[row, c]) == masked
            assert int(states.input_ids[row, 3 + c]) == (MASK if masked else token)
            assert int(states.targets[row, c]) == token
    assert 0 < states.scored.float().mean() < 1
    assert torch.equal(states.input_ids[:, :3], batch.prompt_ids)
    assert states.attention_mask.tolist() == [[False] + [True] * 18] * 6


def test_masks_belong_to_the_place_in_the_stream():
    batch = demonstrations(6)
    whole, share = mask_demonstrations(batch, MASK, seed=0)
    alone, alone_share = mask_demonstrations(demonstrations(1, first=4), MASK, seed=0)
    assert torch.equal(alone.scored[0], whole.scored[4])
    assert alone_share[0] == share[4]
    other, _ = mask_demonstrations(batch, MASK, seed=1)
    assert not torch.equal(other.scored, whole.scored)


def test_shares_cover_their_range_and_masks_follow_them():
    states, share = mask_demonstrations(demonstrations(2000, length=64), MASK, seed=0)
    assert share.min() >= MIN_SHARE == 1e-3
    assert share.max() <= 1
    # Uniform in (0, 1): mean 1/2 with a standard error of 1 / sqrt(12 * 2000) = 0.0065.
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    assert share.min() < 0.01
    assert share.max() > 0.99
    # A row's masked share is its t: standard deviation at most 1 / (2 * sqrt(64)) = 0.0625 a row.
    apart = states.scored.float().mean(dim=1) - share
    assert float(apart.square().mean().sqrt()) < 0.06


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["loss/total"]))
        self.batch = batch


def fine_tune(
    folder: Path, make_trainer: Callable[..., Trainer], steps: int, **settings
) -> tuple[SFTModule, Losses, Trainer]:
    module, losses = SFTModule(str(folder), **settings), Losses()
    trainer = make_trainer(steps, callbacks=[losses])
    data = PromptDataModule(SudokuTask(), prompts_per_step=4, demonstration_length=16)
    trainer.fit(module, datamodule=data)
    return module, losses, trainer


def test_loss_is_that_of_plain_loops(tiny_folder: Path, make_trainer):
    _, losses, _ = fine_tune(tiny_folder, make_trainer, 1, seed=5)
    batch, policy = losses.batch, load_policy(tiny_folder)
    total = 0.0
    for row, place in enumerate(batch.positions.tolist()):
        key = fold(5, place)
        share = MIN_SHARE + (1 - MIN_SHARE) * float(uniform(fold(key, 0)))
        masked = [float(uniform(fold(key, c + 1))) < share for c in range(16)]
        clean = batch.completion_ids[row].tolist()
        state = [MASK if hidden else token for hidden, token in zip(masked, clean, strict=True)]
        with torch.no_grad():
            prompt = batch.prompt_ids[row][batch.prompt_mask[row]].tolist()
            logits = policy.logits(torch.tensor([prompt + state]))[0, len(prompt) :]
        logits[:, MASK] = -torch.inf
        logp = logits.log_softmax(dim=-1)
        total += sum(-float(logp[c, clean[c]]) / share for c in range(16) if masked[c])
    # Four rows of 16 tokens.
    assert losses.values[0] == pytest.approx(total / 64, rel=1e-4)


def test_training_lowers_the_loss(tiny_folder: Path, make_trainer):
    optimizer = OptimizerConfig(lr=5e-3)
    module, losses, trainer = fine_tune(tiny_folder, make_trainer, 40, optimizer=optimizer)
    assert trainer.global_step == 40
    first, last = sum(losses.values[:5]) / 5, sum(losses.values[-5:]) / 5
    assert last < 0.6 * first
    assert module.policy.training


def test_a_step_of_several_batches_goes_on_after_the_last_of_them(tiny_folder: Path, make_trainer, tmp_path):
    places: dict[str, list[int]] = {"whole": [], "parts": []}

    def run(name: str, steps: int, ckpt_path: Path | None = None) -> Trainer:
        class Places(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                places[name].append(int(batch.positions[0]))

        trainer = make_trainer(steps, callbacks=[Places()], accumulate_grad_batches=3)
        data = PromptDataModule(SudokuTask(), prompts_per_step=4, demonstration_length=16)
        trainer.fit(SFTModule(str(tiny_folder)), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    whole = run("whole", 4)
    run("parts", 2).save_checkpoint(tmp_path / "two.ckpt")
    parts = run("parts", 4, tmp_path / "two.ckpt")
    assert places["parts"] == places["whole"] == list(range(0, 48, 4))
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_clipped_by_the_optimizers_setting(tiny_folder: Path, make_trainer):
    norms = []

    class AfterStep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found = [p.grad.square().sum() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.stack(found).sum().sqrt()))

    module = SFTModule(str(tiny_folder), optimizer=OptimizerConfig(lr=1e-3, gradient_clip=0.01))
    trainer = make_trainer(1, callbacks=[AfterStep()])
    data = PromptDataModule(SudokuTask(), prompts_per_step=4, demonstration_length=16)
    trainer.fit(module, datamodule=data)
    # The gradient that made the step has the bound as its norm; what is logged is the norm before clipping.
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert trainer.callback_metrics["update/grad_norm"] > 0.1


def test_missing_demonstration_length_is_an_error(tiny_folder: Path, make_trainer):
    with pytest.raises(ConfigError, match=r"set data\.demonstration_length"):
        make_trainer().fit(SFTModule(str(tiny_folder)), datamodule=PromptDataModule(SudokuTask()))


def test_fresh_weights_are_those_of_the_seed(tiny_folder: Path, make_trainer):
    def start(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = SFTModule(str(tiny_folder), random_init=True)
            module.configure_model()
        return module.policy.state_dict()

    stored = load_policy(tiny_folder).state_dict()
    first, again, other = start(1), start(1), start(2)
    name = "model.transformer.wte.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], stored[name])


def test_validation_rolls_out(tiny_folder: Path, make_trainer):
    decode = DenoiseConfig(block_length=16)
    rollout = RolloutCallback(completion_length=16, decode=decode, evaluation=decode)
    trainer = make_trainer(2, callbacks=[rollout], limit_val_batches=1.0, val_check_interval=2)
    data = PromptDataModule(SudokuTask(), prompts_per_step=2, demonstration_length=16, num_validation=3)
    trainer.fit(SFTModule(str(tiny_folder)), datamodule=data)
    assert trainer.callback_metrics["val/num"] == 3
