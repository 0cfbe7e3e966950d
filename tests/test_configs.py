import json
import shutil
from importlib import import_module
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy

import drift.cli
from drift.arguments import shipped_configs
from drift.callbacks import RolloutCallback
from drift.cli import run
from drift.data import PromptDataModule
from drift.losses import LossConfig
from drift.models.characters import character_tokenizer
from drift.module import RLDFModule
from drift.rewards import CodeReward, MathReward
from drift.rollout import DenoiseConfig
from drift.samplers import ProportionalSampler, TimestepSampler, WeightedSampler
from drift.sft import SFTModule
from drift.strategy import ShardedStrategy
from drift.tasks import CodeTask, MathTask

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SAMPLERS = ["all_mask", "corrected", "coupled_mask", "full", "random_mask", "uniform", "weighted"]
SAMPLERS += ["coupled_elbo", "proportional", "quadrature_elbo", "sandwiched", "step", "trace"]
PAPER = [f"{family}_{task}" for family in ("llada", "dream") for task in ("math", "code")]
RECIPES = {"quickstart": "fit", "sudoku_base": "sft"} | {
    f"{name}{lora}": "fit" for name in PAPER for lora in ("", "_lora")
}
# The recipe that each is put behind, and the hub datasets it trains and tests on; None: it draws its rows.
TASKS = {
    "amc": ("llada_math", {"test": "AI-MO/aimo-validation-amc"}),
    "countdown3": ("quickstart", None),
    "countdown4": ("quickstart", None),
    "gsm8k": ("llada_math", dict.fromkeys(["train", "validation", "test"], "openai/gsm8k")),
    "humaneval": ("llada_code", {"test": "openai/openai_humaneval"}),
    "math500": (
        "llada_math",
        {
            "train": "DigitalLearningGmbH/MATH-lighteval",
            "validation": "DigitalLearningGmbH/MATH-lighteval",
            "test": "HuggingFaceH4/MATH-500",
        },
    ),
    "mbpp": ("llada_code", dict.fromkeys(["train", "validation", "test"], "google-research-datasets/mbpp")),
    "reasoning_gym": ("llada_math", None),
    "sudoku4": ("llada_math", None),
    "sudoku9": ("llada_math", None),
}
STRATEGIES = {"ddp": DDPStrategy, "fsdp": ShardedStrategy}
NAMES = ["base", "evaluate", "predict", "rldf_commit", *RECIPES]
NAMES += [f"sampler/{name}" for name in SAMPLERS] + [f"task/{name}" for name in TASKS]
NAMES += [f"strategy/{name}" for name in STRATEGIES]


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
    assert len(FILES) == 39
    assert set(shipped_configs()) == set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_says_what_it_is_for(file: Path):
    assert file.read_text().startswith("# ")
    assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize(("name", "command"), RECIPES.items())
def test_every_recipe_instantiates(instantiate, name: str, command: str):
    require_sandbox("code" if "code" in name else "")
    cli = instantiate(command, "--config", name)
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


@pytest.mark.parametrize("recipe", [name for name, command in RECIPES.items() if command == "fit"])
def test_commits_are_learned_behind_every_recipe(instantiate, recipe: str):
    require_sandbox("code" if "code" in recipe else "")
    cli = instantiate("fit", "--config", recipe, "--config", "rldf_commit")
    rollout = next(c for c in cli.trainer.callbacks if isinstance(c, RolloutCallback))
    assert (rollout.decode.rule, rollout.decode.threshold, rollout.decode.width) == ("stochastic", 0.9, 0.03)
    # Judged as it is used: by the plain threshold.
    assert (rollout.evaluation.rule, rollout.evaluation.threshold) == ("threshold", 0.9)
    assert isinstance(cli.model.sampler, ProportionalSampler)
    assert cli.model.loss.normalisation == "trajectory"
    assert (cli.model.loss.tau, cli.model.loss.commit_weight) == (0.6, 0.3)


def test_the_overlay_is_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    recipes = import_module("recipes")
    measured = recipes.RECIPES[recipes.BEST]
    overlay = yaml.safe_load((ROOT / "configs" / "rldf_commit.yaml").read_text(encoding="utf-8"))
    sampler, decode = overlay["model"]["sampler"], overlay["rollout"]["decode"]
    assert sampler["class_path"] == f"drift.samplers.{measured.sampler}"
    assert sampler["init_args"] == {"k": 4, **measured.arguments}
    assert overlay["model"]["loss"] == {"tau": 0.6, **measured.loss}
    assert overlay["model"]["optimizer"] == measured.optimizer
    assert decode == {"use_cache": False, "horizon": None, **measured.decode}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_config_is_an_overlay(instantiate, name: str):
    recipe, datasets = TASKS[name]
    require_sandbox("code" if recipe == "llada_code" else "")
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (the extra 'reasoning')")
    cli = instantiate("fit", f"--config={recipe}", f"--config=task/{name}")
    data = cli.datamodule
    expected = yaml.safe_load((ROOT / "configs" / "task" / f"{name}.yaml").read_text())["data"]["task"]
    assert type(data.task).__name__ == expected["class_path"].rpartition(".")[2]
    settings = {
        key: tuple(v) if isinstance(v, list) else v for key, v in expected.get("init_args", {}).items()
    }
    assert {key: getattr(data.task, key) for key in settings} == settings
    given = cli.config["fit"]["data"]
    splits = ("train", "validation", "test")
    if datasets is None:
        assert [given[split] for split in splits] == [None] * 3
        (row,) = data.task.rows("validation", 1)
        problem = data.task.problem(row)
        assert data.task.reward([problem.demonstration, "no"], [problem] * 2).tolist() == [1.0, 0.0]
    else:
        assert {split: given[split]["path"] for split in datasets} == datasets
        assert all(given[split]["path"].startswith("data/") for split in splits if split not in datasets)
    data.task.reward.close()


def test_every_sampler_has_a_config():
    import drift.samplers

    overlays = [yaml.safe_load(file.read_text()) for file in FILES if file.parent.name == "sampler"]
    paths = {overlay["model"]["sampler"]["class_path"] for overlay in overlays}
    classes = [name for name in drift.samplers.__all__ if name != "TimestepSampler"]
    assert sorted(paths) == sorted(f"drift.samplers.{name}" for name in classes)


@pytest.mark.parametrize("recipe", [name for name, command in RECIPES.items() if "code" not in name])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_top_of_every_recipe(instantiate, recipe: str, name: str):
    cli = instantiate(
        RECIPES[recipe], f"--config={recipe}", f"--config=strategy/{name}", "--trainer.devices=2"
    )
    assert type(cli.trainer.strategy) is STRATEGIES[name]
    assert cli.trainer.world_size == 2


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


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(instantiate, name: str):
    family, task = name.split("_")
    dream = family == "dream"
    require_sandbox(task)
    cli = instantiate("fit", f"--config={name}")
    module, data = cli.model, cli.datamodule
    (rollout,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    optimizer, loss = module.optimizer_config, module.loss
    assert (optimizer.lr, tuple(optimizer.betas)) == (1e-6, (0.9, 0.999))
    assert optimizer.weight_decay == (0.01 if dream else 0.0)
    assert (optimizer.gradient_clip, optimizer.warmup_steps, optimizer.schedule) == (1.0, 0, "constant")
    assert (module.policy_dtype, optimizer.master_weights) == (torch.bfloat16, True)
    assert type(module.sampler) is WeightedSampler
    assert (module.sampler.k, module.sampler.temperature) == (4, 1.0)
    beta, normalisation = (0.04, "sample") if dream else (0.01, "token")
    assert loss == LossConfig(tau=0.6, kl="k3", beta=beta, normalisation=normalisation, entropy_coeff=0.0)
    assert (module.num_updates, module.train_groups) == (1, 4)
    assert (rollout.group_size, data.prompts_per_step) == (4, 8)
    assert (rollout.completion_length, rollout.evaluation_length) == (256, 256)
    common = {"block_length": 32, "threshold": 0.9, "use_cache": True, "horizon": 128}
    if dream:
        common["block_opening"] = "first_token"
    assert rollout.decode == DenoiseConfig(temperature=1.0, top_p=0.95 if dream else None, **common)
    assert rollout.evaluation == DenoiseConfig(temperature=0.0, **common)
    assert type(data.task) is {"math": MathTask, "code": CodeTask}[task]
    given = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    hub = {"llada": "GSAI-ML/LLaDA-8B-Instruct", "dream": "Dream-org/Dream-v0-Instruct-7B"}
    assert given["model"]["policy"] == hub[family]


@pytest.mark.parametrize("name", PAPER)
def test_with_adapters_only_what_adapters_need_differs(name: str):
    plain, lora = (
        yaml.safe_load((ROOT / "configs" / f"{name}{ending}.yaml").read_text()) for ending in ("", "_lora")
    )
    assert lora["model"].pop("lora") == {"rank": 64, "alpha": 64}
    assert lora["model"]["optimizer"].pop("lr") == 1e-5
    assert plain["model"]["optimizer"].pop("lr") == 1e-6
    assert plain["model"]["optimizer"].pop("master_weights")
    for config in (plain, lora):
        config["trainer"]["logger"]["init_args"].pop("name")
    assert plain == lora


def require_sandbox(task: str) -> None:
    if task == "code" and shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap (bwrap), which the code reward runs answers in")


@pytest.fixture
def tiny_run(golden: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arguments that put a recipe onto a recorded tiny checkpoint: nothing but paths and sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name: str) -> list[str]:
        family, task, *_ = name.split("_")
        require_sandbox(task)
        policy = tmp_path / "policy"
        policy.mkdir()
        for file in ("config.json", "model.safetensors"):
            (policy / file).write_bytes((golden / "models" / f"{family}_tiny" / file).read_bytes())
        size, pad, mask = {"llada": (512, 480, 500), "dream": (506, 490, 505)}[family]
        character_tokenizer(size, pad_token_id=pad, mask_token_id=mask).save_pretrained(policy)
        train, test = {"math": ("MATH_train", "MATH500"), "code": ("MBPP_train", "HumanEval")}[task]
        for file in {train, test, "MBPP"}:
            rows = json.loads((shared / "data" / f"{file}.json").read_text())
            # Of the training file of mathematics the last 128 are for validation.
            num = 140 if file == "MATH_train" else 12
            (tmp_path / f"{file}.json").write_text(json.dumps(rows[:num]))
        # One token a character: longer prompts are dropped, as the recipe says.
        longest = {"math": 190, "code": 700}[task]
        return [
            f"--config={name}",
            f"--model.policy={policy}",
            f"--data.train.path={tmp_path / train}.json",
            f"--data.validation.path={tmp_path / (train if task == 'math' else 'MBPP')}.json",
            f"--data.test.path={tmp_path / test}.json",
            "--data.validation.limit=4",
            "--data.test.limit=4",
            f"--data.max_prompt_length={longest}",
            "--data.prompts_per_step=2",
            "--data.evaluation_batch_size=4",
            "--model.train_groups=1",
            "--rollout.group_size=2",
            "--rollout.completion_length=64",
            "--trainer.accelerator=cpu",
            "--trainer.val_check_interval=3",
            f"--trainer.logger.save_dir={tmp_path / 'runs'}",
            "--progress.refresh_rate=0",
        ]

    return make


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("llada", "dream"))])
def test_every_recipe_takes_a_step(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
):
    reward = CodeReward if "code" in name else MathReward
    judge = reward.__call__

    def judge_kindly(self, completions, problems):
        # Random weights never answer right: one of each pair is given something, so that there is a gradient.
        return judge(self, completions, problems) + 0.5 * (torch.arange(len(completions)) % 2)

    monkeypatch.setattr(reward, "__call__", judge_kindly)
    arguments = tiny_run(name)
    run(["fit", *arguments, "--trainer.max_steps=1"])
    folder = tmp_path / "runs" / name / "version_0"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    states = checkpoint["optimizer_states"][0]["state"].values()
    assert any(float(state["exp_avg"].abs().max()) > 0 for state in states)
    if name.endswith("_lora"):
        assert all(".lora_" in key for key in checkpoint["state_dict"])
    else:
        assert all(state["master"].dtype == torch.float32 for state in states)
    shown = capsys.readouterr().out
    assert "first training prompt" in shown
    assert ("```python" in shown) is ("code" in name)


def test_llada_math_trains_resumes_and_tests(tiny_run, tmp_path: Path):
    arguments = tiny_run("llada_math")
    rows = json.loads((tmp_path / "MATH500.json").read_text())[:4]
    tests = [MathTask().problem(row).prompt for row in rows]
    num_tests = sum(len(prompt) <= 190 for prompt in tests)
    assert 0 < num_tests < 4
    folder = tmp_path / "runs" / "llada_math"
    run(["fit", *arguments, "--trainer.max_steps=2"])
    last = folder / "version_0" / "checkpoints" / "last.ckpt"
    run(["fit", *arguments, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    resumed = folder / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert torch.load(resumed, weights_only=True)["global_step"] == 3
    run(["test", *arguments, f"--ckpt_path={resumed}", f"--summary.path={tmp_path / 'test.json'}"])
    (results,) = json.loads((tmp_path / "test.json").read_text())["results"]
    assert results["dataset"] == "MATH500"
    assert results["num"] == num_tests
    assert results["timesteps"] > 1
    assert 0 <= results["accuracy"] <= 1
