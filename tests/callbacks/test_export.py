import shutil
from pathlib import Path

import pytest
import torch

from drift.callbacks import ExportCallback, RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.models import LoRAConfig, load_policy, load_tokenizer
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


def train(
    folder: Path,
    task,
    make_trainer,
    export: ExportCallback,
    dtype: str = "float32",
    chat_template: str = "auto",
    **settings,
) -> RLDFModule:
    settings = {"optimizer": OptimizerConfig(lr=1e-3)} | settings
    module = RLDFModule(str(folder), dtype=dtype, **settings)
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
    trainer = make_trainer(2, callbacks=[rollout, export])
    trainer.fit(module, datamodule=PromptDataModule(task, prompts_per_step=2, chat_template=chat_template))
    return module


def test_the_folder_loads_again_bit_by_bit(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    folder = tmp_path / "deep" / "policy"
    module = train(tiny_folder, spread_task, make_trainer, ExportCallback(str(folder)))
    again, start = load_policy(folder).state_dict(), load_policy(tiny_folder).state_dict()
    trained = module.policy.state_dict()
    assert again.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in again.items())
    assert any(not torch.equal(value, start[name]) for name, value in again.items())
    tokenizer, before = load_tokenizer(folder), load_tokenizer(tiny_folder)
    assert tokenizer.get_vocab() == before.get_vocab()
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == (before.mask_token_id, before.pad_token_id)


def test_bfloat16_stays_bfloat16(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    module = train(tiny_folder, spread_task, make_trainer, ExportCallback(str(tmp_path / "p")), "bfloat16")
    again = load_policy(tmp_path / "p", torch.bfloat16).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in module.policy.state_dict().items())


def test_the_folder_can_be_trained_on(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    train(tiny_folder, spread_task, make_trainer, ExportCallback(str(tmp_path / "one")))
    train(tmp_path / "one", spread_task, make_trainer, ExportCallback(str(tmp_path / "two")))
    first, second = (load_policy(tmp_path / name).state_dict() for name in ("one", "two"))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_nothing_is_written_where_no_folder_is_named(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    before = set(tmp_path.rglob("*"))
    train(tiny_folder, spread_task, make_trainer, ExportCallback())
    assert set(tmp_path.rglob("*")) == before


def test_adapters_are_merged_and_the_folder_is_a_policys(
    tiny_folder, spread_task, make_trainer, tmp_path: Path
):
    module = train(
        *(tiny_folder, spread_task, make_trainer, ExportCallback(str(tmp_path / "p"))),
        lora=LoRAConfig(rank=4, alpha=4),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    assert {file.name for file in (tmp_path / "p").iterdir()} == {file.name for file in tiny_folder.iterdir()}
    start, again = load_policy(tiny_folder), load_policy(tmp_path / "p")
    assert again.state_dict().keys() == start.state_dict().keys()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found, expected = again.logits(ids), module.policy.logits(ids)
        assert (start.logits(ids) - expected).abs().max() > 1e-2
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


def test_the_policy_that_training_starts_from_is_not_written_over(
    tiny_folder, spread_task, make_trainer, tmp_path: Path
):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "p"))
    with pytest.raises(ConfigError, match="the policy's own; name another one"):
        train(folder, spread_task, make_trainer, ExportCallback(str(folder)))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("of years")
    with pytest.raises(ConfigError, match="which would be lost"):
        train(folder, spread_task, make_trainer, ExportCallback(str(mine)))


def test_a_chat_template_of_the_users_own_goes_along(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    text = "{% for turn in messages %}Q: {{ turn.content }}{% endfor %}"
    train(tiny_folder, spread_task, make_trainer, ExportCallback(str(tmp_path / "p")), chat_template=text)
    assert load_tokenizer(tmp_path / "p").chat_template == text
