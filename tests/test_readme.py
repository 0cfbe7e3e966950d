"""Every command and every piece of Python in the README runs, on small sizes."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from drift.commands import run
from drift.contract import ConfigError, Rollout
from drift.models import LLaDA, LLaDAConfig, load_policy
from drift.models.characters import character_tokenizer

# The commands for large policies, which need a policy and data of the user's own.
BIG = re.compile("FOLDER|llada_math")
README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = {
    "fit": "--trainer.max_steps 2 --trainer.val_check_interval 1 --data.num_validation 4 "
    "--data.prompts_per_step 2 --rollout.group_size 2",
    "sft": "--trainer.max_steps 1 --trainer.val_check_interval 1 --data.num_validation 4 "
    "--data.prompts_per_step 2",
    "test": "--data.num_test 4",
    "predict": "--data.num_test 4",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def test_every_line_of_the_shell_blocks_is_a_known_command():
    assert len(commands()) >= 10
    assert {line.split()[0] for line in commands()} == {"drift", "export", "make", "torchrun"}


def test_torchrun_and_drift_understand_their_parts_of_the_command_for_several_machines(capsys):
    line = next(line for line in commands() if line.startswith("torchrun"))
    torchrun = get_args_parser().parse_args(shlex.split(line)[1:])
    assert torchrun.module
    assert torchrun.training_script == "drift"
    with pytest.raises(SystemExit) as stopped:
        run([*torchrun.training_script_args, "--print_config"])
    assert stopped.value.code in (0, None)
    assert "num_nodes: 2" in capsys.readouterr().out


def test_make_commands_exist():
    targets = (Path(__file__).resolve().parent.parent / "Makefile").read_text(encoding="utf-8")
    for line in commands():
        if line.startswith("make"):
            assert re.search(rf"^{line.split()[1]}:", targets, re.MULTILINE), line


def task_of_the_readme() -> str:
    return next(block for block in blocks("python") if "DoublingTask" in block)


@pytest.fixture
def playground(tmp_path, monkeypatch):
    """A folder with what a user's own files would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_overlay.yaml").write_text("model:\n  optimizer:\n    lr: 2.0e-4\n", encoding="utf-8")
    sampler = "from drift.samplers import UniformSampler\n\n\nclass MySampler(UniformSampler):\n    pass\n"
    (tmp_path / "my_package.py").write_text(f"{task_of_the_readme()}\n\n{sampler}", encoding="utf-8")
    numbers = [{"number": number} for number in range(8)]
    (tmp_path / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")
    return tmp_path


def test_quickstart_commands_run_in_their_order(playground, capsys):
    ran = [line for line in commands() if line.startswith("drift") and not BIG.search(line)]
    assert len(ran) >= 9
    for line in ran:
        arguments = shlex.split(line)[1:]
        # A resumed run needs more steps than its checkpoint has.
        num_steps = 3 if "--ckpt_path" in line else 2
        small = SMALL[arguments[0]].replace("max_steps 2", f"max_steps {num_steps}")
        if "--print_config" in line:
            with pytest.raises(SystemExit) as stopped:
                run(arguments)
            assert stopped.value.code in (0, None)
        else:
            run([*arguments, *shlex.split(small)])
    shown = capsys.readouterr().out
    assert "--- test ---" in shown
    assert "--- summary ---" in shown
    assert (playground / "runs/quickstart/version_0/checkpoints/best.ckpt").is_file()


def test_commands_for_large_policies_run_on_a_tiny_one(playground, capsys):
    # The last 128 rows of the training file are for validation.
    for name, step, num in (("MATH_train.json", 1, 132), ("MATH500.json", 2, 4)):
        rows = [
            {"question": f"What is {i} + {step}?", "ground_truth_answer": str(i + step)} for i in range(num)
        ]
        (playground / name).write_text(json.dumps(rows), encoding="utf-8")
    config = LLaDAConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        mlp_hidden_size=32,
        vocab_size=98,
        mask_token_id=1,
        pad_token_id=0,
        eos_token_id=0,
    )
    LLaDA(config).save_pretrained(playground / "FOLDER")
    character_tokenizer().save_pretrained(playground / "FOLDER")
    small = {
        "fit": "--rollout.completion_length 32 --data.prompts_per_step 2 --model.train_groups 1 "
        "--trainer.max_steps 1 --trainer.val_check_interval 1 --trainer.limit_val_batches 1"
    }
    ran = [line for line in commands() if line.startswith("drift") and BIG.search(line)]
    assert [line.split()[1] for line in ran] == ["doctor", "plan", "fit", "export"]
    for line in ran:
        arguments = shlex.split(line)[1:]
        run([*arguments, *shlex.split(small.get(arguments[0], ""))])
    assert list(playground.glob("runs/llada_math_lora/version_0/checkpoints/last.ckpt"))
    before, after = (load_policy(playground / name).state_dict() for name in ("FOLDER", "policy"))
    assert before.keys() == after.keys()
    shown = capsys.readouterr().out
    assert "re-scoring" in shown
    assert "DOES NOT FIT" in shown


def test_python_of_the_readme_is_the_quickstart(playground, capsys):
    training = next(block for block in blocks("python") if "Trainer(" in block)
    assert len([line for line in training.splitlines() if line.strip()]) <= 17
    for long, short in (
        ("max_steps=30", "max_steps=3, logger=False, enable_checkpointing=False"),
        ("prompts_per_step=16", "prompts_per_step=4, num_test=4, num_validation=4"),
    ):
        assert long in training
        training = training.replace(long, short)
    names: dict[str, Any] = {}
    exec(training, names)
    assert names["trainer"].global_step == 3
    assert "test/accuracy" in capsys.readouterr().out
    small = "--trainer.max_steps 3 --trainer.limit_val_batches 0 --data.prompts_per_step 4"
    run(["fit", "--config", "quickstart", *shlex.split(small)])
    checkpoint = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    ours = names["module"].state_dict()
    assert ours.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(value, ours[name]) for name, value in checkpoint["state_dict"].items())
    base = load_policy("sudoku_base").state_dict()
    assert any(not torch.equal(value, ours[f"policy.{name}"]) for name, value in base.items())


def test_task_of_the_readme_is_short_and_judges():
    source = task_of_the_readme()
    assert len(source.splitlines()) < 20
    names: dict[str, Any] = {}
    exec(source, names)
    task = names["DoublingTask"]()
    problem = task.problem({"number": 21})
    assert problem.prompt == "Box 2 * 21: \\boxed{}"
    assert task.reward(["\\boxed{42}", "\\boxed{21}"], [problem, problem]).tolist() == [1.0, 0.0]
    task.reward.close()
    with pytest.raises(ConfigError, match=r"^row 7: field 'number' is 'two'; it must be an integer"):
        task.check({"number": "two"}, "row 7")


def test_sampler_of_the_readme_plans():
    source = next(block for block in blocks("python") if "LastTimestep" in block)
    names: dict[str, type] = {}
    exec(source, names)
    rollout = Rollout(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        completion_ids=torch.ones(2, 3, dtype=torch.long),
        completion_mask=torch.tensor([[True, True, False], [False, False, False]]),
        step_map=torch.tensor([[0, 1, 2], [0, 1, 2]]),
    )
    plan = names["LastTimestep"]().plan(rollout)
    # Row 0: the last timestep with a valid token is 1; position 2 came after it and is masked too. Row 1
    # has none.
    assert plan.masked.tolist() == [[[False, True, True], [False, False, False]]]
    assert plan.current.tolist() == [[[False, True, False], [False, False, False]]]
    assert plan.weight.tolist() == [[1.0, 0.0]]
