"""The same global batch gives the same numbers on one process and on several, however weights are held."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drift.models import load_policy

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    # Micro-batches of few states, so that some ranks have none in the last of them.
    "token, full": {"beta": 0.0, "full": True, "micro_batch_size": 6},
    "sample, several updates": {
        "normalisation": "sample",
        "num_updates": 2,
        "micro_batch_size": 64,
        "ema_decay": 0.9,
    },
    # The best group is on one rank only, and so is the one validation puzzle.
    "one group, one puzzle": {"train_groups": 1, "num_validation": 1},
    # Rounds of few prompts, so that some ranks have none of them; shares that are not even.
    "refilled": {"train_groups": 3, "refill_rounds": 2, "num_updates": 2},
    # Adapters on few of the layers, recomputed blocks, and the KL to the policy without adapters.
    "adapters": {"num_updates": 2, "lora": ["q_proj", "ff_out"], "checkpointing": True},
    # The mismatch of cached rollouts is weighed, and the largest of all is on one of the ranks.
    "cached, weighed": {"micro_batch_size": 7, "importance_cap": 1.5, "block_length": 8},
    # Objectives of whole completions, of which some ranks have none in the last micro-batches.
    "whole completions": {"elbo": True, "beta": 0.3, "num_updates": 2, "micro_batch_size": 6},
    # Draws of commits, of cached rollouts, learned from twice.
    "commits": {
        "commit": "stochastic",
        "tau": None,
        "normalisation": "trajectory",
        "num_updates": 2,
        "micro_batch_size": 7,
        "block_length": 8,
    },
}
LAYOUTS = {
    "ddp 2": (2, {"strategy": "ddp"}),
    "fsdp 2": (2, {"strategy": "fsdp"}),
    "fsdp 4, gathered in each pass": (4, {"strategy": "fsdp", "gather": False}),
}
MORE = {("ddp 4", "sample, several updates"): (4, {"strategy": "ddp"})}
MASTERS = {
    "strategy": "fsdp",
    "dtype": "bfloat16",
    "master_weights": True,
    "num_updates": 2,
    "ema_decay": 0.9,
}


def jobs(folder: Path) -> list[dict[str, object]]:
    """All that is run, by number of ranks: each group of processes is started once."""
    found = []

    def add(name: str, ranks: int, job: str = "train", **arguments: object) -> None:
        found.append({"name": name, "ranks": ranks, "job": job, "arguments": arguments})

    for name, settings in SETTINGS.items():
        add(f"one process: {name}", 1, **settings)
        for layout, (ranks, how) in LAYOUTS.items():
            add(f"{layout}: {name}", ranks, **settings, **how)
    for (layout, name), (ranks, how) in MORE.items():
        add(f"{layout}: {name}", ranks, **SETTINGS[name], **how)
    for ranks in (2, 4):
        add(f"own pace {ranks}", ranks, "own_pace")
    add("fine-tuned by 1", 1, "fine_tune")
    for strategy in ("ddp", "fsdp"):
        add(f"fine-tuned: {strategy}", 2, "fine_tune", strategy=strategy)
    add("tied", 2, "tied")
    add("mixed", 2, "tied", dtype="bfloat16")
    add("masters", 2, "masters")
    add("disagree", 4, "disagree")
    for what in ("micro-batches", "rows"):
        add(f"disagree on {what}", 2, "disagree_in_training", what=what)
    # Interrupted between the two updates of a rollout, or at its end.
    settings = SETTINGS["sample, several updates"]
    file, halves = str(folder / "fsdp.ckpt"), str(folder / "masters.ckpt")
    add("saved by 2", 2, **settings, strategy="fsdp", max_steps=4, save=file)
    add("resumed by 4", 4, **settings, strategy="fsdp", resume=file)
    add("resumed by 1", 1, **settings, resume=file)
    refilled, file = SETTINGS["refilled"], str(folder / "refilled.ckpt")
    add("refilled, saved by 2", 2, **refilled, strategy="ddp", max_steps=2, save=file)
    add("refilled, resumed by 4", 4, **refilled, strategy="ddp", resume=file)
    probed = {"lr": 1e-3, "beta": 0.0, "max_steps": 3, "probe": True}
    for layout, (ranks, how) in LAYOUTS.items():
        add(f"averages, {layout}", ranks, **probed, ema_decay=0.9, **how)
    add("masters whole", 2, **MASTERS)
    add("masters saved", 2, **MASTERS, max_steps=3, save=halves)
    add("masters resumed", 2, **MASTERS, resume=halves)
    last = [job for job in found if job["name"] == "resumed by 1"]
    return sorted((job for job in found if job not in last), key=lambda job: job["ranks"]) + last


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """What a job found, by its name; everything is run when the first is asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "jobs.json").write_text(json.dumps(jobs(folder)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(ROOT / "tests" / "ranks.py"), str(folder)]
    done = subprocess.run(
        call,
        env=environment,
        cwd=folder,
        timeout=600,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def find(name: str) -> dict:
        file = folder / f"{name}.pt"
        assert file.is_file(), f"the job {name!r} failed or was not reached:\n{done.stdout[-6000:]}"
        return torch.load(file, weights_only=True)

    find.log = done  # type: ignore[attr-defined]
    return find


def assert_same_run(found: dict, expected: dict, *, since: int = 0) -> None:
    """Same draws bit by bit, same numbers but for the order of their sums; `since`: first step of `found`."""
    assert len(found["steps"]) == len(expected["steps"]) - since
    for step, (ours, theirs) in enumerate(zip(found["steps"], expected["steps"][since:], strict=True), since):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"metrics", "token_probs", "advantages"}:
            assert torch.equal(ours[name], theirs[name]), f"{name} of step {step}"
        for name in ("token_probs", "advantages"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=f"{name}, {step}")
        for name in theirs["metrics"]:
            # Figures of a validation are there from its first run on.
            value = theirs["metrics"][name]
            if since == 0 or not name.startswith("val/"):
                assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name}, {step}"
    start = load_policy("sudoku_base").state_dict()
    off = moved = torch.tensor(0.0)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5, msg=name)
        off = off + (found["weights"][name] - value).square().sum()
        moved = moved + (value - start[name]).square().sum()
    # AdamW makes whole steps even of gradients that are nothing but rounding: few weights have such.
    assert off.sqrt() < 0.01 * moved.sqrt()


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("layout", "name"), [*((layout, name) for name in SETTINGS for layout in LAYOUTS), *MORE]
)
def test_several_processes_do_what_one_does(result, layout: str, name: str):
    one, several = result(f"one process: {name}"), result(f"{layout}: {name}")
    assert_same_run(several, one)
    # There was something to agree on.
    first, last = one["steps"][0], one["steps"][-1]
    assert first["metrics"]["loss/policy"] != 0
    assert first["rewards"].unique().numel() > 2
    assert any(name.startswith("collapse/reward_") for name in first["metrics"])
    assert "collapse/confident_wrong" in first["metrics"]
    assert not torch.equal(first["completion_ids"], last["completion_ids"])
    assert ("loss/commit" in last["metrics"]) == ("commit" in SETTINGS[name])
    assert ("mismatch/weight" in last["metrics"]) == ("importance_cap" in SETTINGS[name])
    if "refilled" in name:
        prompts = [step["metrics"]["rollout/prompts"] for step in one["steps"]]
        # One step without a further round; rounds of 2 and of 3 prompts, fewer than four ranks; and two of 4.
        assert sorted(set(prompts)) == [4, 4 + 2 + 3, 4 + 4 + 4]
        assert all(step["trained"].tolist() == [True] * 3 * 4 for step in one["steps"])
        spreads = [[step["metrics"][f"{of}/spread"] for of in ("reward", "update")] for step in one["steps"]]
        assert any(first < then for first, then in spreads)
    if "full" not in SETTINGS[name]:
        assert last["metrics"]["update/grad_norm"] > 0


@pytest.mark.two_ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fine_tuning_on_unlike_lengths_does_what_one_process_does(result, strategy: str):
    one, two = result("fine-tuned by 1"), result(f"fine-tuned: {strategy}")
    # Passes of the groups one by one would be more on one rank than on the other.
    assert any(len(set(groups)) > 1 for groups in two["groups"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=1e-5, msg=name)


EVALUATED = """
import json, sys
from lightning import Trainer
from drift.callbacks import AnswerCallback, RolloutCallback, SummaryCallback
from drift.data import Benchmark, PromptDataModule
from drift.evaluation import GridConfig
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

settings = json.loads(sys.argv[1])
warm = DenoiseConfig(block_length=8, temperature=1.0, threshold=0.5)
grid = GridConfig(lengths=[8, 16], decodes={"warm": warm}, samples=3)
files = SummaryCallback(settings["path"]), AnswerCallback(settings["path"] + "l")
rollout = RolloutCallback(completion_length=16, decode=warm, evaluation=warm, test=grid)
# Of the second set one rank has nothing.
sets = {"many": Benchmark(limit=5), "one": Benchmark(task=SudokuTask(blanks=(3, 4)), limit=1)}
trainer = Trainer(
    accelerator="cpu",
    devices=settings["devices"],
    strategy="ddp" if settings["devices"] > 1 else "auto",
    callbacks=[rollout, *files],
    logger=False,
    enable_progress_bar=False,
    use_distributed_sampler=False,
)
module = RLDFModule("sudoku_base")
data = PromptDataModule(SudokuTask(), test=sets, evaluation_batch_size=settings["batch_size"])
trainer.test(module, data, verbose=False)
"""


def evaluated(path: Path, **settings: object) -> tuple[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = path.with_suffix(".py")
    script.write_text(EVALUATED, encoding="utf-8")
    call = [sys.executable, str(script), json.dumps({"path": str(path), **settings})]
    subprocess.run(call, check=True, env=environment, cwd=path.parent, timeout=300, capture_output=True)
    found = json.loads(path.read_text())
    assert all(result.pop("seconds") > 0 for result in found["results"])
    return json.dumps(found), path.with_suffix(".jsonl").read_text()


@pytest.mark.two_ranks
def test_two_processes_measure_what_one_does(tmp_path):
    one = evaluated(tmp_path / "one.json", devices=1, batch_size=64)
    two = evaluated(tmp_path / "two.json", devices=2, batch_size=2)
    assert two == one
    results = json.loads(one[0])["results"]
    assert [result["num"] for result in results] == [5, 5, 1, 1]
    assert len(one[1].splitlines()) == (5 + 1) * 2 * 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("layout", "share"), [("ddp 2", 1), ("fsdp 2", 2), ("fsdp 4, gathered in each pass", 4)]
)
def test_each_rank_holds_its_share(result, layout: str, share: int):
    whole, held = (result(f"{where}: sample, several updates")["bytes"] for where in ("one process", layout))
    assert whole["policy"] == whole["reference"] > 0
    for name, size in whole.items():
        # Rows that cannot be shared evenly are on the first ranks; rank 0 is asked.
        assert size / share <= held[name] < 1.05 * size / share, name


@pytest.mark.two_ranks
def test_ranks_made_different_numbers_of_passes(result):
    passes = result("fsdp 4, gathered in each pass: sample, several updates")["passes"]
    assert any(len(set(numbers)) > 1 for numbers in passes)


@pytest.mark.two_ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_decodes_at_its_own_pace(result, ranks: int):
    found = result(f"own pace {ranks}")
    steps = [2 + 3 * number for number in range(ranks)]
    for way in ("gathered", "joined"):
        # The rollout of one process, and the weights split again afterwards.
        assert [entry[:2] for entry in found[way]] == [(True, True)] * ranks
        assert [entry[3] for entry in found[way]] == steps
    # 5 units: embedding, two blocks, head, last norm.
    assert [entry[2] for entry in found["gathered"]] == steps
    assert all(sum(entry[4].values()) == 5 for entry in found["gathered"])
    # Whoever is through goes along with the slowest, and not a pass further; one question before each pass.
    assert [entry[2] for entry in found["joined"]] == [steps[-1]] * ranks


@pytest.mark.two_ranks
def test_a_head_that_is_the_embedding_stays_so(result):
    found = result("tied")
    whole, split = found["whole"], found["sharded"]
    assert whole["tie"]
    assert split["tie"]
    assert whole["grads"].keys() == split["grads"].keys()
    torch.testing.assert_close(split["losses"], whole["losses"])
    torch.testing.assert_close(split["norm"], whole["norm"])
    for name, gradient in whole["grads"].items():
        torch.testing.assert_close(split["grads"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.two_ranks
def test_passes_compute_in_half_precision_and_reduce_in_full(result):
    found = result("mixed")
    whole, split = found["whole"], found["sharded"]
    assert all(gradient.dtype == torch.float32 for gradient in split["grads"].values())
    assert split["losses"][0] != whole["losses"][0]
    torch.testing.assert_close(split["losses"], whole["losses"], rtol=0.05, atol=0.0)
    torch.testing.assert_close(split["norm"], whole["norm"], rtol=0.1, atol=0.0)


@pytest.mark.two_ranks
def test_master_weights_are_sharded_and_resumed_with_the_parameters(result):
    found = result("masters")
    assert found["same"]
    assert found["sizes"] == [("torch.float32", True)]


@pytest.mark.two_ranks
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(result, ranks: int):
    expected, resumed = result("one process: sample, several updates"), result(f"resumed by {ranks}")
    assert_same_run(resumed, expected, since=4)


@pytest.mark.two_ranks
def test_further_rounds_go_on_on_another_number_of_ranks(result):
    assert_same_run(result("refilled, resumed by 4"), result("one process: refilled"), since=2)


@pytest.mark.two_ranks
def test_an_interrupted_sharded_run_goes_on_bit_by_bit(result):
    whole, resumed = result("masters whole"), result("masters resumed")
    assert len(resumed["steps"]) == 2
    for ours, theirs in zip(resumed["steps"], whole["steps"][3:], strict=True):
        for name in ours.keys() - {"metrics"}:
            assert torch.equal(ours[name], theirs[name]), name
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())
    assert all(value.dtype == torch.bfloat16 for value in whole["weights"].values())


@pytest.mark.two_ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_sees_the_average_however_weights_are_held(result, layout: str):
    found = result(f"averages, {layout}")["probe"]
    policy, seen = load_policy("sudoku_base").eval(), {}
    for name in ("weights", "averages"):
        policy.load_state_dict(found[name])
        with torch.no_grad():
            seen[name] = policy.logits(torch.arange(2, 42)[None])
    torch.testing.assert_close(found["logits"], seen["averages"], rtol=1e-4, atol=1e-4)
    assert (found["logits"] - seen["weights"]).abs().max() > 0.01


@pytest.mark.two_ranks
def test_what_must_agree_raises_everywhere_with_all_values(result):
    said = result("disagree")
    assert said["equal"] == [None] * 4
    assert len(set(said["number"])) == 1
    assert said["number"][0].startswith(
        "a thing must be the same on all ranks, but is rank 0: 3; rank 1: 4; rank 2: 5; rank 3: 6; start"
    )
    assert "rank 0: {'lr': 0.1}; rank 1: {'lr': 0.2}" in said["settings"][3]
    assert "seed" not in said["settings"][3].partition("; start")[0]


@pytest.mark.two_ranks
@pytest.mark.parametrize(
    ("what", "words"), [("micro-batches", "the shape of an update"), ("rows", "the number of rows of data")]
)
def test_a_run_stops_where_ranks_disagree(result, what: str, words: str):
    said = result(f"disagree on {what}")
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith(words)
    assert "rank 0: {" in said[0]
    assert "rank 1: {" in said[0]


@pytest.mark.two_ranks
def test_all_groups_ended_well(result):
    assert result.log.returncode == 0, result.log.stdout[-6000:]
