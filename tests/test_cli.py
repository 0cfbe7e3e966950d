import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

import drift.cli
import drift.commands
from drift import __version__
from drift.arguments import shipped_configs
from drift.cli import run
from drift.models.characters import character_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every command runs in an empty folder: nothing may be found beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tiny(tiny_folder: Path) -> list[str]:
    """Arguments that make the quickstart small and quiet."""
    return [
        "--config=quickstart",
        f"--model.policy={tiny_folder}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.max_steps=1",
        "--data.prompts_per_step=2",
        "--data.num_validation=2",
        "--data.num_test=3",
        "--rollout.group_size=2",
        "--progress.refresh_rate=0",
    ]


@pytest.fixture
def settings(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """What a command would run with."""

    def parsed(command: str, *arguments: str) -> dict:
        with pytest.raises(SystemExit) as stopped:
            run([command, *arguments, "--print_config"])
        assert not stopped.value.code, stopped.value.code
        return yaml.safe_load(capsys.readouterr().out)

    return parsed


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message with which a command stops; it must stop before any training."""

    def message(command: str, *arguments: str) -> str:
        def must_not_train(*_: object) -> None:
            pytest.fail("training began")

        monkeypatch.setattr(drift.cli.RLDFModule, "training_step", must_not_train)
        with pytest.raises(SystemExit) as stopped:
            run([command, *arguments])
        assert isinstance(stopped.value.code, str), "a message makes the exit status 1"
        return stopped.value.code

    return message


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: drift COMMAND"),
        (["--help"], "usage: drift COMMAND"),
        (["-h"], "train a policy with RLDF"),
        (["--version"], f"drift {__version__}"),
    ],
)
def test_help_and_version_need_no_torch(arguments: list[str], words: str):
    done = python("-X", "importtime", "-m", "drift", *arguments)
    assert done.returncode == 0
    assert words in done.stdout
    assert "drift" in imported(done)
    assert not imported(done) & {"torch", "lightning", "transformers", "numpy", "jsonargparse", "datasets"}


@pytest.mark.parametrize(
    ("command", "nearest"), [("fitt", "fit"), ("tset", "test"), ("validation", "validate")]
)
def test_an_unknown_command_suggests_the_nearest(command: str, nearest: str):
    done = python("-X", "importtime", "-m", "drift", command)
    assert done.returncode == 1
    assert f"there is no command {command!r}; did you mean {nearest!r}?" in done.stderr
    assert "fit, sft, validate, test, predict, doctor, export, compare, plan" in done.stderr
    assert "torch" not in imported(done)
    assert "Traceback" not in done.stderr


def test_help_names_every_command_there_is():
    from drift.__main__ import _COMMANDS, usage

    expected = ["fit", "sft", "validate", "test", "predict", "doctor", "export", "compare", "plan"]
    assert list(_COMMANDS) == expected
    assert all(f"\n  {name} " in usage() for name in _COMMANDS)


def test_the_command_works_from_another_folder(tmp_path: Path):
    """One whole process: what the console script does."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from drift.__main__ import main; main()"
    arguments = ["fit", "--config", "quickstart", "--model.loss.tauu", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("drift: error: ")
    assert "Traceback" not in done.stderr


def test_command_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "--help"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "usage: drift fit [--config NAME_OR_FILE ...] [--KEY VALUE ...]" in out
    assert "--rollout.group_size" in out
    assert "completions of a prompt in training, >= 2" in out


def test_shipped_configs_are_found_by_name(settings):
    found = settings("fit", "--config", "quickstart")
    assert found["trainer"]["max_steps"] == 30
    assert found["model"]["policy"] == "sudoku_base"
    # The base is always there.
    assert found["trainer"]["val_check_interval"] == 10
    assert found["trainer"]["num_sanity_val_steps"] == 0
    assert settings("fit", "--config=quickstart.yaml") == found


def test_several_configs_merge_and_the_later_one_wins(settings, tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model:\n  loss:\n    tau: 0.25\n  sampler:\n    init_args:\n      k: 7\n")
    found = settings("fit", "--config", "quickstart", "--config", "sampler/weighted", "--config", str(mine))
    assert found["model"]["loss"] | {"tau": 0.25, "beta": 0.01} == found["model"]["loss"]
    arguments = found["model"]["sampler"]["init_args"]
    assert arguments == {"k": 7, "temperature": 1.0, "importance_correction": False}
    found = settings("fit", "--config", "quickstart", "--config", str(mine), "--config", "sampler/weighted")
    assert found["model"]["sampler"]["init_args"]["k"] == 4
    found = settings("fit", "--config", "quickstart", "--config", str(mine), "--model.loss.tau", "0.5")
    assert found["model"]["loss"]["tau"] == 0.5
    found = settings("fit", "--config=quickstart", "--config=sampler/full")
    assert found["model"]["sampler"] == {"class_path": "drift.samplers.FullSampler"}


def test_a_file_comes_before_a_shipped_config_of_its_name(settings, tmp_path: Path):
    (tmp_path / "quickstart").write_text("model:\n  policy: sudoku_base\ndata:\n  task: SudokuTask\n")
    assert settings("fit", "--config", "quickstart")["trainer"]["max_steps"] == 100


def test_an_unknown_config_suggests_the_nearest(error):
    message = error("fit", "--config", "quickstrat")
    assert message.startswith("drift: error: --config is 'quickstrat': there is no such file")
    assert "did you mean 'quickstart'?" in message
    assert all(name in message for name in shipped_configs())


def write_package(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "__init__.py").write_text(
        textwrap.dedent(
            """
            from drift.samplers import UniformSampler

            class LastSampler(UniformSampler):
                def __init__(self, k: int = 1, shift: float = 0.5) -> None:
                    super().__init__(k)
            """
        )
    )


@pytest.mark.parametrize(
    ("arguments", "class_path", "k"),
    [
        (["--model.sampler", "Uniform"], "drift.samplers.UniformSampler", 2),
        (["--model.sampler", "Uniform", "--model.sampler.k", "3"], "drift.samplers.UniformSampler", 3),
        (["--model.sampler=Uniform", "--model.sampler.init_args.k=3"], "drift.samplers.UniformSampler", 3),
        (["--model.sampler=Full"], "drift.samplers.FullSampler", None),
        (["--model.sampler", "UniformSampler"], "drift.samplers.UniformSampler", 2),
        (["--model.sampler=drift.samplers.RandomMaskSampler"], "drift.samplers.RandomMaskSampler", 2),
        (["--model.sampler", "mine.LastSampler"], "mine.LastSampler", 2),
        (["--model.sampler.class_path=mine.LastSampler", "--model.sampler.k=5"], "mine.LastSampler", 5),
    ],
)
def test_samplers_are_chosen_by_name(
    settings, tmp_path: Path, monkeypatch, arguments: list[str], class_path: str, k: int | None
):
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    found = settings("fit", "--config", "quickstart", *arguments)["model"]["sampler"]
    module, name = found["class_path"].rsplit(".", 1)
    assert (module.partition(".")[0], name) == (class_path.partition(".")[0], class_path.rpartition(".")[2])
    # The quickstart's k stays where the class has one.
    assert found.get("init_args", {}).get("k") == k


def test_tasks_are_chosen_by_name(settings):
    arguments = ["--model.policy=sudoku_base", "--rollout.group_size=2"]
    found = settings("fit", *arguments, "--data.task", "Math", "--data.task.question_field", "problem")
    assert found["data"]["task"]["class_path"].endswith(".MathTask")
    assert found["data"]["task"]["init_args"]["question_field"] == "problem"


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--model.loss.tauu=0.5", "model.loss.tau"),
        ("--rollout.group_sizes=4", "rollout.group_size"),
        ("--data.prompts_per_stp=4", "data.prompts_per_step"),
        ("--trainer.max_stpes=4", "trainer.max_steps"),
        ("--checkpoint.evry=4", "checkpoint.every"),
        ("--model.sampler.kk=3", "model.sampler.k"),
        ("--data.train.pth=x.json", "data.train.path"),
        ("--data.task.blnks=[6,9]", "data.task.blanks"),
        # Not taken for the key that it begins.
        ("--trainer.max_step=4", "trainer.max_steps"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(error, argument: str, nearest: str):
    message = error("fit", "--config=quickstart", argument)
    assert argument.partition("=")[0].lstrip("-") in message
    assert message.endswith(f"did you mean {nearest!r}?")
    assert len(message.splitlines()) == 1


def test_an_unknown_key_in_a_file_suggests_the_nearest(error, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("rollout:\n  group_sizes: 4\n")
    message = error("fit", "--config=quickstart", f"--config={file}")
    assert "group_sizes" in message
    assert "did you mean 'rollout.group_size'?" in message


def test_an_unknown_sampler_suggests_the_nearest(error):
    message = error("fit", "--config=quickstart", "--model.sampler=Unifrm")
    assert "Unifrm" in message
    assert "Uniform" in message


def test_a_value_of_the_wrong_type_names_the_key(error):
    message = error("fit", "--config=quickstart", "--trainer.max_steps=many")
    assert "trainer.max_steps" in message
    assert "many" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rollout.group_size=1"], ["rollout.group_size is 1", "set it to 2 or more"]),
        (["--model.sampler.k=0"], ["k is 0", "set it to 1 or more timesteps"]),
        (["--rollout.decode.threshold=0"], ["threshold is 0.0", "set it in (0, 1], or null"]),
        (["--rollout.decode.threshold=1.5"], ["threshold is 1.5", "set it in (0, 1], or null"]),
        (
            ["--rollout.completion_length=20"],
            ["completion_length is 20", "block_length is 16", "must be a multiple of the block length"],
        ),
        (["--model.policy=nowhere"], ["model.policy is 'nowhere'", "give the path of", "sudoku_base"]),
        (["--model.loss.tau=2"], ["tau is 2.0", "set it to a probability in [0, 1]"]),
        (["--model.optimizer.lr=-1"], ["lr is -1.0", "set it to a positive number"]),
        (["--model.num_updates=0"], ["model.num_updates is 0", "set it to 1 or more"]),
        (["--data.max_prompt_length=8"], ["16 tokens", "data.max_prompt_length is 8", "raise it"]),
        (["--data.task.blanks=[0,3]"], ["blanks=(0, 3)", "within 1 to 12"]),
        (["--model.train_groups=3"], ["model.train_groups is 3", "data.prompts_per_step rolls out only 2"]),
        (["--rollout.completion_length=128"], ["completion_length is 128", "max_sequence_length of 128"]),
        (["--trainer.max_steps=-1"], ["trainer.max_steps is -1", "never ends; set the"]),
        (
            ["--data.chat_template=no.jinja"],
            ["data.chat_template is 'no.jinja'", "no such file", "give auto"],
        ),
        (
            ["--data.chat_template={{ messages[-1].content }}", "--data.system_prompt=Be brief."],
            ["data.system_prompt is 'Be brief.'", "takes no system turn", "unset it"],
        ),
        (["--prompt.max_characters=-1"], ["prompt.max_characters is -1", "set it to 0"]),
        (["--seed_everything=99999999999"], ["seed_everything is 99999999999", "below 2**32"]),
        (["--rollout.seed=99999999999999999999"], ["rollout.seed: seed is 9999", "a number of 64 bits"]),
        (
            ["--checkpoint.monitor=val/acc"],
            ["checkpoint.monitor is 'val/acc'", "did you mean 'val/accuracy'?", "val/timesteps"],
        ),
        (["--checkpoint.monitor=reward"], ["checkpoint.monitor is 'reward'", "val/reward"]),
        (
            ["--trainer.logger=true", "--trainer.default_root_dir=here"],
            ["trainer.default_root_dir is 'here'", "set trainer.logger.init_args.save_dir"],
        ),
        (["--trainer.limit_train_batches=3"], ["limit_train_batches is 3", "set trainer.max_steps"]),
        (["--trainer.precision=bf16-true"], ["precision is 'bf16-true'", "set model.dtype to bfloat16"]),
    ],
)
def test_bad_settings_name_key_value_and_fix(tiny: list[str], error, arguments: list[str], parts: list[str]):
    message = error("fit", *tiny, *arguments)
    assert message.startswith("drift: error: ")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data: {task: Sudoku}", ["data.task is 'Sudoku'", "give the whole path, drift.tasks.SudokuTask"]),
        ("model: {sampler: Full}", ["model.sampler is Full", "the whole path, drift.samplers.FullSampler"]),
        ("data: {chat_template: {{ x }}}", ["line 1", "put text with {{ }} in quotes"]),
        ("2024-13-45: 3", ["it is no YAML", "month must be in 1..12"]),
    ],
)
def test_a_config_file_that_cannot_be_read_says_how_to_write_it(
    tiny: list[str], error, tmp_path: Path, text: str, parts: list[str]
):
    (tmp_path / "mine.yaml").write_text(text)
    message = error("fit", *tiny, f"--config={tmp_path / 'mine.yaml'}")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


def test_the_message_names_the_command_that_was_given(error):
    assert error("sft", "--config=quickstart").startswith("drift: error: Subcommand 'sft' does not accept")


def test_without_a_progress_bar_all_else_is_the_same(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    rest = [argument for argument in tiny if "refresh_rate" not in argument]
    run(["fit", *rest, "--trainer.enable_progress_bar=false"])
    shown = capsys.readouterr()
    assert "--- summary ---" in shown.out
    assert "it/s" not in shown.out + shown.err
    run(["fit", *rest])
    shown = capsys.readouterr()
    assert "it/s" in shown.out + shown.err


def corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_mask(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 97}))


def no_mask(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mask_token_id": 98}))


def unknown_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (corrupt, ["model.policy is", "safetensors cannot be read", "copy or download it again"]),
        (without_weights, ["model.policy is", "it has no *.safetensors weights"]),
        (no_mask, ["data.tokenizer is", "no token for the policy's mask_token_id 98", "use the"]),
        (other_mask, ["data.tokenizer is", "id 1, the policy's mask_token_id is 97", "use the"]),
        (unknown_family, ["model.policy is", "model_type: 'gpt2'", "supported: ['Dream', 'llada'"]),
    ],
)
def test_bad_policy_folders(
    tiny: list[str], tiny_folder: Path, error, tmp_path: Path, spoil, parts: list[str]
):
    folder = tmp_path / "policy"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    message = error("fit", *tiny, f"--model.policy={folder}")
    assert message.startswith("drift: error: ")
    assert str(folder) in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("rows", "arguments", "parts"),
    [
        ([{"q": "1+1?"}], [], ["has no field 'question'", "it has ['q']", "set data.task.question_field"]),
        ([], [], ["is empty or cannot be read", "Correct the data or the path"]),
        (
            [{"question": "1+1?", "ground_truth_answer": "2"}],
            ["--data.max_prompt_length=40"],
            ["row 0", "tokens, data.max_prompt_length is 40", "raise it, or set data.long_prompts: drop"],
        ),
        (None, [], ["does not exist: correct it"]),
    ],
)
def test_bad_data(
    tiny: list[str], error, tmp_path: Path, rows: list | None, arguments: list, parts: list[str]
):
    file = tmp_path / "rows.jsonl"
    if rows is not None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--data.task=drift.tasks.MathTask", f"--data.train.path={file}"]
    message = error("fit", *tiny, *task, *arguments)
    assert message.startswith("drift: error: data.train")
    assert str(file) in message or file.name in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "it is no YAML"), ("", "it holds nothing; it must hold settings"), ("- 1", "it holds list")],
)
def test_bad_config_files_are_named(error, tmp_path: Path, content: str, words: str):
    (tmp_path / "mine.yaml").write_text(content)
    message = error("fit", "--config=quickstart", f"--config={tmp_path / 'mine.yaml'}")
    assert message.startswith(f"drift: error: --config is {str(tmp_path / 'mine.yaml')!r}: {words}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_bad_checkpoints_are_named(tiny: list[str], error, tmp_path: Path, command: str):
    message = error(command, *tiny, "--ckpt_path=nowhere.ckpt")
    assert message.startswith("drift: error: ckpt_path is 'nowhere.ckpt': there is no such file; give the")
    (tmp_path / "text.ckpt").write_text("hello")
    path = str(tmp_path / "text.ckpt")
    message = error(command, *tiny, f"--ckpt_path={path}")
    assert message.startswith(f"drift: error: ckpt_path is {path!r}: it cannot be read: it is ")


def test_a_checkpoint_of_another_policy_or_at_its_end_is_refused(tiny: list[str], error, tmp_path: Path):
    run(["fit", *tiny, f"--checkpoint.dirpath={tmp_path}"])
    last = tmp_path / "last.ckpt"
    step = load(last)["global_step"]
    message = error("fit", *tiny, f"--ckpt_path={last}", f"--trainer.max_steps={step}")
    assert f"trainer.max_steps is {step}: the checkpoint is already at step {step}" in message
    message = error("test", *tiny, f"--ckpt_path={last}", "--model.policy=sudoku_base")
    assert "ckpt_path: its weights do not fit model.policy" in message


def test_an_output_folder_that_cannot_be_made_is_named(tiny: list[str], error, tmp_path: Path):
    (tmp_path / "file").touch()
    arguments = [argument for argument in tiny if not argument.startswith("--trainer.logger")]
    message = error("fit", *arguments, f"--trainer.logger.init_args.save_dir={tmp_path / 'file' / 'runs'}")
    assert "trainer.logger.save_dir is" in message
    assert "it cannot be made (Not a directory)" in message


@pytest.mark.parametrize(
    ("command", "key", "reason"),
    [
        ("fit", "checkpoint.dirpath", "it cannot be made (Not a directory)"),
        ("test", "summary.path", "it cannot be written (Not a directory)"),
        ("test", "answers.path", "it cannot be written (Not a directory)"),
        ("predict", "predictions.path", "it cannot be written (Not a directory)"),
    ],
)
def test_what_cannot_be_written_is_named_at_once(
    tiny: list[str], error, tmp_path: Path, command: str, key: str, reason: str
):
    (tmp_path / "file").touch()
    message = error(command, *tiny, f"--{key}={tmp_path / 'file' / 'folder' / 'x'}")
    assert f"{key} is" in message
    assert reason in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("accelerator=gpuu", "trainer: You selected an invalid accelerator name"),
        ("strategy=fsdpp", "trainer: You selected an invalid strategy name"),
        ("devices=abc", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
        ("num_nodes=0", "trainer: `num_nodes` must be a positive integer, but got 0"),
        ("max_steps=-5", "trainer: `max_steps` must be a non-negative integer or -1"),
        ("gradient_clip_val=1", "Automatic gradient clipping is not supported for manual optimization"),
        ("val_check_interval=0", "trainer.val_check_interval is 0: set it to 1 or more steps"),
    ],
)
def test_what_lightning_refuses_is_one_line(tiny: list[str], error, setting: str, words: str):
    message = error("fit", *tiny, f"--trainer.{setting}")
    assert message.startswith(f"drift: error: {words}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_as_many_devices_as_processes_are_asked_for(tiny: list[str], error, monkeypatch, strategy: str):
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in {**ranks, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    # Lightning sets it to this rank, 1, for good: later tests would see nothing of what rank 0 says.
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    message = error("fit", *tiny, f"--config=strategy/{strategy}")
    assert message.startswith("drift: error: trainer: You set `devices=1` and `num_nodes=1`")
    assert "does not match the world size (2)" in message


def test_a_folder_in_the_place_of_a_file_is_named(tiny: list[str], error, tmp_path: Path):
    message = error("test", *tiny, f"--answers.path={tmp_path}")
    assert "answers.path is" in message
    assert "(it is a folder)" in message


def test_a_key_that_stands_twice_is_refused(tiny: list[str], error, tmp_path: Path):
    file = tmp_path / "twice.yaml"
    file.write_text("model:\n  optimizer: {lr: 5.0e-3}\nmodel:\n  loss: {beta: 0}\n", encoding="utf-8")
    message = error("fit", *tiny, f"--config={file}")
    assert "the key 'model' stands there twice, line 3" in message


def test_a_resumed_run_has_its_own_learning_rate(tiny: list[str], tmp_path: Path):
    last = tmp_path / "kept" / "last.ckpt"
    run(["fit", *tiny, f"--checkpoint.dirpath={last.parent}", "--model.optimizer.lr=1e-3"])
    before = load(last)
    changed = ["--model.optimizer.lr=1e-4", "--model.optimizer.weight_decay=0.5"]
    more = f"--trainer.max_steps={before['global_step'] + 1}"
    run(["fit", *tiny, f"--checkpoint.dirpath={tmp_path / 'new'}", f"--ckpt_path={last}", more, *changed])
    after = load(tmp_path / "new" / "last.ckpt")
    matrices, others = after["optimizer_states"][0]["param_groups"]
    assert before["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-4, 0.5)
    assert (others["lr"], others["weight_decay"]) == (1e-4, 0.0)


def test_fine_tuning_and_reinforcement_learning_do_not_go_on_with_each_other(
    tiny: list[str], error, tmp_path: Path
):
    run(["fit", *tiny, f"--checkpoint.dirpath={tmp_path}"])
    last = tmp_path / "last.ckpt"
    checkpoint = load(last)
    torch.save({**checkpoint, "command": "sft"}, last)
    more = f"--trainer.max_steps={checkpoint['global_step'] + 1}"
    message = error("fit", *tiny, f"--ckpt_path={last}", more)
    assert checkpoint["command"] == "fit"
    assert "ckpt_path: `drift sft` wrote it" in message
    assert "give that folder as model.policy" in message


def test_nothing_is_left_behind_by_a_command_that_never_trained(tiny: list[str], error, tmp_path: Path):
    error("fit", *tiny, "--data.train.path=nowhere.json", "--data.task=drift.tasks.MathTask")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_sample_that_stops_training_is_named(tiny: list[str], monkeypatch, tmp_path: Path):
    def broken(self, completions, problems):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(drift.rewards.SudokuReward, "__call__", broken)
    with pytest.raises(SystemExit) as stopped:
        run(["fit", *tiny, f"--trainer.default_root_dir={tmp_path}"])
    assert stopped.value.code.startswith("drift: stopped: SudokuReward raised ZeroDivisionError: oh")
    assert (tmp_path / "rescue.json").exists()


def test_a_task_takes_a_reward_of_the_users_own(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., dict]
):
    (tmp_path / "own_reward.py").write_text(
        textwrap.dedent("""
            from drift.rewards import PerSampleReward

            class Vowels(PerSampleReward):
                def score(self, completion, problem):
                    return float(any(letter in "aeiou" for letter in completion))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    for task in ("MathTask", "CodeTask"):
        found = settings("fit", *tiny, f"--data.task={task}", "--data.task.reward=own_reward.Vowels")
        assert found["data"]["task"]["init_args"]["reward"]["class_path"] == "own_reward.Vowels"


def test_extra_rewards_are_set_by_name_and_evaluated_by_parts(tiny: list[str], tmp_path: Path, error):
    form = "{reward: {class_path: FormatReward, init_args: {pattern: '1'}}, weight: 0.5}"
    long = "{reward: {class_path: LengthReward, init_args: {max_length: 16, margin: 8}}}"
    run(
        [
            "test",
            *tiny,
            f"--rollout.extra_rewards=[{form}, {long}]",
            f"--summary.path={tmp_path / 'test.json'}",
        ]
    )
    (results,) = json.loads((tmp_path / "test.json").read_text())["results"]
    parts = {name: results[f"reward/{name}"] for name in ("sudoku", "format", "length")}
    expected = parts["sudoku"] + 0.5 * parts["format"] + parts["length"]
    assert results["reward"] == pytest.approx(expected, abs=1e-6)
    assert results["accuracy"] == parts["sudoku"]
    message = error("fit", *tiny, f"--rollout.extra_rewards=[{form.replace('0.5', '0.0')}]")
    assert "rollout.extra_rewards.weight is 0.0: set it to a number other than 0" in message


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.mark.parametrize("num_updates", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: list[str], tmp_path: Path, spread_task, monkeypatch, num_updates: int
):
    """With three updates a rollout, the second step is in the middle of one."""
    monkeypatch.setattr(drift.rewards.SudokuReward, "score", lambda _, *args: spread_task.reward.score(*args))
    common = [
        *tiny,
        "--model.optimizer.lr=1e-3",
        "--model.optimizer.warmup_steps=3",
        f"--model.num_updates={num_updates}",
        "--trainer.val_check_interval=2",
    ]

    def fit(folder: str, *arguments: str) -> dict:
        run(["fit", *common, f"--checkpoint.dirpath={tmp_path / folder}", *arguments])
        return load(tmp_path / folder / "last.ckpt")

    whole = fit("whole", "--trainer.max_steps=4")
    half = fit("half", "--trainer.max_steps=2")
    assert half["global_step"] == 2
    resumed = fit("resumed", "--trainer.max_steps=4", f"--ckpt_path={tmp_path / 'half' / 'last.ckpt'}")
    assert whole["global_step"] == resumed["global_step"] == 4
    for key in ("lr_schedulers", "optimizer_states", "state_dict"):
        assert equal(whole[key], resumed[key]), key
    assert not equal(half["state_dict"], whole["state_dict"])
    assert not equal(half["optimizer_states"], whole["optimizer_states"])


def test_the_command_line_and_never_the_checkpoint_has_the_settings(tiny: list[str], tmp_path: Path):
    run(["fit", *tiny, f"--checkpoint.dirpath={tmp_path}"])
    checkpoint = load(tmp_path / "last.ckpt")
    assert "hyper_parameters" not in checkpoint
    assert all(key.startswith("policy.") for key in checkpoint["state_dict"])


@pytest.mark.parametrize(("command", "file"), [("validate", "val.json"), ("test", "test.json")])
def test_evaluation_of_a_checkpoint_writes_results(
    tiny: list[str], tmp_path: Path, command: str, file: str, capsys
):
    run(["fit", *tiny, f"--checkpoint.dirpath={tmp_path}"])
    run([command, *tiny, f"--ckpt_path={tmp_path / 'last.ckpt'}", f"--summary.path={tmp_path / file}"])
    results = json.loads((tmp_path / file).read_text())
    assert results["results"][0]["num"] == {"validate": 2, "test": 3}[command]
    assert results["checkpoint"].endswith("last.ckpt")
    # Lightning's own table would say the same again.
    out = capsys.readouterr().out
    assert out.count("accuracy_low") == 0
    assert "--- " in out


def benchmarks(tmp_path: Path, **more: object) -> dict:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "1+1?", "ground_truth_answer": "2"}) + "\n")
    math = {"path": str(file), "task": {"class_path": "drift.tasks.MathTask"}}
    return {"math": math, "sudoku": {"limit": 2}, **more}


def test_one_command_evaluates_a_grid_and_compare_reads_it(tiny: list[str], tmp_path: Path, capsys):
    overlay = tmp_path / "grid.yaml"
    decodes = {"cold": {"block_length": 8}, "cool": {"block_length": 8, "threshold": 0.5}}
    grid = {"lengths": [8, 16], "decodes": decodes}
    overlay.write_text(yaml.safe_dump({"data": {"test": benchmarks(tmp_path)}, "rollout": {"test": grid}}))
    arguments = [*tiny, f"--config={overlay}", f"--answers.path={tmp_path / 'a.jsonl'}"]
    run(["test", *arguments, f"--summary.path={tmp_path / 'a.json'}"])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    expected = [(n, g, d) for n in ("math", "sudoku") for g in (8, 16) for d in decodes]
    assert [(found["dataset"], found["length"], found["decode"]) for found in results] == expected
    assert len({found["fingerprint"] for found in results}) == 8
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4 + 8
    # From the command line, one of the benchmarks, sampled.
    warm = json.dumps({"cold": {"block_length": 8, "temperature": 0.5}})
    several = ["--rollout.test.lengths=[8]", "--rollout.test.samples=2", f"--rollout.test.decodes={warm}"]
    run(["test", *arguments, *several, "--data.benchmarks=[sudoku]", f"--summary.path={tmp_path / 'b.json'}"])
    (result,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert (result["dataset"], result["num"], result["samples"]) == ("sudoku", 2, 2)
    assert {"pass@1", "pass@2"} <= result.keys()
    capsys.readouterr()
    drift.commands.run(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    out = capsys.readouterr().out
    assert "WARNING sudoku, length 8, cold: not measured in the same way" in out
    assert "  decode.temperature: 0.0 in A, 0.5 in B\n" in out
    assert "  samples: 1 in A, 2 in B\n" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data.benchmarks=[sudoko]"], ["data.benchmarks names 'sudoko'", "did you mean 'sudoku'?"]),
        (["--data.test={}"], ["data.test: Source cannot do without path; set it"]),
        (["--data.test=MATH500"], ["data.test is MATH500", "it must be"]),
        (["--data.test.math.limt=3"], ["data.test.math.limt: ", "did you mean 'data.test.math.limit'?"]),
        (["--data.test.math.path=nowhere.json"], ["data.test.math.path='nowhere.json' does not exist"]),
        (["--data.test.math.task=null"], ["data.test.math (file rows.jsonl, row 0) has no field", "correct"]),
        (["--data.test=null", "--data.task=MathTask"], ["data.test is None", "set data.test.path to a file"]),
        (
            ["--rollout.test.lengths=[8,20]", '--rollout.test.decodes={"a": {"block_length": 8}}'],
            ["rollout.test, length 20, decode 'a'", "multiple of the block length"],
        ),
        (
            ["--rollout.test.samples=2"],
            ["samples is 2", "temperature 0", "pass@k says nothing", "samples to 1"],
        ),
        (["--rollout.test.sample=2"], ["rollout.test.sample", "did you mean 'rollout.test.samples'?"]),
        (["--rollout.test.lengths=[160]"], ["rollout.test.lengths is 160", "max_sequence_length of 128"]),
        (
            ['--rollout.test.decodes={"a": {"block_length": 16, "temperature": -1}}'],
            ["temperature is -1.0", "set it to 0"],
        ),
    ],
)
def test_bad_evaluations_are_refused_before_the_policy_answers(
    tiny: list[str], error, monkeypatch, tmp_path: Path, arguments: list[str], parts: list[str]
):
    monkeypatch.setattr("drift.callbacks.rollout.rollout_groups", lambda *_, **__: pytest.fail("it answered"))
    given = f"--data.test={json.dumps(benchmarks(tmp_path))}"
    message = error("test", *tiny, given, *arguments)
    assert message.startswith("drift: error: ")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


def test_predict_writes_answers(tiny: list[str], tmp_path: Path):
    run(["predict", *tiny, f"--predictions.path={tmp_path / 'answers.jsonl'}"])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == [0, 1, 2]


def test_sft_and_export_make_a_policy_that_can_be_trained(tiny_folder: Path, tmp_path: Path):
    common = [
        f"--model.policy={tiny_folder}",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=0",
        "--progress.refresh_rate=0",
        "--data.prompts_per_step=2",
        f"--checkpoint.dirpath={tmp_path / 'sft'}",
    ]
    run(["sft", "--config=sudoku_base", *common, f"--export.folder={tmp_path / 'policy'}"])
    written = {file.name for file in (tmp_path / "policy").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    common[0] = f"--model.policy={tmp_path / 'policy'}"
    run(["fit", "--config=quickstart", *common, "--rollout.group_size=2"])
    assert load(tmp_path / "sft" / "last.ckpt")["global_step"] == 2


def test_settings_are_kept_beside_the_run(tiny: list[str], tmp_path: Path):
    arguments = [a for a in tiny if not a.startswith("--trainer.logger")]
    run(["fit", *arguments, f"--trainer.logger.save_dir={tmp_path / 'runs'}", "--model.loss.tau=0.125"])
    folder = tmp_path / "runs" / "quickstart" / "version_0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["loss"]["tau"] == 0.125
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_the_shipped_tokenizer_is_the_character_tokenizer():
    from drift.models import load_tokenizer

    assert load_tokenizer("sudoku_base").get_vocab() == character_tokenizer().get_vocab()
