import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lightning import Callback

from drift.averaging import averages, hide_averages, keep_average, show_averages
from drift.callbacks import CheckpointCallback, ExportCallback, RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.models import LoRAConfig, load_policy
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig, build_optimizer, require_precise
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
Weights = dict[str, torch.Tensor]


def assert_equal(found: Weights, expected: Weights) -> None:
    assert expected
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_unequal(found: Weights, other: Weights) -> None:
    assert any(not torch.equal(found[name], value) for name, value in other.items())


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in module[0].parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("masters", [False, True])
def test_averages_are_those_of_a_plain_loop(masters: bool):
    module = layers().to(torch.bfloat16 if masters else torch.float32)
    config = OptimizerConfig(lr=1e-2, master_weights=masters, ema_decay=0.8)
    optimizer = build_optimizer(module, config)
    weight, expected = module[0].weight, None
    for number in range(1, 31):
        step(module, optimizer, number)
        at_hand = (optimizer.state[weight]["master"] if masters else weight.detach()).clone()
        # Until the 16th step, 1 / (1 - 0.8) steps are more than a quarter of them.
        left = number / (number + 4) if number <= 16 else 0.8
        expected = at_hand if expected is None else left * expected + (1 - left) * at_hand
        found = averages(optimizer)[weight]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, at_hand, atol=1e-3)
    # What has never had a gradient has no average.
    assert set(averages(optimizer)) == set(module[0].parameters())


@pytest.mark.parametrize("masters", [False, True])
def test_weights_have_the_value_of_their_averages_for_a_while(masters: bool):
    module = layers().to(torch.bfloat16 if masters else torch.float32)
    config = OptimizerConfig(lr=1e-2, master_weights=masters, ema_decay=0.9)
    optimizer = build_optimizer(module, config)
    for number in range(5):
        step(module, optimizer, number)
    weight = module[0].weight
    before, kept = copy.deepcopy(module.state_dict()), copy.deepcopy(averages(optimizer)[weight])
    show_averages(optimizer)
    assert torch.equal(weight, kept.to(weight.dtype))
    assert not torch.equal(weight, before["0.weight"])
    hide_averages(optimizer)
    assert_equal(module.state_dict(), before)
    assert torch.equal(averages(optimizer)[weight], kept)


def test_a_step_that_is_skipped_leaves_the_average():
    module = layers()
    optimizer = build_optimizer(module, OptimizerConfig(lr=1e-2, ema_decay=0.9))
    for number in range(5):
        step(module, optimizer, number)
    kept = copy.deepcopy(averages(optimizer)[module[0].weight])
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(averages(optimizer)[module[0].weight], kept)
    step(module, optimizer, 5)
    assert not torch.equal(averages(optimizer)[module[0].weight], kept)


class Look(Callback):
    """Keeps weights and averages after every step, and the weights of every validation."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.averages: list[Weights] = []
        self.validated: list[Weights] = []

    def setup(self, trainer, pl_module, stage):
        experience = pl_module.experience

        def look(module, batch, number):
            if not trainer.training:
                self.validated.append(copy.deepcopy(module.policy.state_dict()))
            return experience(module, batch, number)

        pl_module.experience = look

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(copy.deepcopy(dict(pl_module.policy.named_parameters())))
        found = averages(trainer.optimizers[0])
        named = pl_module.policy.named_parameters()
        self.averages.append({name: found[p].clone() for name, p in named if p in found})


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer, tmp_path: Path) -> Callable[..., tuple]:
    def run(
        name: str,
        steps: int,
        decay: float = 0.9,
        masters: bool = False,
        ckpt_path: Path | None = None,
        more: Sequence[Callback] = (),
        **settings,
    ):
        look, export = Look(), ExportCallback(str(tmp_path / name / "policy"))
        checkpoint = CheckpointCallback(monitor="val/accuracy", dirpath=str(tmp_path / name / "kept"))
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        trainer = make_trainer(
            steps,
            callbacks=[rollout, look, export, checkpoint, *more],
            enable_checkpointing=True,
            limit_val_batches=1.0,
            val_check_interval=2,
        )
        optimizer = OptimizerConfig(lr=1e-3, ema_decay=decay, master_weights=masters)
        module = RLDFModule(str(tiny_folder), optimizer=optimizer, **settings)
        data = PromptDataModule(spread_task, prompts_per_step=2, num_validation=1)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return look, trainer, module

    return run


def test_the_average_is_validated_saved_and_exported(train, tiny_folder, make_trainer, tmp_path: Path):
    look, _, module = train("one", 5)
    assert_unequal(look.weights[4], look.averages[4])
    assert len(look.validated) == 2
    for number, weights in enumerate(look.validated):
        assert_equal(weights, look.averages[2 * number + 1])
    # Training has gone on from the weights themselves.
    plain, *_ = train("plain", 5, decay=0.0)
    assert_equal(plain.weights[4], look.weights[4])
    assert_equal(plain.validated[1], plain.weights[3])
    for name, step_ in (("best", 2), ("last", 5)):
        saved = torch.load(tmp_path / "one" / "kept" / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert_equal({key.removeprefix("policy."): v for key, v in saved.items()}, look.averages[step_ - 1])
    assert_equal(load_policy(tmp_path / "one" / "policy").state_dict(), look.averages[4])
    # After training they are the module's, too, for whoever tests it.
    assert_equal(module.policy.state_dict(), look.averages[4])
    other = RLDFModule(str(tiny_folder))
    rollout = RolloutCallback(completion_length=16, decode=DECODE, evaluation=DECODE)
    data = PromptDataModule(SudokuTask(), num_test=1)
    last = tmp_path / "one" / "kept" / "last.ckpt"
    make_trainer(callbacks=[rollout]).test(other, data, ckpt_path=last, verbose=False, weights_only=True)
    assert_equal(other.policy.state_dict(), look.averages[4])


@pytest.mark.parametrize("settings", [{}, {"lora": LoRAConfig(rank=4, alpha=4)}, {"num_updates": 2}])
def test_a_resumed_run_goes_on_bit_by_bit(train, tmp_path: Path, settings: dict):
    whole, *_ = train("whole", 6, **settings)
    train("begun", 3, **settings)
    resumed, *_ = train("resumed", 6, ckpt_path=tmp_path / "begun" / "kept" / "last.ckpt", **settings)
    for name in ("weights", "averages"):
        for found, expected in zip(getattr(resumed, name), getattr(whole, name)[3:], strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("masters", [False, True])
def test_what_is_saved_after_training_goes_on_too(train, tmp_path: Path, masters: bool):
    settings = {"masters": masters, "dtype": "bfloat16" if masters else "float32"}
    whole, *_ = train("whole", 6, **settings)
    _, trainer, _ = train("begun", 3, **settings)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed, *_ = train("resumed", 6, ckpt_path=tmp_path / "after.ckpt", **settings)
    assert_equal(resumed.weights[-1], whole.weights[-1])
    assert_equal(resumed.averages[-1], whole.averages[-1])


@pytest.mark.parametrize("masters", [False, True])
def test_what_is_saved_where_validation_fails_goes_on_too(train, tmp_path: Path, masters: bool):
    class Fail(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                raise ZeroDivisionError

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "rescue.ckpt")

    settings = {"masters": masters, "dtype": "bfloat16" if masters else "float32"}
    whole, *_ = train("whole", 6, **settings)
    with pytest.raises(ZeroDivisionError):
        train("failed", 6, more=[Fail()], **settings)
    resumed, *_ = train("resumed", 6, ckpt_path=tmp_path / "rescue.ckpt", **settings)
    assert_equal(resumed.weights[-1], whole.weights[-1])
    assert_equal(resumed.averages[-1], whole.averages[-1])


def test_averages_may_begin_and_end_with_a_resumed_run(train, tmp_path: Path):
    plain, *_ = train("plain", 6, decay=0.0)
    train("with", 3)
    ended, *_ = train("ended", 6, decay=0.0, ckpt_path=tmp_path / "with" / "kept" / "last.ckpt")
    assert_equal(ended.weights[-1], plain.weights[-1])
    assert not ended.averages[-1]
    train("without", 3, decay=0.0)
    begun, *_ = train("begun", 6, ckpt_path=tmp_path / "without" / "kept" / "last.ckpt")
    assert_equal(begun.weights[-1], plain.weights[-1])
    assert_equal(begun.averages[0], plain.weights[3])


def test_nothing_left_to_train_exports_the_average(train, tmp_path: Path, monkeypatch):
    look, *_ = train("one", 3)
    monkeypatch.setattr(RLDFModule, "may_be_finished", True)
    train("again", 3, ckpt_path=tmp_path / "one" / "kept" / "last.ckpt")
    assert_equal(load_policy(tmp_path / "again" / "policy").state_dict(), look.averages[2])


def test_weights_alone_are_the_average(train, tmp_path: Path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    look, *_ = train("one", 3, more=[Save()])
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    assert_equal({name.removeprefix("policy."): value for name, value in saved.items()}, look.averages[2])


def test_settings_that_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"ema_decay is 1\.0: set it in \[0, 1\), such as 0\.98"):
        OptimizerConfig(ema_decay=1.0)
    config = OptimizerConfig(lr=1e-3, ema_decay=0.9)
    require_precise(config, torch.float32)
    with pytest.raises(ConfigError, match=r"ema_decay is 0\.9 and the weights are bfloat16: .* to true"):
        require_precise(config, torch.bfloat16)
    require_precise(OptimizerConfig(lr=1e-3, ema_decay=0.9, master_weights=True), torch.bfloat16)


def test_nothing_is_kept_where_nobody_asked():
    module = layers()
    optimizer = build_optimizer(module, OptimizerConfig(lr=1e-2))
    step(module, optimizer, 0)
    assert averages(optimizer) == {}
    keep_average(optimizer, 0.9)
    step(module, optimizer, 1)
    assert len(averages(optimizer)) == 2
