"""Adapters, master weights and recomputed blocks in whole runs."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

import drift.module
from drift.callbacks import RescueCallback, RolloutCallback
from drift.contract import ConfigError, SampleError
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.models import LoRAConfig, load_policy, trainable_weights
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig
from drift.samplers import WeightedSampler
from drift.sft import SFTModule
from drift.tasks import SudokuTask

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
LORA = LoRAConfig(rank=2, alpha=4)
MASTERS = OptimizerConfig(lr=1e-5, master_weights=True)
IDS = torch.arange(2, 26)[None]


class Watch(Callback):
    """Keeps every parameter after every step, and the logged losses."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})
        # The others stand still between two rollouts.
        figures = [name for name in trainer.callback_metrics if name.startswith(("loss/", "update/"))]
        self.logged.append(
            {name: float(trainer.callback_metrics[name]) for name in figures if name != "update/seconds"}
        )


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer: Callable[..., Trainer]):
    """Trains the tiny policy with adapters; gives back the trainer, the module and what was recorded."""

    def run(steps: int = 2, ckpt_path: Path | None = None, precision="32-true", callbacks=(), **settings):
        torch.manual_seed(0)
        settings = {
            "lora": LORA,
            "sampler": WeightedSampler(k=2),
            "optimizer": OptimizerConfig(lr=1e-2),
        } | settings
        module, watch = RLDFModule(**{"policy": str(tiny_folder)} | settings), Watch()
        rollout = RolloutCallback(group_size=4, completion_length=16, decode=DECODE, evaluation=DECODE)
        trainer = make_trainer(steps, callbacks=[rollout, watch, *callbacks], precision=precision)
        data = PromptDataModule(spread_task, prompts_per_step=3)
        trainer.fit(module, datamodule=data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        return trainer, module, watch

    return run


def test_only_adapters_train_and_only_they_are_kept(train, tiny_folder: Path, tmp_path: Path):
    trainer, module, watch = train(2)
    base = load_policy(tiny_folder).state_dict()
    last = watch.weights[-1]
    for name, value in base.items():
        found = last.get(name, last.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, value), name
    adapters = {name for name in last if ".lora_" in name}
    assert len(adapters) == 28
    moved = [name for name in adapters if not torch.equal(last[name], watch.weights[0][name])]
    assert len(moved) == 28
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"policy.{name}" for name in adapters}
    assert len(checkpoint["optimizer_states"][0]["state"]) == 28
    assert len(trainable_weights(module.policy)) == 28


def test_the_reference_is_the_policy_without_adapters(train, tiny_folder: Path, monkeypatch):
    scored = []
    rldf_loss = drift.module.rldf_loss

    def record(policy, states, config, **settings):
        scored.append((states, policy.logp.detach(), settings["reference"].logp))
        return rldf_loss(policy, states, config, **settings)

    monkeypatch.setattr(drift.module, "rldf_loss", record)
    _, module, watch = train(2, loss=LossConfig(beta=0.3))
    assert module.reference is None, "no second copy"
    (_, policy, reference), (states, moved, kept) = scored
    assert torch.equal(policy, reference)
    assert watch.logged[0]["loss/kl"] == 0
    assert watch.logged[1]["loss/kl"] > 0
    assert (moved - kept).abs().max() > 1e-3
    with torch.no_grad():
        before = load_policy(tiny_folder)
        logits = before.logits(states.input_ids, states.attention_mask)[:, -16:]
    logits[..., before.mask_token_id] = -torch.inf
    expected = logits.log_softmax(dim=-1).gather(-1, states.targets[..., None])[..., 0]
    torch.testing.assert_close(kept[states.scored], expected[states.scored], rtol=0, atol=1e-5)


def test_the_reference_without_adapters_is_what_a_copy_would_be(train, tiny_folder: Path, tmp_path: Path):
    loss = LossConfig(beta=0.3)
    _, _, off = train(3, loss=loss)
    shutil.copytree(tiny_folder, tmp_path / "copy")
    _, module, copy = train(3, loss=loss, reference=str(tmp_path / "copy"))
    assert module.reference is not None
    assert off.logged == copy.logged
    assert all(torch.equal(value, copy.weights[-1][name]) for name, value in off.weights[-1].items())
    _, module, _ = train(1, loss=loss, reference=str(tiny_folder))
    assert module.reference is None, "the policy's own folder"


def test_adapters_start_the_same_in_every_run(train):
    (_, _, one), (_, _, same) = (train(1) for _ in range(2))
    assert all(torch.equal(value, same.weights[0][name]) for name, value in one.weights[0].items())


SETTINGS = {
    "adapters": {"loss": LossConfig(beta=0.1)},
    "adapters, bfloat16": {"dtype": "bfloat16"},
    "adapters, three updates": {"num_updates": 3},
    "master weights": {"lora": None, "dtype": "bfloat16", "optimizer": MASTERS},
    "master weights, three updates": {
        "lora": None,
        "dtype": "bfloat16",
        "optimizer": MASTERS,
        "num_updates": 3,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_resumed_is_never_stopped(train, tmp_path: Path, settings: dict):
    _, _, whole = train(5, **settings)
    trainer, _, _ = train(2, **settings)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed_trainer, _, resumed = train(5, ckpt_path=tmp_path / "two.ckpt", **settings)
    assert resumed_trainer.global_step == 5
    assert len(resumed.weights) == 3
    assert whole.logged[2:] == resumed.logged
    for found, expected in zip(resumed.weights, whole.weights[2:], strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(whole.weights[1][name], value) for name, value in whole.weights[4].items())


def test_rescue_keeps_the_adapters_and_training_goes_on(train, monkeypatch, tmp_path: Path):
    rldf_loss, calls = drift.module.rldf_loss, []

    def broken(*args, **settings):
        output = rldf_loss(*args, **settings)
        calls.append(output)
        if len(calls) == 3:
            output.loss = output.loss * torch.nan
        return output

    _, _, whole = train(4)
    monkeypatch.setattr(drift.module, "rldf_loss", broken)
    with pytest.raises(SampleError, match="at step 2"):
        train(4, callbacks=(RescueCallback(),))
    _, _, resumed = train(4, ckpt_path=tmp_path / "rescue.ckpt")
    assert all(torch.equal(value, resumed.weights[-1][name]) for name, value in whole.weights[-1].items())


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ({"lora": None}, {}, r"it holds a whole policy and no adapters, .*set model\.lora to null"),
        (
            {},
            {"lora": None},
            r"it holds adapters of model\.lora .*'rank': 2.* is None; set",
        ),
        ({}, {"lora": LoRAConfig(rank=3, alpha=4)}, r"adapters of model\.lora .*'rank': 2.* is .*'rank': 3"),
        (
            {},
            {"lora": LoRAConfig(rank=2, alpha=8)},
            r"adapters of .*'alpha': 4.* is .*'alpha': 8",
        ),
        ({}, {"lora": LoRAConfig(rank=2, alpha=4, targets=["q_proj"])}, r"model\.lora is .*\['q_proj'\]"),
        (
            {"lora": None, "dtype": "bfloat16", "optimizer": MASTERS},
            {"lora": None, "dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-3)},
            r"model\.optimizer\.master_weights is False: the checkpoint was written with True",
        ),
        (
            {"lora": None, "dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-3)},
            {"lora": None, "dtype": "bfloat16", "optimizer": MASTERS},
            r"model\.optimizer\.master_weights is True: the checkpoint was written with False",
        ),
    ],
)
def test_checkpoints_of_another_kind_are_refused(train, tmp_path: Path, written, read, message: str):
    trainer, _, _ = train(1, **written)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match=message):
        train(2, ckpt_path=tmp_path / "one.ckpt", **read)


def test_targets_by_name_are_those_of_all(train, tmp_path: Path):
    trainer, module, _ = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert module.lora.targets == ["attn_out", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    named = LoRAConfig(rank=2, alpha=4, targets=list(reversed(module.lora.targets)))
    train(2, ckpt_path=tmp_path / "one.ckpt", lora=named)


def test_adapters_of_other_weights_are_refused(train, tiny_folder: Path, tmp_path: Path):
    trainer, _, _ = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    train(2, ckpt_path=tmp_path / "one.ckpt", dtype="bfloat16")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    policy = load_policy(other)
    with torch.no_grad():
        policy.blocks[1].up_proj.weight += 0.01
    policy.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"trained on other weights than those of model\.policy"):
        train(2, ckpt_path=tmp_path / "one.ckpt", policy=str(other))


def test_fresh_weights_under_adapters_are_refused(tiny_folder: Path):
    with pytest.raises(ConfigError, match=r"model\.random_init is True: .* set one of the two"):
        SFTModule(str(tiny_folder), random_init=True, lora=LORA)


@pytest.mark.parametrize("micro_batch_size", [7, 1000])
def test_mixed_precision_trains_adapters_at_any_micro_batch_size(train, micro_batch_size: int):
    settings = {"precision": "bf16-mixed", "loss": LossConfig(beta=0.1, tau=0.6), "dtype": "bfloat16"}
    _, _, whole = train(1, **settings)
    _, _, found = train(1, micro_batch_size=micro_batch_size, activation_checkpointing=True, **settings)
    assert whole.logged[0]["update/grad_norm"] > 1e-2
    for name in ("loss/total", "update/grad_norm"):
        assert found.logged[0][name] == pytest.approx(whole.logged[0][name], rel=0.02), name


def test_a_missing_adapter_is_seen(train, tmp_path: Path):
    trainer, _, _ = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match="1 tensors missing, such as policy"):
        train(2, ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora": None, "optimizer": MASTERS},
            r"model\.optimizer\.master_weights is True: .* float32 already",
        ),
        (
            {"dtype": "bfloat16", "optimizer": MASTERS},
            r"model\.optimizer\.master_weights is True: .*adapters always",
        ),
    ],
)
def test_settings_that_do_not_go_together_stop_before_weights_are_read(
    train, monkeypatch, settings: dict, message: str
):
    monkeypatch.setattr("drift.policy_module.load_policy", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=message):
        train(**settings)


def test_unknown_targets_are_refused_at_once(tiny_folder: Path):
    with pytest.raises(ConfigError, match=r"no linear layer 'query'; choose among \['attn_out'"):
        RLDFModule(str(tiny_folder), lora=LoRAConfig(targets=["query"]))


@pytest.mark.parametrize(
    ("settings", "num_warnings"),
    [
        ({"lora": None, "dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-5)}, 1),
        ({"lora": None, "dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-4)}, 0),
        ({"lora": None, "dtype": "bfloat16", "optimizer": MASTERS}, 0),
        ({"dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-5)}, 0),
    ],
)
def test_updates_that_bfloat16_would_lose_are_warned_of_once(train, settings: dict, num_warnings: int):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(2, **settings)
    about = [str(w.message) for w in caught if "model.optimizer.lr is 1e-05" in str(w.message)]
    assert len(about) == num_warnings
    assert all("set model.optimizer.master_weights to true" in text for text in about)


def test_master_weights_learn_where_bfloat16_alone_rounds_updates_away(train):
    settings = {"lora": None, "dtype": "bfloat16", "optimizer": OptimizerConfig(lr=1e-6, master_weights=True)}
    trainer, module, _ = train(4, **settings)
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    masters = [state["master"] for state in trainer.optimizers[0].state.values()]
    assert len(masters) == 21
    # Four steps of about 1e-6 each: most too small for the weights, and all of them kept.
    assert all(float((m - m.bfloat16()).abs().max()) > 1e-6 for m in masters)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_reference_has_the_dtype_of_the_policy(train, dtype: str):
    _, module, _ = train(
        1, lora=None, dtype=dtype, loss=LossConfig(beta=0.1), optimizer=OptimizerConfig(lr=1e-3)
    )
    assert module.policy.dtype == module.reference.dtype == getattr(torch, dtype)


def test_recomputed_blocks_change_nothing(train):
    settings = {"loss": LossConfig(beta=0.1, entropy_coeff=0.01), "micro_batch_size": 7}
    for lora in (None, LORA):
        _, _, plain = train(2, lora=lora, **settings)
        _, module, recomputed = train(2, lora=lora, activation_checkpointing=True, **settings)
        assert module.policy.activation_checkpointing
        assert recomputed.logged == plain.logged
        final = plain.weights[-1].items()
        assert all(torch.equal(recomputed.weights[-1][name], value) for name, value in final)


def test_fine_tuning_takes_the_same_settings(tiny_folder: Path, make_trainer, tmp_path: Path):
    def tune(steps: int, ckpt_path=None, **settings):
        torch.manual_seed(0)
        module = SFTModule(str(tiny_folder), **settings)
        trainer, data = make_trainer(steps), PromptDataModule(SudokuTask(), demonstration_length=16)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, {name: p.detach().clone() for name, p in module.policy.named_parameters()}

    for settings in (
        {"lora": LORA, "activation_checkpointing": True, "optimizer": OptimizerConfig(lr=1e-2)},
        {"dtype": "bfloat16", "optimizer": MASTERS},
    ):
        _, whole = tune(4, **settings)
        trainer, half = tune(2, **settings)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        _, resumed = tune(4, ckpt_path=tmp_path / "two.ckpt", **settings)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        moved = {name for name, value in whole.items() if not torch.equal(value, half[name])}
        assert moved
        assert "lora" not in settings or all(".lora_" in name for name in moved)
