"""Commands that tell of a run without starting it."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import drift.cli
from drift.commands import run


@pytest.fixture(autouse=True)
def _nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In an empty folder; policy, data and trainer must not be made."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something was made of the settings")

    monkeypatch.setattr(drift.cli.DriftParser, "instantiate_classes", refuse)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `drift plan` prints."""

    def printed(*arguments: str) -> str:
        run(["plan", *arguments])
        return capsys.readouterr().out

    return printed


@pytest.fixture
def error() -> Callable[..., str]:
    """The line with which `drift plan` stops."""

    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(["plan", *arguments])
        assert isinstance(stopped.value.code, str)
        assert len(stopped.value.code.splitlines()) == 1
        return stopped.value.code

    return message


def test_the_8b_recipe_is_planned_without_its_weights(plan):
    start = time.perf_counter()
    text = plan("--config", "llada_math", "--num_gpus", "8", "--gpu_memory", "80")
    assert time.perf_counter() - start < 20
    assert "8.02 billion parameters, 8 GPUs, all weights on each" in text
    assert "4 states x 1280 positions" in text
    assert "rollout: 16 rows" in text
    assert "usable: 75.0 GiB of 80.0 GiB" in text
    assert "DOES NOT FIT" in text
    assert "--model.lora.rank 16" in text


def test_settings_are_those_of_fit(plan, tmp_path: Path):
    text = plan("--config=quickstart", "--gpu_memory=0.5")
    # The limit of the policy, not 1024 + 16 positions.
    assert "256 states x 256 positions" in text
    assert "0.243 million parameters, one GPU" in text
    assert "(trainer.strategy auto does not shard)" not in text
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"model": {"micro_batch_size": 3, "num_updates": 2}}))
    text = plan(
        "--config", "quickstart", "--config", str(mine), "--model.dtype", "bfloat16", "--model.loss.beta=0"
    )
    assert "3 states x" in text
    assert "bfloat16; model.num_updates > 1" in text
    assert "reference  " not in text
    text = plan("--config=quickstart", "--num_gpus=2", "--trainer.strategy=ddp", "--rollout.batch_size=5")
    assert "2 GPUs, all weights on each (trainer.strategy ddp does not shard)" in text
    assert "rollout: 5 rows" in text
    text = plan("--config=quickstart", "--config=strategy/fsdp", "--num_gpus=2")
    assert "2 GPUs, 1/2 of the weights on each" in text
    assert "in a rollout all" in text
    given = "--model.gather_for_rollout=false"
    assert "in a rollout all" not in plan(
        "--config=quickstart", "--config=strategy/fsdp", "--num_gpus=2", given
    )


def test_a_reference_of_its_own_is_counted(plan, tiny_folder: Path):
    same = plan("--config=quickstart", "--model.reference=sudoku_base")
    assert same == plan("--config=quickstart")
    assert plan(
        "--config=quickstart", "--model.policy=GSAI-ML/LLaDA-1.5", f"--model.reference={tiny_folder}"
    ) != plan("--config=quickstart", "--model.policy=GSAI-ML/LLaDA-1.5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_gpus=0"], "num_gpus is '0': set it to a whole number, 1 or more"),
        (["--num_gpus=two"], "num_gpus is 'two': set it to a whole number, 1 or more"),
        (["--gpu_memory=-80"], "gpu_memory is '-80': set it to a positive number of GiB"),
        (["--gpu_memory=inf"], "gpu_memory is 'inf': set it to a positive number of GiB"),
        (["--num_gpus"], "argument --num_gpus: expected one argument"),
        (["--num_gpus=3"], "data.prompts_per_step is 16: it must be a multiple of the 3 GPUs"),
        (["--model.micro_batch_size=0"], "model.micro_batch_size is 0: set it to 1 or more"),
        (["--model.policy=owner/name"], "model.policy is 'owner/name': there is no such folder"),
        (["--model.reference=nowhere"], "model.reference is 'nowhere': there is no such folder"),
        (["--trainer.precision=16-mixed"], "trainer.precision is '16-mixed'"),
        (["--rollout.completion_length=20"], "completion_length is 20, block_length is 16"),
        (["--rollout.decode.threshold=2"], "threshold is 2.0: set it in (0, 1]"),
        (["--model.micro_batch_sizes=1"], "did you mean 'model.micro_batch_size'?"),
        (["--config=quickstrat"], "--config is 'quickstrat': there is no such file"),
    ],
)
def test_bad_settings_name_key_value_and_fix(error, arguments: list[str], words: str):
    message = error("--config=quickstart", *arguments)
    assert message.startswith("drift: error: ")
    assert words in message


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run(["plan", "--help"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "usage: drift plan [--num_gpus N] [--gpu_memory GIB] [--config NAME_OR_FILE ...]" in out
    assert "Nothing is downloaded" in out
    assert "drift plan --config llada_math --num_gpus 8 --gpu_memory 80" in out


def test_the_doctor_prints_a_table(capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path):
    run(["doctor", "--path", str(tiny_folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 3 + ["unsure"] * 2 + ["ok"] * 3
    assert lines[2].split()[1:3] == ["weights", "26,912"]
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"mask_token_id": config["pad_token_id"]}))
    with pytest.raises(SystemExit) as stopped:
        run(["doctor", "--path", str(broken)])
    assert stopped.value.code == 1
    assert "failed  tokenizer" in capsys.readouterr().out


def test_export_takes_its_options_from_the_command_line(error):
    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(["export", *arguments])
        return str(stopped.value.code)

    given = ["--ckpt_path=none.ckpt", "--output=out"]
    assert message(*given).startswith("drift: error: ckpt_path is 'none.ckpt': there is no such file")
    assert "did you mean 'output'?" in message("--ckpt_path=none.ckpt", "--outptu=x")
    assert "dtype is int8: it must be one of 'source'" in message(*given, "--dtype=int8")


@pytest.mark.parametrize("command", ["doctor", "export"])
def test_help_lists_the_options(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as stopped:
        run([command, "--help"])
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert f"usage: drift {command} [--KEY VALUE ...]" in out
    assert {"doctor": "--path PATH", "export": "--output OUTPUT"}[command] in out


def test_other_commands_are_those_of_lightning(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run(["fit", "--config=quickstart", "--print_config"])
    assert not stopped.value.code
    assert yaml.safe_load(capsys.readouterr().out)["model"]["policy"] == "sudoku_base"
