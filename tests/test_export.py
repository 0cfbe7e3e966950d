import shutil
from pathlib import Path

import pytest
import torch

from drift.callbacks import ExportCallback, RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.export import PROVENANCE, export
from drift.models import LoRAConfig, load_policy, load_tokenizer, merged_state_dict
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
TEMPLATE = "{% for turn in messages %}Q: {{ turn.content }}{% endfor %}"


@pytest.fixture
def train(spread_task, make_trainer, tmp_path: Path):
    """Trains for two steps; gives the module and its checkpoint."""

    def run(folder: Path, **settings: object) -> tuple[RLDFModule, Path]:
        callbacks = [RolloutCallback(2, 16, decode=DECODE, evaluation=DECODE), ExportCallback()]
        module = RLDFModule(str(folder), optimizer=OptimizerConfig(lr=1e-2), **settings)
        trainer = make_trainer(2, callbacks=callbacks)
        trainer.fit(
            module, datamodule=PromptDataModule(spread_task, prompts_per_step=2, chat_template=TEMPLATE)
        )
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module, tmp_path / "run.ckpt"

    return run


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all weights", "adapters"])
def test_a_checkpoint_becomes_the_trained_policys_folder(tiny_folder: Path, train, tmp_path: Path, lora):
    module, checkpoint = train(tiny_folder, lora=lora)
    out = tmp_path / "out"
    export(str(checkpoint), str(out))
    again, start, trained = (
        load_policy(out).state_dict(),
        load_policy(tiny_folder).state_dict(),
        merged_state_dict(module.policy),
    )
    assert again.keys() == start.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert any(not torch.equal(again[name], start[name]) for name in start)
    assert (out / "config.json").read_bytes() == (tiny_folder / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
    assert load_tokenizer(out).chat_template == TEMPLATE


def test_what_the_checkpoint_does_not_know_can_be_given(tiny_folder: Path, train, tmp_path: Path):
    _, file = train(tiny_folder)
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint[PROVENANCE]["policy"] == str(tiny_folder)
    del checkpoint[PROVENANCE]
    torch.save(checkpoint, file)
    with pytest.raises(ConfigError, match=r"policy is None: .* doesn't say .*give the folder"):
        export(str(file), str(tmp_path / "out"))
    export(str(file), str(tmp_path / "out"), policy=str(tiny_folder), dtype="bfloat16")
    assert load_policy(tmp_path / "out").get_parameter("model.transformer.wte.weight").dtype == torch.float32
    assert '"bfloat16"' in (tmp_path / "out" / "config.json").read_text()


def test_adapters_do_not_go_onto_other_weights(tiny_folder: Path, train, tmp_path: Path):
    _, checkpoint = train(tiny_folder, lora=LoRAConfig(rank=2))
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    changed = load_policy(other)
    with torch.no_grad():
        changed.head.weight.mul_(1.5)
    changed.save_pretrained(other)
    with pytest.raises(ConfigError, match="adapters were trained on other weights; give the policy"):
        export(str(checkpoint), str(tmp_path / "out"), policy=str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ckpt_path": "absent.ckpt"}, "ckpt_path is 'absent.ckpt': there is no such file"),
        ({"dtype": "int4"}, "dtype is 'int4': choose one of"),
        ({"max_shard_size": "5"}, "max_shard_size is '5': give a size"),
        ({"policy": "no_such_policy"}, "policy is 'no_such_policy': there is no such folder"),
        ({"policy": "sudoku_base"}, "the weights do not fit the folder|of another shape"),
        ({"tokenizer": "no_such_one"}, "tokenizer is 'no_such_one': there is no such folder"),
    ],
)
def test_bad_options(tiny_folder: Path, train, tmp_path: Path, change: dict, message: str):
    _, checkpoint = train(tiny_folder)
    options = {"ckpt_path": str(checkpoint), "output": str(tmp_path / "out")} | change
    with pytest.raises(ConfigError, match=message):
        export(**options)
    assert not (tmp_path / "out").exists()
