"""Runs under several ranks that are told to stop, killed and out of disk go on as if nothing had been."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DDP = ["--trainer.strategy=ddp"]
FSDP = ["--config=strategy/fsdp"]
JOINED = [*FSDP, "--model.gather_for_rollout=false"]
TERM, KILL, USR1 = "SIGTERM", "SIGKILL", "SIGUSR1"


def life(
    settings: list[str], *moments: tuple[int, str, str, int], ranks: int = 2, launcher: str = "torchrun"
) -> dict[str, object]:
    """A life in which things happen: to which rank, what, in which stage, the how manieth time."""
    found = {rank: (what, stage, number) for rank, what, stage, number in moments}
    return {"settings": settings, "moments": found, "ranks": ranks, "launcher": launcher}


# Of four steps two and two are of one rollout; the validations follow the second and the last.
LIVES = {
    "ddp": [life(DDP)],
    "ddp told": [
        life(DDP, (1, TERM, "rollout", 3), launcher="lightning"),
        life(DDP, (0, TERM, "update", 1)),
        life(DDP, (1, USR1, "validation", 2), launcher="slurm"),
        life(DDP, (0, TERM, "reward", 1), (1, TERM, "rollout", 1)),
        life(DDP, (0, TERM, "last validation", 2)),
        life(DDP),
    ],
    "ddp killed": [
        life(DDP, (1, KILL, "validation", 1)),
        life(DDP, (0, KILL, "write", 2)),
        life(DDP, (0, "full", "checkpoint", 3)),
        life(DDP),
    ],
    "ddp restarted": [life(DDP, (1, KILL, "update", 7), launcher="restarting")],
    "fsdp": [life(FSDP)],
    "fsdp told": [
        life(FSDP, (1, TERM, "rollout", 2)),
        life(JOINED, (0, TERM, "rollout", 2)),
        life(JOINED, (0, TERM, "validation", 1), (1, TERM, "validation", 1)),
        life(FSDP, (1, TERM, "last validation", 1)),
        life(FSDP),
    ],
    "fsdp killed": [life(JOINED, (1, KILL, "validation", 4)), life(FSDP, (0, "full", "checkpoint", 3))],
    "moved": [
        life(DDP, (0, TERM, "reward", 3)),  # of the second rollout
        life(FSDP, (3, TERM, "last validation", 1), ranks=4),
        life([], ranks=1, launcher="none"),
    ],
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The comparison of the benchmark of kills."""
    path = ROOT / "benchmarks" / "bench_kill.py"
    spec = importlib.util.spec_from_file_location("bench_kill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """A run by its name: its folder, lives, and what ranks 0 and 1 said; the first asked for runs all."""
    folder = tmp_path_factory.mktemp("lives")
    jobs = [{"name": name, "lives": lives} for name, lives in LIVES.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    told = folder / "scontrol"
    told.write_text(f'#!/bin/sh\necho "$@" >> {folder / "told"}\n')
    told.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "lives.py"), str(folder)],
        env=environment,
        text=True,
        timeout=900,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def find(name: str) -> SimpleNamespace:
        file = folder / f"{name}.json"
        assert file.is_file(), done.stdout[-6000:]
        said = [(folder / name / f"rank{rank}.txt").read_text() for rank in (0, 1)]
        lives = [SimpleNamespace(**found) for found in json.loads(file.read_text())]
        return SimpleNamespace(folder=folder / name, lives=lives, said=said, told=folder / "told")

    return find


def statuses(found: SimpleNamespace) -> list[list[int]]:
    return [one.statuses for one in found.lives]


def steps(found: SimpleNamespace) -> list[int]:
    return [one.step for one in found.lives]


@pytest.mark.two_ranks
def test_ddp_stops_where_it_is_told_and_goes_on(run, bench):
    whole, told = run("ddp"), run("ddp told")
    assert statuses(whole) == [[0, 0]]
    # Lightning's own launcher kills rank 0 where another one fails.
    assert statuses(told) == [[143, 0], [143, 143], [138, 138], [143, 143], [143, 143], [0, 0]]
    assert steps(told) == [0, 1, 2, 2, 4, 4]
    assert told.told.read_text() == "requeue 12\n"
    assert "drift: SLURM job 12 is back in the queue" in told.said[0]
    for text in told.said:
        assert "Traceback" not in text
    expected = bench.results(whole.folder)
    assert len([row for row in expected["metrics.csv"] if row["loss/total"]]) == 4
    assert len([row for row in expected["metrics.csv"] if row["val/accuracy"]]) == 2
    assert bench.differences(expected, bench.results(told.folder)) == []


@pytest.mark.two_ranks
def test_fsdp_stops_where_it_is_told_and_goes_on(run, bench):
    whole, told = run("fsdp"), run("fsdp told")
    assert statuses(told) == [[143, 143]] * 4 + [[0, 0]]
    assert steps(told) == [0, 0, 2, 4, 4]
    expected, found = bench.results(whole.folder), bench.results(told.folder)
    assert bench.differences(expected, found) == []


@pytest.mark.two_ranks
def test_where_one_rank_is_killed_the_others_end_and_all_go_on(run, bench):
    killed = run("ddp killed")
    assert statuses(killed)[:2] == [[1, -9], [-9, 1]]
    assert steps(killed) == [None, None, 3, 4]
    expected = bench.results(run("ddp").folder)
    assert bench.differences(expected, bench.results(killed.folder)) == []
    # Whoever waits for weights that are gathered in each pass ends, too.
    assert statuses(run("fsdp killed"))[0] == [1, -9]
    assert all(one.seconds < 60 for name in ("ddp killed", "fsdp killed") for one in run(name).lives)


@pytest.mark.two_ranks
@pytest.mark.parametrize("name", ["ddp killed", "fsdp killed"])
def test_a_full_disk_of_one_rank_stops_all(run, name: str):
    found = run(name)
    full = next(place for place, one in enumerate(found.lives) if one.statuses == [1, 1])
    for text in found.said:
        assert re.search(r"stopped: .*\.ckpt: .* \(File too large\); the one before is kept", text)
        assert "fails (" not in text.partition("File too large")[2]
    assert found.lives[full].step == 3
    assert [file for file in found.lives[full].files if file.startswith(".")] == []


@pytest.mark.two_ranks
def test_torchrun_starts_again_what_was_killed(run, bench):
    restarted = run("ddp restarted")
    assert statuses(restarted) == [[0]]
    assert restarted.said[0].count("resume: going on from") == 1
    expected = bench.results(run("ddp").folder)
    assert bench.differences(expected, bench.results(restarted.folder)) == []


@pytest.mark.two_ranks
def test_another_number_of_ranks_goes_on_with_weights_and_data(run, bench):
    moved = run("moved")
    assert statuses(moved) == [[143, 143], [143] * 4, [0]]
    assert steps(moved) == [2, 4, 4]
    (one, two) = (bench.results(found.folder) for found in (run("ddp"), moved))
    for name in one:
        if name.startswith("text") and "samples" in name:
            assert two[name] == one[name], name  # prompts, answers and rewards
        if name.startswith("scalar") and name != "scalar epoch":
            assert [step for step, _ in two[name]] == [step for step, _ in one[name]], name
    paths = [next(found.folder.glob("runs/killed/*/checkpoints/last.ckpt")) for found in (run("ddp"), moved)]
    ours, theirs = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
