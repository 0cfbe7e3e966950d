import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml

import drift.cli
from drift.callbacks import RolloutCallback
from drift.cli import run, shipped_configs
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.models.characters import character_tokenizer
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.samplers import TimestepSampler, WeightedSampler
from drift.sft import SFTModule
from drift.tasks import MathTask

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SAMPLERS = ["all_mask", "coupled_mask", "full", "random_mask", "uniform", "weighted"]
RECIPES = {"llada_math": "fit", "quickstart": "fit", "sudoku_base": "sft"}
NAMES = ["base", "evaluate", "predict", *RECIPES, *(f"sampler/{name}" for name in SAMPLERS)]


class Stop(Exception):
    pass


@pytest.fixture
def instantiate(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything that a command makes of its settings; the command itself is not run."""
    monkeypatch.chdir(tmp_path)

    def make(command: str, *arguments: str) -> drift.cli.DriftCLI:
        found = []

        def stop(cli, subcommand):
            found.append(cli)
            raise Stop

        monkeypatch.setattr(drift.cli.DriftCLI, "_run_subcommand", stop)
        with pytest.raises(Stop):
            run([command, *arguments, f"--model.policy={tiny_folder}", "--trainer.accelerator=cpu"])
        return found[0]

    return make


def test_every_config_is_known_here():
    assert {file.relative_to(ROOT / "configs").with_suffix("").as_posix() for file in FILES} == set(NAMES)
    assert len(FILES) == 12
    assert set(shipped_configs()) == set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_says_what_it_is_for(file: Path):
    assert file.read_text().startswith("# ")
    assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize(("name", "command"), RECIPES.items())
def test_every_recipe_instantiates(instantiate, name: str, command: str):
    cli = instantiate(command, "--config", name, "--trainer.precision=32-true")
    assert type(cli.model) is {"fit": RLDFModule, "sft": SFTModule}[command]
    assert isinstance(cli.datamodule, PromptDataModule)
    assert any(isinstance(callback, RolloutCallback) for callback in cli.trainer.callbacks)
    given = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert cli.trainer.max_steps == given["trainer"]["max_steps"]
    assert cli.datamodule.prompts_per_step == given["data"]["prompts_per_step"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_config_is_an_overlay(instantiate, name: str):
    cli = instantiate("fit", "--config=quickstart", f"--config=sampler/{name}")
    expected = yaml.safe_load((ROOT / "configs" / "sampler" / f"{name}.yaml").read_text())["model"]["sampler"]
    sampler = cli.model.sampler
    assert isinstance(sampler, TimestepSampler)
    assert type(sampler).__name__ == expected["class_path"].rpartition(".")[2]
    assert all(getattr(sampler, key) == value for key, value in expected.get("init_args", {}).items())


def test_every_sampler_has_a_config():
    import drift.samplers

    overlays = [yaml.safe_load(file.read_text()) for file in FILES if file.parent.name == "sampler"]
    paths = [overlay["model"]["sampler"]["class_path"] for overlay in overlays]
    classes = [name for name in drift.samplers.__all__ if name != "TimestepSampler"]
    assert sorted(paths) == sorted(f"drift.samplers.{name}" for name in classes)


@pytest.mark.parametrize(
    ("command", "overlay"), [("validate", "evaluate"), ("test", "evaluate"), ("predict", "predict")]
)
def test_evaluation_commands_have_their_overlay(instantiate, command: str, overlay: str):
    cli = instantiate(command, "--config=quickstart")
    given = yaml.safe_load((ROOT / "configs" / f"{overlay}.yaml").read_text())
    assert given
    assert all(cli.config[command][key] == value for key, value in given.items())


def test_the_base_is_safe_and_counts_steps(instantiate):
    cli = instantiate("fit", "--data.task=SudokuTask", "--rollout.completion_length=32")
    assert cli.trainer.max_steps == 100
    assert cli.config["fit"]["weights_only"] is True
    assert cli.trainer.num_sanity_val_steps == 0
    assert cli.trainer.check_val_every_n_epoch is None


def test_llada_math_has_the_papers_settings(instantiate):
    cli = instantiate("fit", "--config=llada_math")
    module, data = cli.model, cli.datamodule
    (rollout,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    optimizer, loss = module.optimizer_config, module.loss
    assert (optimizer.lr, tuple(optimizer.betas), optimizer.weight_decay) == (1e-6, (0.9, 0.999), 0.0)
    assert (optimizer.gradient_clip, optimizer.warmup_steps, optimizer.schedule) == (1.0, 0, "constant")
    assert cli.trainer.precision == "bf16-mixed"
    assert type(module.sampler) is WeightedSampler
    assert (module.sampler.k, module.sampler.temperature) == (4, 1.0)
    assert loss == LossConfig(tau=0.6, kl="k3", beta=0.01, normalisation="token", entropy_coeff=0.0)
    assert (module.num_updates, module.train_groups) == (1, 4)
    assert (rollout.group_size, data.prompts_per_step) == (4, 8)
    assert (rollout.completion_length, rollout.evaluation_length) == (256, 256)
    common = {"block_length": 32, "threshold": 0.9, "use_cache": True, "horizon": 128}
    assert rollout.decode == DenoiseConfig(temperature=1.0, **common)
    assert rollout.evaluation == DenoiseConfig(temperature=0.0, **common)
    assert isinstance(data.task, MathTask)
    assert "boxed{}" in data.task.instruction
    given = yaml.safe_load((ROOT / "configs" / "llada_math.yaml").read_text())
    assert given["model"]["policy"] == "GSAI-ML/LLaDA-8B-Instruct"


def test_llada_math_trains_resumes_and_tests(golden: Path, shared: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    policy = tmp_path / "policy"
    policy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (policy / name).write_bytes((golden / "models" / "llada_tiny" / name).read_bytes())
    character_tokenizer(512, pad_token_id=480, mask_token_id=500).save_pretrained(policy)
    for name, num in (("MATH_train", 12), ("MATH500", 4)):
        rows = json.loads((shared / "data" / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(rows[:num]))
    # One token a character: longer prompts are dropped, as the recipe says.
    rows = json.loads((tmp_path / "MATH500.json").read_text())
    tests = [MathTask().problem(row).prompt for row in rows]
    num_tests = sum(len(prompt) <= 190 for prompt in tests)
    assert 0 < num_tests < 4
    arguments = [
        "--config=llada_math",
        f"--model.policy={policy}",
        f"--data.train.path={tmp_path / 'MATH_train.json'}",
        f"--data.validation.path={tmp_path / 'MATH500.json'}",
        f"--data.test.path={tmp_path / 'MATH500.json'}",
        "--data.validation.limit=4",
        "--data.test.limit=4",
        "--data.max_prompt_length=190",
        "--data.prompts_per_step=2",
        "--data.evaluation_batch_size=4",
        "--model.train_groups=1",
        "--model.micro_batch_size=16",
        "--rollout.group_size=2",
        "--rollout.completion_length=64",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=3",
        f"--trainer.logger.save_dir={tmp_path / 'runs'}",
        "--progress.refresh_rate=0",
    ]
    folder = tmp_path / "runs" / "llada_math"
    run(["fit", *arguments, "--trainer.max_steps=2"])
    last = folder / "version_0" / "checkpoints" / "last.ckpt"
    run(["fit", *arguments, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    resumed = folder / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert torch.load(resumed, weights_only=True)["global_step"] == 3
    run(["test", *arguments, f"--ckpt_path={resumed}", f"--summary.path={tmp_path / 'test.json'}"])
    results = json.loads((tmp_path / "test.json").read_text())
    assert results["num"] == num_tests
    assert results["timesteps"] > 1
    assert 0 <= results["accuracy"] <= 1
